"""What vLLM asks of an NVFP4 directory, told from its source: names, shapes, dtypes, what its ignore list matches, the
sampler's fields. Nothing of vLLM need be installed; none of these numbers comes from dgq.

    checkpoint name ── mapper ──> vLLM's name ── stacked and expert tables ──> (parameter, shard): dtype, shape

Read in vllm-project/vllm (each file at the commit named), below vllm/model_executor/:
    D  models/diffusion_gemma.py                00c25c81: hf_to_vllm_mapper, packed_modules_mapping, __init__ (modules);
                                                custom_sampler and __init__ of its model state
    G  models/gemma4.py                         001cabc1: Gemma4Model.load_weights, Gemma4MoE, Gemma4MLP,
                                                Gemma4Attention; Gemma4ForCausalLM.load_weights (renames)
    M  layers/quantization/modelopt.py          00155cde: QUANT_ALGOS, KV_CACHE_QUANT_ALGOS, from_config,
                                                is_layer_excluded, apply_vllm_mapper,
                                                ModelOptNvFp4Config._from_config, ModelOptNvFp4FusedMoE
    Q  layers/quantization/utils/quant_utils.py 01693a61: is_layer_skipped
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open

Tensor = tuple[str, tuple[int, ...]]  # a safetensors dtype and a shape

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"  # its registry's name of D's class
PREFIXES = {  # D, hf_to_vllm_mapper; the first that fits
    "model.decoder.self_conditioning.": "self_conditioning.",
    "model.decoder.": "model.",
    "model.encoder.language_model.": "model.",
    "model.encoder.vision_tower.": "vision_tower.",
    "model.encoder.embed_vision.": "embed_vision.",
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # D
ALGORITHMS = ("NVFP4", "W4A16_NVFP4")  # M, QUANT_ALGOS: those of this layout
KV_CACHE = ("FP8", "NVFP4", None)  # M, KV_CACHE_QUANT_ALGOS
HF_QUANT_FIELDS = ("group_size", "kv_cache_quant_algo", "exclude_modules")  # M, ModelOptNvFp4Config._from_config
GROUP = 16  # M, its default
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
         "post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")  # fmt: skip


def parameters(config: Mapping[str, Any], algorithm: str) -> dict[tuple[str, str], Tensor]:
    """(parameter, shard) -> what it takes from the checkpoint, on one GPU. config: config.json."""
    text = config["text_config"]
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    inner, moe, experts = text["intermediate_size"], text["moe_intermediate_size"], text["num_experts"]
    slots: dict[tuple[str, str], Tensor] = {
        ("model.embed_tokens.weight", ""): ("BF16", (vocab, hidden)),
        ("model.norm.weight", ""): ("BF16", (hidden,)),
        ("self_conditioning.pre_norm.weight", ""): ("BF16", (hidden,)),
        ("self_conditioning.gate_proj.weight", ""): ("BF16", (inner, hidden)),
        ("self_conditioning.up_proj.weight", ""): ("BF16", (inner, hidden)),
        ("self_conditioning.down_proj.weight", ""): ("BF16", (hidden, inner)),
    }
    for number, kind in enumerate(text["layer_types"]):
        head, keys = text["head_dim"], text["num_key_value_heads"]
        if kind == "full_attention":  # in Google's style, or as transformers 5.17 and later save it
            numbered = {int(key): value for key, value in text.get("per_layer_config", {}).items()}
            other = numbered.get(number, {})
            head = other.get("head_dim") or text["global_head_dim"]
            keys = other.get("num_key_value_heads") or text.get("num_global_key_value_heads", keys)
        keys, queries = keys * head, text["num_attention_heads"] * head
        here = f"model.layers.{number}."
        own: dict[tuple[str, str], tuple[int, ...]] = {
            ("self_attn.qkv_proj.weight", "q"): (queries, hidden),
            ("self_attn.qkv_proj.weight", "k"): (keys, hidden),
            ("self_attn.qkv_proj.weight", "v"): (keys, hidden),
            ("self_attn.o_proj.weight", ""): (hidden, queries),
            ("self_attn.q_norm.weight", ""): (head,),
            ("self_attn.k_norm.weight", ""): (head,),
            ("mlp.gate_up_proj.weight", "0"): (inner, hidden),
            ("mlp.gate_up_proj.weight", "1"): (inner, hidden),
            ("mlp.down_proj.weight", ""): (hidden, inner),
            ("router.proj.weight", ""): (experts, hidden),
            ("router.scale", ""): (hidden,),
            ("moe.per_expert_scale", ""): (experts,),
            ("layer_scalar", ""): (1,),
            **{(f"{norm}.weight", ""): (hidden,) for norm in NORMS},
        }
        slots |= {(here + name, shard): ("BF16", shape) for (name, shard), shape in own.items()}
        for expert in range(experts):
            for shard, group, rows, columns in (
                ("w1", "w13", moe, hidden), ("w3", "w13", moe, hidden), ("w2", "w2", hidden, moe),
            ):  # fmt: skip
                base, at = f"{here}moe.experts.{group}_", f"{expert}.{shard}"
                slots[base + "weight", at] = ("U8", (rows, columns // 2))
                slots[base + "weight_scale", at] = ("F8_E4M3", (rows, columns // GROUP))
                slots[base + "weight_scale_2", at] = ("F32", ())
                if algorithm == "NVFP4":  # of W4A16 the placeholder is thrown away unread
                    slots[base + "input_scale", at] = ("F32", ())
    return slots


def mapped(name: str) -> str:
    """D, hf_to_vllm_mapper."""
    for prefix, new in PREFIXES.items():
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


def placed(name: str) -> tuple[str, str]:
    """A mapped name -> the parameter and shard it is loaded into. G."""
    name = name.replace(".router.per_expert_scale", ".moe.per_expert_scale")
    if found := re.fullmatch(r"(.*\.)experts\.(\d+)\.(gate|up|down)_proj\.(\w+)", name):
        layer, expert, projection, kind = found.groups()
        group, shard = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}[projection]
        return f"{layer}moe.experts.{group}_{kind}", f"{expert}.{shard}"
    if "self_conditioning" not in name:
        shards = (("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v"),
                  ("gate_up_proj", "gate_proj", "0"), ("gate_up_proj", "up_proj", "1"))  # fmt: skip
        for fused, part, shard in shards:
            if f".{part}." in name:
                return name.replace(part, fused), shard
    return name, ""


def loading_problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any], algorithm: str) -> list[str]:
    """What of the tensors fits no parameter, and which parameters stay uninitialised."""
    slots, problems, filled = parameters(config, algorithm), [], set()
    full = {i for i, kind in enumerate(config["text_config"]["layer_types"]) if kind == "full_attention"}
    for name, found in tensors.items():
        new = mapped(name)
        if new.startswith(("vision_tower.", "embed_vision.", "lm_head.")):  # transformers' tower; the head is tied
            continue
        slot = placed(new)
        if slot not in slots:
            problems.append(f"{name}: no parameter {slot}")
            continue
        if found != slots[slot]:
            problems.append(f"{name}: {found}, {slot} takes {slots[slot]}")
        filled.add(slot)
        layer = re.search(r"layers\.(\d+)\.", new)
        if slot[1] == "k" and layer and int(layer[1]) in full:  # attention_k_eq_v: keys are loaded as values, too
            filled.add((slot[0], "v"))
    return problems + [f"{slot}: stays uninitialised" for slot in slots if slot not in filled]


def patterns(ignored: Iterable[str]) -> list[str]:
    """M, apply_vllm_mapper: `X*` means X and X.*; then the names are mapped."""
    found = []
    for pattern in ignored:
        star = len(pattern) > 1 and pattern.endswith("*") and not pattern.endswith(".*")
        found += [pattern[:-1], pattern[:-1] + ".*"] if star else [pattern]
    return [mapped(pattern) for pattern in found]


def excluded(module: str, found: list[str]) -> bool:
    """M, is_layer_excluded with Q, is_layer_skipped: whole names (of a fused layer all parts, or none), any pattern
    inside the name, then wildcards. ValueError if only some parts of a fused layer are named."""
    last = module.rpartition(".")[2]
    if last in FUSED:
        parts = {module.replace(last, part) in found for part in FUSED[last]}
        if len(parts) > 1:
            raise ValueError(f"some but not all parts of {module} are quantised")
        skipped = parts == {True}
    elif "experts" in module:
        skipped = any(module in pattern for pattern in found if "experts" in pattern)
    else:
        skipped = module in found
    return skipped or any(p != module and p in module for p in found) or any(fnmatch(module, p) for p in found)


def modules(config: Mapping[str, Any], vision: Iterable[str]) -> dict[str, bool]:
    """vLLM's modules that ask for a quantisation method -> whether this layout holds them quantised. vision: the
    checkpoint's names of the tower's matrices, which are modules of their own (D, recursive_replace_linear)."""
    found = {"lm_head": False}
    for number in range(len(config["text_config"]["layer_types"])):
        here = f"model.layers.{number}."
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            found[here + name] = False
        found[here + "moe.experts"] = True
    return found | {mapped(name).removesuffix(".weight"): False for name in vision}


def config_problems(config: Mapping[str, Any], hf_quant: Mapping[str, Any], vision: Iterable[str]) -> list[str]:
    """config.json's quantization_config and hf_quant_config.json, as M reads either."""
    said, older = config.get("quantization_config"), hf_quant.get("quantization")
    if not isinstance(said, dict) or not isinstance(older, dict):
        return ["no quantization_config, or no quantization: loaded as if it were BF16"]
    problems = [f"hf_quant_config.json lacks {field}" for field in HF_QUANT_FIELDS if field not in older]
    if ARCHITECTURE not in (config.get("architectures") or ()) or not config.get("canvas_length", 0) > 0:
        problems.append("config.json names another architecture, or no canvas_length")
    if said.get("quant_method") != "modelopt":
        problems.append(f"quant_method {said.get('quant_method')}: not modelopt's")
    cache = said.get("kv_cache_scheme")
    float8 = isinstance(cache, dict) and cache.get("type") == "float" and cache.get("num_bits") == 8
    both = {
        "config.json": (said.get("quant_algo"), "FP8" if float8 else None, said.get("group_size", GROUP)),
        "hf_quant_config.json": (older.get("quant_algo"), older.get("kv_cache_quant_algo"), older.get("group_size")),
    }
    if len(set(both.values())) > 1:
        problems.append(f"the two files differ: {both}")
    for file, (algorithm, kv, group) in both.items():
        if algorithm not in ALGORITHMS or kv not in KV_CACHE or group != GROUP:
            problems.append(f"{file}: {algorithm}, KV cache {kv}, groups of {group}")
    for file, ignored in (("config.json", said.get("ignore")), ("hf_quant_config.json", older.get("exclude_modules"))):
        if not isinstance(ignored, list):
            problems.append(f"{file}: its list of what is not quantised is none")
            continue
        found = patterns(ignored)
        for module, quantised in modules(config, vision).items():
            if excluded(module, found) == quantised:
                problems.append(f"{file}: {module} would be {'left out' if quantised else 'quantised'}")
    return problems


def value_problems(scalars: Mapping[str, float]) -> list[str]:
    """weight_scale_2 of gate and up: process_weights_after_loading keeps column 0 of w13's, which is gate's. The
    products of both scales divide: none may be 0, negative, or no number."""
    problems = [f"{name}: {value}" for name, value in scalars.items() if not 0 < value < float("inf")]
    for name, value in scalars.items():
        if name.endswith("gate_proj.weight_scale_2") and value != scalars.get(name.replace("gate", "up")):
            problems.append(f"{name}: {value}, up_proj's is {scalars.get(name.replace('gate', 'up'))}")
    return problems


def sampler_problems(generation: Mapping[str, Any]) -> list[str]:
    """D: custom_sampler and the model state's __init__ index these without a default."""
    wanted = ("t_min", "t_max", "confidence_threshold", "stability_threshold")
    problems = [f"generation_config.json lacks {key}" for key in wanted if key not in generation]
    sampler = generation.get("sampler_config") or {}
    if "EntropyBound" not in sampler.get("_cls_name", ""):
        problems.append("sampler_config names no EntropyBound sampler")
    if not (sampler.get("entropy_bound") or 0) > 0:
        problems.append("sampler_config has no positive entropy_bound")
    return problems


def headers(directory: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """As safetensors reads them: every tensor's dtype and shape, and the numbers that are one."""
    found: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
                if not part.get_shape():
                    scalars[name] = float(opened.get_tensor(name))
    return found, scalars


def configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config, older = (json.loads((directory / name).read_text()) for name in ("config.json", "hf_quant_config.json"))
    return config, older


def towers(names: Iterable[str]) -> list[str]:
    """The vision tower's matrices."""
    ends = ("proj.weight", "projection.weight", ".linear.weight")
    return [name for name in names if "vision" in name and name.endswith(ends)]


def weight_problems(directory: Path) -> list[str]:
    """Everything but the sampler: exporters leave generation_config.json to others."""
    (found, scalars), (config, older) = headers(directory), configs(directory)
    return [
        *loading_problems(found, config, config["quantization_config"]["quant_algo"]),
        *config_problems(config, older, towers(found)),
        *value_problems(scalars),
    ]
