"""What of a checkpoint goes into the mmproj file beside a .gguf: its vision tower, in the types that llama.cpp's
converter gives a BF16 one.

    matrices                                          BF16, the checkpoint's own bytes
    vectors, bounds, patch and position embeddings    F32

The metadata says what `clip` in llama.cpp asks for. What it has no key for (runtime/files/mmproj.py) is checked, and
refused where the checkpoint has it otherwise: a file that reads as another tower is worse than none.
"""

from __future__ import annotations

from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import KV
from dgq.quant.files.hf_dir import read_json
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme
from dgq.runtime.files.images import IMAGE_TOKENS, SETTINGS
from dgq.runtime.files.mmproj import KEYS, POOLING, PROJECTOR, SOFT_TOKENS, THETA, mmproj_name, stored_shape
from dgq.runtime.shape.fields import Fields
from dgq.runtime.shape.names import layer_of

BF16_FILE = 32  # general.file_type, LLAMA_FTYPE_MOSTLY_BF16
ACTIVATION = "gelu_pytorch_tanh"
IMAGE_SIZE = 224  # llama.cpp wants the key and does not use it: sizes vary


def planned(source: Source) -> dict[str, tuple[str, tuple[int, ...], Scheme]]:
    """Name in the file -> canonical name, shape and scheme; {} without a vision tower. InputError for one that such a
    file cannot describe."""
    if not source.vision:
        return {}
    _check(source)
    tensors = {}
    for name in sorted(source.vision, key=_order):
        stored, shape = mmproj_name(name), stored_shape(name, source.vision[name].shape)
        matrix = len(shape) == 2
        tensors[stored] = (name, shape, SCHEMES["bf16" if matrix else "f32"])
    return tensors


def _order(name: str) -> tuple[int, str]:
    """As the text file's: outside the layers alphabetically, then layer by layer."""
    stored = mmproj_name(name)
    layer = layer_of(stored)
    return (-1 if layer is None else layer), stored


def metadata(source: Source, version: str) -> dict[str, KV]:
    """Every key-value but general.architecture."""
    vision, settings = described(source), _processor(source)
    pooling = vision.count("pooling_kernel_size", POOLING)
    pixels = soft_tokens(source) * (vision.count("patch_size") * pooling) ** 2  # a soft token is as wide as its patches
    if pixels >= 1 << 32:
        raise InputError(f"{vision.source}: vision_config.pooling_kernel_size {pooling} makes images too large")
    keys = {
        "general.type": KV("mmproj", "string"),
        "general.name": KV(source.where.name, "string"),
        "general.file_type": KV(BF16_FILE, "uint32"),
        "general.quantization_version": KV(2, "uint32"),
        "clip.has_vision_encoder": KV(True, "bool"),
        "clip.use_gelu": KV(True, "bool"),
        KEYS + "projector_type": KV(PROJECTOR, "string"),
        KEYS + "projection_dim": KV(source.config.hidden, "uint32"),
        KEYS + "image_size": KV(IMAGE_SIZE, "uint32"),
        KEYS + "image_max_pixels": KV(pixels, "uint32"),
        KEYS + "patch_size": KV(vision.count("patch_size"), "uint32"),
        KEYS + "embedding_length": KV(vision.count("hidden_size"), "uint32"),
        KEYS + "feed_forward_length": KV(vision.count("intermediate_size"), "uint32"),
        KEYS + "block_count": KV(vision.count("num_hidden_layers"), "uint32"),
        KEYS + "attention.head_count": KV(vision.count("num_attention_heads"), "uint32"),
        KEYS + "attention.layer_norm_epsilon": KV(vision.positive("rms_norm_eps", 1e-6), "float32"),
        KEYS + "projector.scale_factor": KV(pooling, "uint32"),
        "dgq.version": KV(version, "string"),
    }
    for key, default in (("image_mean", 0.0), ("image_std", 1.0)):
        values = settings.get(key, list, [default] * 3) if settings.get("do_normalize", bool, False) else [default] * 3
        if [type(value) for value in values] != [float] * 3:
            raise InputError(f"{settings.source}: {key} is {values}, expected three numbers")
        keys[KEYS + key] = KV(values, "[float32]")
    return keys


def soft_tokens(source: Source) -> int:
    """Most that an image becomes. InputError for a number that the image processor does not know."""
    settings = _processor(source)
    if (most := settings.count("max_soft_tokens", SOFT_TOKENS)) not in IMAGE_TOKENS:
        raise InputError(f"{settings.source}: max_soft_tokens is {most}, the image processor knows {IMAGE_TOKENS}")
    return most


def described(source: Source) -> Fields:
    """Its vision_config."""
    path = source.path / "config.json"
    return Fields(read_json(path), str(path)).section("vision_config")


def _processor(source: Source) -> Fields:
    """The image processor's settings, none if the checkpoint has none."""
    for name in SETTINGS:
        if (path := source.path / name).is_file():
            config = read_json(path)
            inner = config.get("image_processor")
            return Fields(inner if isinstance(inner, dict) else config, str(path))
    return Fields({}, str(source.path))


def _check(source: Source) -> None:
    vision = described(source)
    heads = vision.count("num_attention_heads")
    rope = vision.section("rope_parameters", {})
    fixed_values = {
        "num_key_value_heads": (vision.count("num_key_value_heads"), heads),
        "head_dim": (vision.count("head_dim") * heads, vision.count("hidden_size")),
        "hidden_activation": (vision.get("hidden_activation", str, ACTIVATION), ACTIVATION),
        "attention_bias": (vision.get("attention_bias", bool, False), False),
        "rope_parameters.rope_theta": (rope.positive("rope_theta", THETA), THETA),
    }
    for key, (found, fixed) in fixed_values.items():
        if found != fixed:
            raise InputError(
                f"{vision.source}: vision_config.{key} is not what a GGUF vision tower (mmproj, Gemma 4) can say;"
                " convert a copy without the vision tower, or to another format"
            )
