"""What llama.cpp's loader of pull request 24423 asks of a GGUF, and llama-quantize of an imatrix, told from its source.

Read in ggml-org/llama.cpp:
    L  src/models/diffusion-gemma.cpp        15ad8f42 (the pull request): load_arch_hparams, load_arch_tensors
    H  src/llama-model.cpp                   00342301: load_hparams, what every architecture needs
    C  examples/diffusion/diffusion-cli.cpp  15ad8f42: main, the mask token and the sampler's keys with their defaults
    P  conversion/diffusion_gemma.py         c5fe75b9: set_gguf_parameters, which sampler keys are written when
    I  common/imatrix-loader.cpp             0a32c5ee: common_imatrix_load
    Z  tools/quantize/quantize.cpp           03161a4e: load_imatrix

Names of tensors: gguf-py's table; it knows this architecture's own four not yet, which are as in golden/tinyA, made by
that pull request's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
from gguf import MODEL_TENSOR as T

ARCH = "diffusion-gemma"
REQUIRED = {  # key below the architecture's prefix -> GGUF type, array of it for "[…]"; absent: "key not found"
    "context_length": "UINT32",  # H
    "embedding_length": "UINT32",  # H
    "block_count": "UINT32",  # H
    "attention.sliding_window_pattern": "[BOOL]",  # L
    "attention.sliding_window": "UINT32",  # L
    "attention.layer_norm_rms_epsilon": "FLOAT32",  # L
    "attention.key_length_swa": "UINT32",  # L
    "attention.value_length_swa": "UINT32",  # L
}
# H and L read these as optional, with a default that is wrong for this model: no key-value heads of their own, heads of
# embedding_length / head_count, no experts, 10000 for both RoPE bases, no softcap.
WRONG_IF_ABSENT = {
    "feed_forward_length": "UINT32",
    "attention.head_count": "UINT32",
    "attention.head_count_kv": "[INT32]",
    "attention.key_length": "UINT32",
    "attention.value_length": "UINT32",
    "expert_count": "UINT32",
    "expert_used_count": "UINT32",
    "expert_feed_forward_length": "UINT32",
    "rope.freq_base": "FLOAT32",
    "rope.freq_base_swa": "FLOAT32",
    "rope.dimension_count": "UINT32",
    "final_logit_softcapping": "FLOAT32",
}
OUTSIDE = {"general.architecture": "STRING", "diffusion.canvas_length": "UINT32", "tokenizer.ggml.model": "STRING",
           "tokenizer.ggml.tokens": "[STRING]", "tokenizer.ggml.mask_token_id": "UINT32"}  # fmt: skip
SAMPLER = {
    "eb_max_steps": ("UINT32", 48),
    "eb_t_min": ("FLOAT32", 0.4),
    "eb_t_max": ("FLOAT32", 0.8),
    "eb_entropy_bound": ("FLOAT32", 0.1),
    "eb_stability_threshold": ("UINT32", 1),
    "eb_confidence_threshold": ("FLOAT32", 0.005),
}  # C; fmt: skip


def fields(reader: gguf.GGUFReader) -> dict[str, tuple[str, Any]]:
    """key -> type, "[…]" for an array, and value."""
    found = {}
    for key, field in reader.fields.items():
        names = [kind.name for kind in field.types]
        found[key] = (f"[{names[1]}]" if names[0] == "ARRAY" else names[0], field.contents())
    return found


def key_problems(keys: Mapping[str, tuple[str, Any]]) -> list[str]:
    wanted = {f"{ARCH}.{key}": kind for key, kind in (REQUIRED | WRONG_IF_ABSENT).items()} | OUTSIDE
    problems = [f"{key}: missing" for key in wanted if key not in keys]
    types = wanted | {f"diffusion.{key}": kind for key, (kind, _) in SAMPLER.items()}
    problems += [f"{k}: {keys[k][0]}, read as {kind}" for k, kind in types.items() if k in keys and keys[k][0] != kind]
    if problems:  # before their values are looked at
        return problems
    layers = keys[f"{ARCH}.block_count"][1]
    for key in ("attention.sliding_window_pattern", "attention.head_count_kv"):
        if len(keys[f"{ARCH}.{key}"][1]) != layers:
            problems.append(f"{key}: not one value a layer")
    if keys["general.architecture"][1] != ARCH or keys["tokenizer.ggml.model"][1] != "gemma4":
        problems.append("another architecture, or another tokenizer's model")
    if keys["diffusion.canvas_length"][1] <= 0:
        problems.append("diffusion.canvas_length must be positive")
    for suffix in ("", "_swa"):
        if keys[f"{ARCH}.attention.key_length{suffix}"][1] != keys[f"{ARCH}.attention.value_length{suffix}"][1]:
            problems.append(f"attention.key_length{suffix} must be value_length{suffix}")
    if keys["tokenizer.ggml.mask_token_id"][1] >= len(keys["tokenizer.ggml.tokens"][1]):
        problems.append("the mask token is outside the vocabulary")
    return problems


def sampler_problems(keys: Mapping[str, tuple[str, Any]], generation: Mapping[str, Any]) -> list[str]:
    """What the file makes the sampler do against generation_config.json: P writes what is said, C has defaults."""
    said = {**generation, "entropy_bound": (generation.get("sampler_config") or {}).get("entropy_bound")}
    problems = []
    for key, (_, default) in SAMPLER.items():
        wanted = said.get("max_denoising_steps" if key == "eb_max_steps" else key.removeprefix("eb_"))
        wanted = default if wanted is None else wanted
        found = keys.get(f"diffusion.{key}", ("", default))[1]
        if abs(found - wanted) > 1e-6 * abs(wanted):
            problems.append(f"diffusion.{key}: {found}, generation_config.json means {wanted}")
    return problems


def tensors(keys: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """name -> dimensions in ggml's order, and whether the file may lack it. L, load_arch_tensors, line by line."""
    own = {key.removeprefix(ARCH + "."): value for key, (_, value) in keys.items()}
    hidden, vocab, inner = own["embedding_length"], len(own["tokenizer.ggml.tokens"]), own["feed_forward_length"]
    experts, expert_inner = own["expert_count"], own["expert_feed_forward_length"]
    found: dict[str, tuple[tuple[int, ...], bool]] = {
        f"{gguf.TENSOR_NAMES[T.TOKEN_EMBD]}.weight": ((hidden, vocab), False),
        f"{gguf.TENSOR_NAMES[T.OUTPUT_NORM]}.weight": ((hidden,), False),
        "self_cond_pre_norm.weight": ((hidden,), True),
        "self_cond_gate.weight": ((hidden, inner), True),
        "self_cond_up.weight": ((hidden, inner), True),
        "self_cond_down.weight": ((inner, hidden), True),
    }
    for layer in range(own["block_count"]):
        sliding = own["attention.sliding_window_pattern"][layer]
        head = own["attention.key_length_swa" if sliding else "attention.key_length"]
        queries, keyed = head * own["attention.head_count"], head * own["attention.head_count_kv"][layer]
        if not sliding:
            found[f"{gguf.TENSOR_NAMES[T.ROPE_FREQS]}.weight"] = ((head // 2,), False)
        here: dict[Any, tuple[tuple[int, ...], bool]] = {
            T.ATTN_NORM: ((hidden,), False), T.ATTN_Q: ((hidden, queries), False), T.ATTN_K: ((hidden, keyed), False),
            T.ATTN_V: ((hidden, keyed), True), T.ATTN_OUT: ((queries, hidden), False),
            T.ATTN_Q_NORM: ((head,), False), T.ATTN_K_NORM: ((head,), False), T.ATTN_POST_NORM: ((hidden,), False),
            T.LAYER_OUT_SCALE: ((1,), False), T.FFN_NORM: ((hidden,), False), T.FFN_GATE: ((hidden, inner), False),
            T.FFN_UP: ((hidden, inner), False), T.FFN_DOWN: ((inner, hidden), False),
            T.FFN_POST_NORM: ((hidden,), False), T.FFN_GATE_INP: ((hidden, experts), False),
            T.FFN_PRE_NORM_2: ((hidden,), False), T.FFN_POST_NORM_1: ((hidden,), False),
            T.FFN_POST_NORM_2: ((hidden,), False), T.FFN_GATE_UP_EXP: ((hidden, 2 * expert_inner, experts), False),
            T.FFN_DOWN_EXP: ((expert_inner, hidden, experts), False),
        }  # fmt: skip
        for tensor, wanted in here.items():
            found[gguf.TENSOR_NAMES[tensor].format(bid=layer) + ".weight"] = wanted
        found[f"blk.{layer}.enc_layer_output_scale.weight"] = ((1,), False)
        found[gguf.TENSOR_NAMES[T.FFN_GATE_INP].format(bid=layer) + ".scale"] = ((hidden,), False)
        # optional to the loader, but without it the experts' outputs are not scaled: wrong text, no error
        found[gguf.TENSOR_NAMES[T.FFN_DOWN_EXP].format(bid=layer) + ".scale"] = ((experts,), False)
    return found


def tensor_problems(keys: Mapping[str, tuple[str, Any]], held: Mapping[str, tuple[int, ...]]) -> list[str]:
    """held: name -> dimensions in ggml's order. A tensor that load_arch_tensors does not create is an error, too
    ("wrong number of tensors"), and full layers have no values of their own."""
    wanted = tensors(keys)
    full = [i for i, sliding in enumerate(keys[f"{ARCH}.attention.sliding_window_pattern"][1]) if not sliding]
    problems = [f"{name}: missing" for name, (_, optional) in wanted.items() if not optional and name not in held]
    problems += [f"{name}: the loader does not know it" for name in held if name not in wanted]
    problems += [
        f"{name}: {shape}, expected {wanted[name][0]}"
        for name, shape in held.items()
        if name in wanted and shape != wanted[name][0]
    ]
    lacking = [i for i in range(keys[f"{ARCH}.block_count"][1]) if f"blk.{i}.attn_v.weight" not in held]
    return problems + ([f"layers without values {lacking}, full layers are {full}"] if lacking != full else [])


def held(reader: gguf.GGUFReader) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}


def imatrix_problems(reader: gguf.GGUFReader, weights: Mapping[str, tuple[int, ...]]) -> list[str]:
    """weights: the matrices of the model it is for, dimensions in ggml's order. I and Z; and llama-quantize wants
    ne[0] * ne[2] values a tensor."""
    keys, found = fields(reader), {tensor.name: tensor for tensor in reader.tensors}
    wanted = {"general.type": "STRING", "imatrix.datasets": "[STRING]", "imatrix.chunk_count": "UINT32",
              "imatrix.chunk_size": "UINT32"}  # fmt: skip
    problems = [f"{key}: missing or no {kind}" for key, kind in wanted.items() if keys.get(key, ("",))[0] != kind]
    problems += [f"{name}: not F32" for name, tensor in found.items() if tensor.tensor_type.name != "F32"]
    for name in {name.rpartition(".")[0] for name in found}:
        sums, counts = found.get(name + ".in_sum2"), found.get(name + ".counts")
        if sums is None or counts is None:
            problems.append(f"{name}: mismatched sums and counts")
        elif name not in weights:
            problems.append(f"{name}: no tensor of the model")
        else:
            shape = weights[name]
            matrices = shape[2] if len(shape) > 2 else 1
            if sums.n_elements != shape[0] * matrices or counts.n_elements != matrices:
                problems.append(f"{name}: {sums.n_elements} sums, {counts.n_elements} counts for {shape}")
    return problems
