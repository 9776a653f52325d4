"""The tensors of the vision part, from config.json's vision_config. They are checked like the text model's, so that no
unknown tensor hides behind their prefix. A .gguf of this architecture has no place for them: they go into a file of
their own (files/mmproj.py)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dgq.quant.errors import InputError

TOWER = "model.encoder.vision_tower."
EMBED = "model.encoder.embed_vision."
MAX_LAYERS = 1024
IMAGE_ATTENTION = "dgq.use_bidirectional_attention"  # of a .gguf: config.json's value as JSON, where not "vision"
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # of a clipped linear


def _count(vision: dict[str, Any], source: str, key: str) -> int:
    value = vision.get(key)
    if type(value) is not int or not 0 < value < 2**24:
        raise InputError(f"{source}: vision_config.{key} is {value!r}, not a positive integer")
    return value


def expected_vision(raw: dict[str, Any], text_hidden: int, source: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every vision tensor; {} for a config.json, `raw`, without vision_config. InputError
    naming `source` and the key for settings that cannot be a vision tower's."""
    vision = raw.get("vision_config")
    if vision is None:
        return {}
    if not isinstance(vision, dict):
        raise InputError(f"{source}: vision_config is a {type(vision).__name__}, not an object")
    count = partial(_count, vision, source)
    h, ffn, head = count("hidden_size"), count("intermediate_size"), count("head_dim")
    queries, keys = count("num_attention_heads") * head, count("num_key_value_heads") * head
    shapes: dict[str, tuple[int, ...]] = {
        EMBED + "embedding_projection.weight": (text_hidden, h),
        TOWER + "patch_embedder.input_proj.weight": (h, 3 * count("patch_size") ** 2),
        TOWER + "patch_embedder.position_embedding_table": (2, count("position_embedding_size"), h),
    }
    if vision.get("standardize"):
        shapes |= {TOWER + "std_bias": (h,), TOWER + "std_scale": (h,)}
    layers = count("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise InputError(f"{source}: vision_config.num_hidden_layers is {layers}, expected {MAX_LAYERS} at most")
    linears = {
        "self_attn.q_proj": (queries, h),
        "self_attn.k_proj": (keys, h),
        "self_attn.v_proj": (keys, h),
        "self_attn.o_proj": (h, queries),
        "mlp.gate_proj": (ffn, h),
        "mlp.up_proj": (ffn, h),
        "mlp.down_proj": (h, ffn),
    }
    bounds = BOUNDS if vision.get("use_clipped_linears") else ()
    for index in range(layers):
        layer = f"{TOWER}encoder.layers.{index}."
        shapes |= {f"{layer}{name}.linear.weight": shape for name, shape in linears.items()}
        shapes |= {f"{layer}{name}.weight": (h,) for name in NORMS}
        shapes |= {f"{layer}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}{name}.{bound}": () for name in linears for bound in bounds}
    return shapes


def causal_images(raw: Mapping[str, Any], source: str) -> bool:
    """Whether the tokens of an image see only what is before them, as text does: text_config's
    use_bidirectional_attention is null or absent in the config.json `raw`, and not "vision". InputError naming `source`
    for false, which says nothing of images and which transformers refuses."""
    attention = raw.get("text_config", {}).get("use_bidirectional_attention")
    if attention is False:
        raise InputError(
            f"{source}: text_config.use_bidirectional_attention is false, which says nothing of images; set"
            ' it to "vision" if they were trained as the released model\'s, or null if causally (text works as it is)'
        )
    return attention is None


def gguf_attention(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What causal_images() asks of a config.json, from a bare .gguf's metadata: without the key its images are the
    released model's."""
    values = {"null": None, "false": False}
    attention = values.get(str(metadata.get(IMAGE_ATTENTION)), "vision")
    return {"text_config": {"use_bidirectional_attention": attention}}
