"""Every tensor of the text model: its canonical (Hugging Face) name, its shape, and its name in a .gguf.

    model.decoder.layers.7.self_attn.o_proj.weight   <->   blk.7.attn_output.weight

No value differs between the two namings: nothing is permuted, no 1 is added to a norm, experts stay fused. The
encoder runs on the decoder's weights and has one tensor of its own per layer, a second layer_scalar.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

from dgq.quant.errors import InputError
from dgq.runtime.shape.config import ModelConfig

DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
EMBEDDING = DECODER + "embed_tokens.weight"

# What a .gguf generates instead of copying: full layers' RoPE angles, 1.0 for those that turn, 1e30 for the rest.
ROPE_FREQS = "rope_freqs.weight"

# Prefixes that belong to the checkpoint but not to its text model.
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

# Below model.decoder.layers.N. and blk.N.
_LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_OTHER = {
    EMBEDDING: "token_embd.weight",
    DECODER + "norm.weight": "output_norm.weight",
    DECODER + "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    DECODER + "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    DECODER + "self_conditioning.up_proj.weight": "self_cond_up.weight",
    DECODER + "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
# A word of a .gguf name -> the part of the model that the tensor belongs to.
_PARTS = {
    "_exps.weight": "routed experts",
    "attn_q.weight": "attention",
    "attn_k.weight": "attention",
    "attn_v.weight": "attention",
    "attn_output.weight": "attention",
    "token_embd": "embedding and head",
    "self_cond_gate": "self-conditioning",
    "self_cond_up": "self-conditioning",
    "self_cond_down": "self-conditioning",
    "ffn_gate_inp": "router",
    "ffn_gate.weight": "dense MLP",
    "ffn_up.weight": "dense MLP",
    "ffn_down.weight": "dense MLP",
}
_ENCODER_SCALAR = "enc_layer_output_scale.weight"
_LAYER_BACK = {gguf: hf for hf, gguf in _LAYER.items()}
_OTHER_BACK = {gguf: hf for hf, gguf in _OTHER.items()}
_OTHER_BACK["self_cond_norm.weight"] = DECODER + "self_conditioning.pre_norm.weight"  # in llama.cpp #24427


def layer_of(name: str) -> int | None:
    """The number N of the layer that a tensor belongs to: of `layers.N.` in a canonical name, of `blk.N.` in a .gguf's.

    None for a tensor outside of the layers: the embedding, the last norm, the self-conditioning.
    """
    for before, part in pairwise(name.split(".")):
        if before in ("blk", "layers") and part.isdigit():
            return int(part)
    return None


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, in words, by its canonical or its .gguf name.

    "vision", "routed experts", "attention", "embedding and head", "self-conditioning", "router", "dense MLP"; all
    others are "norms and scalars".
    """
    if name.startswith(VISION):
        return "vision"
    known = gguf_name(name) or name
    return next((part for word, part in _PARTS.items() if word in known), "norms and scalars")


def gguf_name(hf_name: str) -> str | None:
    """The .gguf name of a canonical name; None if a .gguf has no such tensor (vision)."""
    if hf_name in _OTHER:
        return _OTHER[hf_name]
    if match := re.fullmatch(re.escape(ENCODER) + r"layers\.(\d+)\.layer_scalar", hf_name):
        return f"blk.{match[1]}.{_ENCODER_SCALAR}"
    match = re.fullmatch(re.escape(DECODER) + r"layers\.(\d+)\.(.+)", hf_name)
    if match and match[2] in _LAYER:
        return f"blk.{match[1]}.{_LAYER[match[2]]}"
    return None


def hf_name(gguf: str) -> str | None:
    """The canonical name of a .gguf tensor; None if it is unknown or generated (rope_freqs.weight)."""
    if gguf in _OTHER_BACK:
        return _OTHER_BACK[gguf]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", gguf)
    if match and match[2] == _ENCODER_SCALAR:
        return f"{ENCODER}layers.{match[1]}.layer_scalar"
    if match and match[2] in _LAYER_BACK:
        return f"{DECODER}layers.{match[1]}.{_LAYER_BACK[match[2]]}"
    return None


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor the text model needs, in layer order."""
    h, ffn = config.hidden, config.intermediate
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab, h)}
    for index in range(len(config.layers)):
        layer = f"layers.{index}."
        shapes |= {DECODER + layer + name: shape for name, shape in _layer_shapes(config, index).items()}
        shapes[ENCODER + layer + "layer_scalar"] = (1,)
    condition = DECODER + "self_conditioning."
    return shapes | {
        DECODER + "norm.weight": (h,),
        condition + "pre_norm.weight": (h,),
        condition + "gate_proj.weight": (ffn, h),
        condition + "up_proj.weight": (ffn, h),
        condition + "down_proj.weight": (h, ffn),
    }


def _layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    layer, h, ffn = config.layers[index], config.hidden, config.intermediate
    queries, keys = config.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, h),
        "self_attn.k_proj.weight": (keys, h),
        "self_attn.v_proj.weight": (keys, h),
        "self_attn.o_proj.weight": (h, queries),
        "self_attn.q_norm.weight": (layer.head_dim,),
        "self_attn.k_norm.weight": (layer.head_dim,),
        "mlp.gate_proj.weight": (ffn, h),
        "mlp.up_proj.weight": (ffn, h),
        "mlp.down_proj.weight": (h, ffn),
        "router.proj.weight": (config.experts, h),
        "router.scale": (h,),
        "router.per_expert_scale": (config.experts,),
        "experts.gate_up_proj": (config.experts, 2 * config.expert_intermediate, h),
        "experts.down_proj": (config.experts, h, config.expert_intermediate),
        "layer_scalar": (1,),
    }
    shapes |= {name: (h,) for name in _LAYER if "layernorm" in name}
    if not layer.has_v_proj:
        del shapes["self_attn.v_proj.weight"]
    return shapes


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    source: str,
    *,
    shown: Callable[[str], str] = str,
    file: Callable[[str], str] | None = None,
) -> None:
    """Hold tensors (canonical name -> shape) against the expected ones: every one there, no other, right shapes.

    InputError names the first offender and how many there are. shown turns a canonical name into the file's own;
    file says in which of source's files a tensor lies, if there are several.
    """
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    if missing and extra:
        raise InputError(
            f"{source}: tensor {shown(missing[0])} is missing and {shown(extra[0])} is unknown; renamed, or another "
            f"model ({len(missing)} missing, {len(extra)} unknown)"
        )
    if missing:
        first, count = missing[0], f"{len(missing)} of {len(expected)}"
        raise InputError(f"{source}: tensor {shown(first)} is missing ({count}; its shape is {list(expected[first])})")
    place = file or (lambda name: source)
    if extra:
        raise InputError(f"{place(extra[0])}: tensor {shown(extra[0])} is not part of the model ({len(extra)} such)")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(
                f"{place(name)}: tensor {shown(name)} has shape {list(shapes[name])}, the config says {list(shape)}"
            )
