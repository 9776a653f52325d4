"""The key-values of a `diffusion-gemma` GGUF: model shape, sampler settings, tokenizer.

The layout is that of llama.cpp #24423, which the published files follow. Everything a loader needs travels in the
file itself, so that a bare .gguf can be opened without its directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dgq.convert.plans.formats import rope_freqs_length
from dgq.convert.plans.plan import Plan
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import KV
from dgq.quant.files.hf_dir import BOM, read_json
from dgq.quant.files.imatrix import Imatrix
from dgq.runtime.files.reply import MARKERS
from dgq.runtime.files.tokenizer import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from dgq.runtime.shape.config import GGUF_ARCH
from dgq.runtime.shape.vision import IMAGE_ATTENTION


def metadata(plan: Plan, version: str, imatrix: Imatrix | None) -> dict[str, KV]:
    """Every key-value but general.architecture, in llama.cpp's order."""
    source = plan.source
    keys = {"general.type": KV("model", "string"), "general.name": KV(source.where.name, "string")}
    keys["general.size_label"] = KV(_size_label(plan), "string")
    if source.where.repo:
        keys["general.source.huggingface.repository"] = KV(source.where.repo, "string")
    keys |= {f"{GGUF_ARCH}.{key}": kv for key, kv in _architecture(source).items()}
    keys |= _sampler(source)
    keys |= _tokenizer(source)
    keys["general.quantization_version"] = KV(2, "uint32")
    keys["general.file_type"] = KV(plan.recipe.file_type, "uint32")
    keys["dgq.version"] = KV(version, "string")
    attention = read_json(source.path / "config.json")["text_config"].get("use_bidirectional_attention")
    if attention != "vision":  # as in the released model, whose files have no key for it
        keys[IMAGE_ATTENTION] = KV(json.dumps(attention), "string")
    if imatrix is not None:
        keys["quantize.imatrix.file"] = KV(Path(imatrix.file).name, "string")  # llama-quantize: the path as given
        if imatrix.datasets:
            keys["quantize.imatrix.dataset"] = KV(imatrix.datasets[0], "string")
        keys["quantize.imatrix.entries_count"] = KV(len(imatrix.weights), "uint32")
        if imatrix.chunks:
            keys["quantize.imatrix.chunks_count"] = KV(imatrix.chunks, "uint32")
    return keys


def _size_label(plan: Plan) -> str:
    import gguf

    experts = plan.source.config.experts
    fused = [tensor for tensor in plan.text if "_exps." in tensor.name and len(tensor.shape) == 3]
    total, routed = sum(tensor.numel for tensor in plan.text), sum(tensor.numel for tensor in fused)
    return str(gguf.size_label(total, total - routed, routed // experts, experts))


def _architecture(source: Source) -> dict[str, KV]:
    config = source.config
    full = next(layer for layer in config.layers if not layer.is_sliding)
    sliding = next((layer for layer in config.layers if layer.is_sliding), full)
    return {
        "block_count": KV(len(config.layers), "uint32"),
        "context_length": KV(config.context, "uint32"),
        "embedding_length": KV(config.hidden, "uint32"),
        "feed_forward_length": KV(config.intermediate, "uint32"),
        "attention.head_count": KV(config.heads, "uint32"),
        "attention.head_count_kv": KV([layer.kv_heads for layer in config.layers], "[int32]"),
        "rope.freq_base": KV(config.rope_theta, "float32"),
        "rope.freq_base_swa": KV(config.rope_theta_sliding, "float32"),
        "attention.layer_norm_rms_epsilon": KV(config.norm_eps, "float32"),
        "expert_count": KV(config.experts, "uint32"),
        "expert_used_count": KV(config.top_k, "uint32"),
        "attention.key_length": KV(full.head_dim, "uint32"),
        "attention.value_length": KV(full.head_dim, "uint32"),
        "final_logit_softcapping": KV(config.softcap, "float32"),
        "attention.sliding_window": KV(config.window, "uint32"),
        "attention.shared_kv_layers": KV(0, "uint32"),
        "embedding_length_per_layer_input": KV(0, "uint32"),
        "attention.sliding_window_pattern": KV([layer.is_sliding for layer in config.layers], "[bool]"),
        "attention.key_length_swa": KV(sliding.head_dim, "uint32"),
        "attention.value_length_swa": KV(sliding.head_dim, "uint32"),
        "expert_feed_forward_length": KV(config.expert_intermediate, "uint32"),
        "rope.dimension_count": KV(full.head_dim, "uint32"),
        "rope.dimension_count_swa": KV(sliding.head_dim, "uint32"),
        "attention.causal": KV(False, "bool"),
    }


def rope_freqs(source: Source) -> list[float]:
    """rope_freqs.weight: 1.0 for the angles of a full layer's head that turn, 1e30 (never) for the rest."""
    turning = source.config.rope_angles
    return [1.0] * turning + [1e30] * (rope_freqs_length(source.config) - turning)


def _sampler(source: Source) -> dict[str, KV]:
    """diffusion.* keys; each eb_* only if generation_config.json says it, as the published files do."""
    keys = {"diffusion.canvas_length": KV(source.config.canvas, "uint32")}
    path = source.path / "generation_config.json"
    generation: dict[str, Any] = read_json(path) if path.is_file() else {}
    sampler = source.generation.sampler
    settings = (
        ("max_denoising_steps", "eb_max_steps", KV(sampler.steps, "uint32")),
        ("t_min", "eb_t_min", KV(sampler.t_min, "float32")),
        ("t_max", "eb_t_max", KV(sampler.t_max, "float32")),
        ("sampler_config", "eb_entropy_bound", KV(sampler.entropy_bound, "float32")),
        ("stability_threshold", "eb_stability_threshold", KV(sampler.stability, "uint32")),
        ("confidence_threshold", "eb_confidence_threshold", KV(sampler.confidence, "float32")),
    )
    return keys | {f"diffusion.{key}": kv for json_key, key, kv in settings if generation.get(json_key) is not None}


def _tokenizer(source: Source) -> dict[str, KV]:
    import gguf

    path = source.path / "tokenizer.json"
    raw = read_json(path)
    read_json(source.path / "tokenizer_config.json")  # without it, nothing says which tokens are control tokens
    tokens = _tokens(raw, source.config.vocab, str(path))
    with _readable(source.path) as folder:
        control = _all_special_ids(source, folder)
        try:
            special = gguf.SpecialVocab(folder, load_merges=True)
        except Exception as error:  # whatever a broken tokenizer leads the package into
            raise _unreadable(source, error) from None
    keys = {
        "tokenizer.ggml.model": KV("gemma4", "string"),
        "tokenizer.ggml.tokens": KV([token or f"[PAD{i}]" for i, token in enumerate(tokens)], "[string]"),
        "tokenizer.ggml.scores": KV([-1000.0] * len(tokens), "[float32]"),
        "tokenizer.ggml.token_type": KV([_token_type(i, token, control) for i, token in enumerate(tokens)], "[int32]"),
        "tokenizer.ggml.merges": KV(special.merges, "[string]"),
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
    ids = {names[kind]: token for kind, token in special.special_token_ids.items() if kind in names}
    keys |= {f"tokenizer.ggml.{kind}_token_id": KV(token, "uint32") for kind, token in ids.items()}
    if isinstance(special.chat_template, str):
        keys["tokenizer.chat_template"] = KV(special.chat_template, "string")
    keys["tokenizer.ggml.add_space_prefix"] = KV(False, "bool")
    keys["tokenizer.ggml.add_bos_token"] = KV(True, "bool")
    return keys


def _tokens(raw: dict[str, Any], vocab: int, path: str) -> list[str | None]:
    """id -> token, None where tokenizer.json has no token of that id."""
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: not a BPE tokenizer as Gemma's is; GGUF needs that kind")
    try:
        added = {str(token["content"]): token["id"] for token in raw.get("added_tokens") or ()}
    except (TypeError, KeyError):
        raise InputError(f"{path}: added_tokens is no list of objects with content and id") from None
    tokens: list[str | None] = [None] * vocab
    for token, number in {**model["vocab"], **added}.items():
        if type(number) is not int or not 0 <= number < vocab:
            raise InputError(f"{path}: token {token!r} has id {number}, outside the vocabulary of {vocab}")
        tokens[number] = token
    return tokens


def _token_type(number: int, token: str | None, control: frozenset[int]) -> int:
    """llama.cpp's order (Gemma4Model.set_vocab): markers are visible even where the tokenizer names them special."""
    if token is None:
        return UNUSED
    if token in MARKERS:
        return USER_DEFINED
    if number in control:
        return CONTROL
    return BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """The folder, if both libraries read its small files; else a copy of these without what they stumble over: byte
    order marks, and a false use_bidirectional_attention, which transformers knows no model by."""
    files = [file for pattern in ("*.json", "*.jinja", "tokenizer.model") for file in path.glob(pattern)]
    config = read_json(path / "config.json")
    odd = config["text_config"].get("use_bidirectional_attention") is False
    if not odd and not any(file.suffix == ".json" and file.read_bytes().startswith(BOM) for file in files):
        yield path
        return
    with TemporaryDirectory() as name:
        copy = Path(name)
        for file in files:
            (copy / file.name).write_bytes(file.read_bytes().removeprefix(BOM))
        if odd:
            text = config["text_config"] | {"use_bidirectional_attention": None}
            (copy / "config.json").write_text(json.dumps(config | {"text_config": text}), "utf-8")
        yield copy


def _all_special_ids(source: Source, folder: Path) -> frozenset[int]:
    """transformers' `all_special_ids`, which is how llama.cpp's converter tells control tokens."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return frozenset(AutoTokenizer.from_pretrained(str(folder), local_files_only=True).all_special_ids)
    except Exception as error:  # whatever a broken tokenizer leads the library into
        raise _unreadable(source, error) from None


def _unreadable(source: Source, error: Exception) -> InputError:
    return InputError(f"{source.path}: tokenizer files not loadable ({type(error).__name__}: {error})")
