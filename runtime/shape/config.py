"""The model's shape and the sampler's settings, read raw from config.json, generation_config.json or GGUF metadata.

Our own reading, because two config styles are in the field and a library that knows one dies on the other:

    released checkpoint        "global_head_dim": 512, "num_global_key_value_heads": 2
    saved by transformers 5.17+    "per_layer_config": {"05": {"head_dim": 512, "num_key_value_heads": 2}, "11": …}

Both become one tuple of `LayerConfig`, one entry a layer. What the runtime can't compute exactly (another
activation, biases, untied embeddings, an unknown RoPE) is refused here, by file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.shape.fields import Fields

MODEL_TYPE = "diffusion_gemma"
EARLY_TYPE = "diffusion_gemma4"  # before the release
ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"
EARLY_ARCHITECTURES = (
    "DiffusionGemma4ModelForBlockDiffusion",
    "DiffusionGemma4ForBlockDiffusion",
    "DiffusionGemmaForConditionalGeneration",
)
GGUF_ARCH = "diffusion-gemma"


@dataclass(frozen=True)
class LayerConfig:
    """One layer. A full layer has no v_proj: its values are the k_proj output before norm and RoPE."""

    is_sliding: bool
    head_dim: int
    kv_heads: int

    @property
    def has_v_proj(self) -> bool:
        return self.is_sliding


@dataclass(frozen=True)
class ModelConfig:
    """The text model. Sizes in elements, windows and lengths in tokens."""

    hidden: int
    intermediate: int  # of the dense MLP
    expert_intermediate: int
    experts: int
    top_k: int
    heads: int
    layers: tuple[LayerConfig, ...]
    window: int  # a sliding query sees `window` tokens, itself included
    vocab: int
    canvas: int  # tokens denoised together, one block
    context: int  # longest prompt + answer
    softcap: float
    norm_eps: float
    rope_theta: float  # full layers
    rope_theta_sliding: float
    rope_partial: float  # share of a full head's dimensions that RoPE turns
    pad_id: int
    eos_ids: tuple[int, ...]

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read config.json. InputError names the file and the key."""
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str) -> ModelConfig:
        """Parse a config.json that was already read; source is its name in error messages."""
        top = Fields(raw, source)
        found = top.get("model_type", str, "")
        if found not in (MODEL_TYPE, EARLY_TYPE):
            raise InputError(f"{source}: model_type is {found!r}, dgq knows {MODEL_TYPE!r}")
        text = top.section("text_config")
        _refuse_unsupported(top, text)
        rope = text.section("rope_parameters", {"full_attention": {}, "sliding_attention": {}})
        full, sliding = rope.section("full_attention"), rope.section("sliding_attention")
        full.expect("rope_type", "proportional", "default")
        full.expect("factor", 1.0)
        sliding.expect("rope_type", "default")
        sliding.expect("partial_rotary_factor", 1.0)
        plain = full.get("rope_type", str, "proportional") == "default"
        if plain:
            full.expect("partial_rotary_factor", 1.0)
        config = cls(
            hidden=text.count("hidden_size"),
            intermediate=text.count("intermediate_size"),
            expert_intermediate=text.count("moe_intermediate_size"),
            experts=text.count("num_experts"),
            top_k=text.count("top_k_experts"),
            heads=text.count("num_attention_heads"),
            layers=_layers_from_json(text),
            window=text.count("sliding_window"),
            vocab=text.count("vocab_size"),
            canvas=top.count("canvas_length", 256),
            context=text.count("max_position_embeddings", 131_072),
            softcap=text.positive("final_logit_softcapping", 30.0),
            norm_eps=text.positive("rms_norm_eps", 1e-6),
            rope_theta=full.positive("rope_theta", 1e6),
            rope_theta_sliding=sliding.positive("rope_theta", 1e4),
            rope_partial=full.positive("partial_rotary_factor", 1.0 if plain else 0.25),
            pad_id=text.get("pad_token_id", int, 0),
            eos_ids=top.ids("eos_token_id") or text.ids("eos_token_id") or (1,),
        )
        return _checked(config, source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> ModelConfig:
        """Parse the metadata of a bare .gguf (layout of llama.cpp #24423); source names the file in errors."""
        top = Fields(metadata, source)
        found = top.get("general.architecture", str, "")
        if found != GGUF_ARCH:
            raise InputError(f"{source}: general.architecture is {found!r}, dgq knows {GGUF_ARCH!r}")
        arch = Fields(metadata, source, prefix=f"{GGUF_ARCH}.")
        for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input"):
            arch.expect(key, 0)
        config = cls(
            hidden=arch.count("embedding_length"),
            intermediate=arch.count("feed_forward_length"),
            expert_intermediate=arch.count("expert_feed_forward_length"),
            experts=arch.count("expert_count"),
            top_k=arch.count("expert_used_count"),
            heads=arch.count("attention.head_count"),
            layers=_layers_from_gguf(arch),
            window=arch.count("attention.sliding_window"),
            vocab=len(top.get("tokenizer.ggml.tokens", list)),
            canvas=top.count("diffusion.canvas_length"),
            context=arch.count("context_length"),
            softcap=arch.positive("final_logit_softcapping", 30.0),
            norm_eps=arch.positive("attention.layer_norm_rms_epsilon"),
            rope_theta=arch.positive("rope.freq_base"),
            rope_theta_sliding=arch.positive("rope.freq_base_swa"),
            rope_partial=0.25,  # not in the metadata but in rope_freqs.weight, which open_artifact() checks
            pad_id=top.get("tokenizer.ggml.padding_token_id", int, 0),
            eos_ids=top.ids("tokenizer.ggml.eos_token_id") or (1,),
        )
        return _checked(config, source)

    @property
    def rope_angles(self) -> int:
        """How many of a full head's head_dim/2 angles turn with the position; the rest stay at zero."""
        full = next(layer for layer in self.layers if not layer.is_sliding)
        return int(self.rope_partial * full.head_dim // 2)


def released(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the names of the release, by which transformers and vLLM know the model, for those of builds
    before it, which llama.cpp's converter, vLLM and unsloth list. What is none of them stays."""
    config = dict(raw)
    if config.get("model_type") == EARLY_TYPE:
        config["model_type"] = MODEL_TYPE
    if isinstance(names := config.get("architectures"), list):
        config["architectures"] = [ARCHITECTURE if name in EARLY_ARCHITECTURES else name for name in names]
    for part, kind in (("text_config", MODEL_TYPE + "_text"), ("vision_config", "gemma4_vision")):
        inner = config.get(part)
        if isinstance(inner, dict) and str(inner.get("model_type")).startswith(EARLY_TYPE):
            config[part] = {**inner, "model_type": kind}
    return config


def early_names(raw: Mapping[str, Any]) -> list[str]:
    """A notice if a config.json has names from before the release."""
    if released(raw) == raw:
        return []
    return [f"config.json has names from before the release ({EARLY_TYPE} or its like): read as {MODEL_TYPE}"]


def _refuse_unsupported(top: Fields, text: Fields) -> None:
    text.expect("hidden_activation", "gelu_pytorch_tanh")
    text.expect("attention_bias", False)
    text.expect("use_bidirectional_attention", None, False, "vision")  # about images alone: Artifact.vision
    top.expect("tie_word_embeddings", True)
    text.expect("tie_word_embeddings", True)


def _layers_from_json(text: Fields) -> tuple[LayerConfig, ...]:
    n = text.count("num_hidden_layers")
    if n > 1024:  # a bound, so that a typo ends in this line and not in a full memory
        raise InputError(f"{text.source}: num_hidden_layers is {n}")
    kinds = text.get("layer_types", list, ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(n)])
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if len(kinds) != n or unknown:
        what = f"knows no {unknown[0]!r}" if unknown else f"has {len(kinds)} entries for num_hidden_layers {n}"
        raise InputError(f"{text.source}: layer_types {what}")
    head_dim, kv_heads = text.count("head_dim"), text.count("num_key_value_heads")
    per_layer = text.section("per_layer_config", {})
    if not per_layer.raw:
        # transformers' own defaults for a config without either style: 512, and the sliding layers' kv heads
        shape = text.count("global_head_dim", 512), text.count("num_global_key_value_heads", kv_heads)
        return tuple(
            LayerConfig(True, head_dim, kv_heads) if kind == "sliding_attention" else LayerConfig(False, *shape)
            for kind in kinds
        )
    keys = _layer_keys(per_layer, n)
    layers = []
    for i, kind in enumerate(kinds):
        entry = per_layer.section(keys.get(i, str(i)), {})
        for key in entry.raw:
            if key not in ("head_dim", "num_key_value_heads"):
                entry.expect(key, text.raw.get(key))
        shape = entry.count("head_dim", head_dim), entry.count("num_key_value_heads", kv_heads)
        layers.append(LayerConfig(kind == "sliding_attention", *shape))
    return tuple(layers)


def _layer_keys(per_layer: Fields, layers: int) -> dict[int, str]:
    """Layer -> its key in per_layer_config. transformers pads the numbers with zeros to one width: "05" among 30
    layers, "5" among six."""
    keys: dict[int, str] = {}
    for key in per_layer.raw:
        if not (key.isascii() and key.isdecimal() and len(key) < 8 and int(key) < layers):
            raise InputError(f"{per_layer.source}: per_layer_config has an entry {key!r} for {layers} layers")
        if int(key) in keys:
            both = f"{keys[int(key)]!r} and {key!r}"
            raise InputError(f"{per_layer.source}: per_layer_config has two entries for layer {int(key)}, {both}")
        keys[int(key)] = key
    return keys


def _layers_from_gguf(arch: Fields) -> tuple[LayerConfig, ...]:
    n = arch.count("block_count")
    sliding, kv_heads = arch.get("attention.sliding_window_pattern", list), arch.get("attention.head_count_kv", list)
    for key, values in (("sliding_window_pattern", sliding), ("head_count_kv", kv_heads)):
        if len(values) != n:
            raise InputError(f"{arch.source}: attention.{key} has {len(values)} entries for block_count {n}")
        if not all(isinstance(value, int) for value in values):  # bool is an int
            raise InputError(f"{arch.source}: attention.{key} holds something other than numbers")
    head_dim, head_dim_sliding = arch.count("attention.key_length"), arch.count("attention.key_length_swa")
    for key, size in (
        ("attention.value_length", head_dim), ("attention.value_length_swa", head_dim_sliding),
        ("rope.dimension_count", head_dim), ("rope.dimension_count_swa", head_dim_sliding),
    ):  # fmt: skip
        arch.expect(key, size)
    return tuple(
        LayerConfig(bool(s), head_dim_sliding if s else head_dim, kv) for s, kv in zip(sliding, kv_heads, strict=True)
    )


def _checked(config: ModelConfig, source: str) -> ModelConfig:
    """Values that parse but can't be a model."""
    faults = [
        (config.top_k > config.experts, f"top_k_experts {config.top_k} exceeds num_experts {config.experts}"),
        (config.window < 2, f"sliding_window is {config.window}, the least is 2"),
        (config.layers[-1].is_sliding, "layer_types: the last layer must be full_attention"),
        (not 0 < config.rope_partial <= 1, f"partial_rotary_factor is {config.rope_partial}, not in (0, 1]"),
        (not 0 <= config.pad_id < config.vocab, f"pad_token_id {config.pad_id} is outside the vocabulary"),
    ]
    for i, layer in enumerate(config.layers):
        bad = layer.kv_heads < 1 or config.heads % layer.kv_heads != 0
        faults.append((bad, f"layer {i}: {config.heads} heads do not divide over {layer.kv_heads} key-value heads"))
        faults.append((layer.head_dim % 2 == 1, f"layer {i}: head_dim {layer.head_dim} is odd, RoPE turns pairs"))
        first = next(other for other in config.layers if other.is_sliding == layer.is_sliding)
        kind = "sliding" if layer.is_sliding else "full"
        faults.append((layer.head_dim != first.head_dim, f"layer {i}: {kind} layers of different head_dim"))
    for wrong, text in faults:
        if wrong:
            raise InputError(f"{source}: {text}")
    return config
