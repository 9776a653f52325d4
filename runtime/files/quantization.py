"""The quantisation that a safetensors directory declares, and the layout that the declaration means.

    config.json "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4" | "W4A16_NVFP4" | "FP8", …}
                                       {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
                                        "quantized_layers": {module: {"quant_algo": …}}, …}
                                       {"quant_method": "bitsandbytes", "load_in_4bit": true, …}
                                       {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", …}
                                       {"quant_method": "dgq", "q8_0": […], …}
    hf_quant_config.json: {"quantization": {"quant_algo": …}}          modelopt's older place; alone, or in agreement

Every other declaration is refused by name: a directory in a layout that dgq does not read must never be opened as if it
were in another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, read_json
from dgq.quant.formats.bnb import BitsAndBytes
from dgq.quant.formats.compressed_tensors import METHOD, CompressedTensors, layout_of, refused
from dgq.quant.formats.fp8_groups import Mixed
from dgq.quant.formats.modelopt import HF_QUANT_CONFIG, W4A4, W4A16, Modelopt
from dgq.quant.formats.nvfp4_modules import NVFP4Modules
from dgq.quant.formats.own_layout import METHOD as OWN
from dgq.quant.formats.own_layout import OwnLayout
from dgq.quant.formats.own_layout import layout_of as own_layout_of
from dgq.quant.schemes.nf4 import BLOCK
from dgq.quant.schemes.nvfp4 import BLOCK as NVFP4_BLOCK
from dgq.quant.types import Spec
from dgq.runtime.files.canonical import stored_tensors

OPENS = "dgq opens modelopt's and compressed-tensors' NVFP4 and FP8, bitsandbytes' 4-bit and its own"
MLX = "quantization"  # its key in config.json
DECLARATIONS = ("quantization_config", MLX)
# Last words of the names of what stands beside quantised values; router.scale and per_expert_scale are weights.
COMPANIONS = (
    "weight_scale", "weight_scale_2", "input_scale", "_global_scale", "_amax", "zero_point", ".scales", ".biases",
    "weight_packed", "absmax", "quant_map", "SCB", "qweight", "qzeros", "g_idx",
)  # fmt: skip
_EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.")
_SHOWN = 8  # places in one remark
_SEVERAL, _EIGHTS = "MIXED_PRECISION", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")  # modelopt's quant_algos
_BITSANDBYTES: dict[str, tuple[Any, ...]] = {  # a key's values that dgq reads, None: the key may be absent
    "load_in_8bit": (False, None),
    "load_in_4bit": (True,),
    "bnb_4bit_quant_type": ("nf4", "fp4", None),
    "bnb_4bit_blocksize": (BLOCK, None),
    "bnb_4bit_quant_storage": ("uint8", None),
    "bnb_4bit_use_double_quant": (True, False, None),
}


@dataclass(frozen=True)
class Quantization:
    """A directory's declaration. method: quant_method, or "modelopt" if only hf_quant_config.json declares it. raw: the
    declaring object; source: the file that holds it."""

    method: str
    raw: Mapping[str, Any]
    source: Path

    @property
    def kind(self) -> str:
        """ "nvfp4" or "bnb4": the format's name; "fp8": nothing but that."""
        layout = self.layout()
        if isinstance(layout, Mixed) and layout.declared.get(""):
            return "fp8"
        return "bnb4" if isinstance(layout, BitsAndBytes) else "nvfp4"

    def layout(self) -> Modelopt | BitsAndBytes | CompressedTensors | OwnLayout | Mixed:
        """InputError, naming the method, for layouts that dgq does not read."""
        if self.method == "modelopt":
            return self._modelopt()
        if self.method == "bitsandbytes":
            return self._bitsandbytes()
        if self.method == METHOD:
            if what := refused(self.raw):
                raise InputError(f"{self.source}: compressed-tensors with {what}, which dgq does not open; {OPENS}")
            base, inputs, eights = layout_of(self.raw)
            eight_bits = {} if inputs or not eights else {"": True}
            return Mixed(base, len(inputs) > 1, eight_bits) if eights or len(inputs) > 1 else base
        if self.method == OWN:
            return own_layout_of(self.raw, str(self.source))
        raise InputError(f"{self.source}: quantised as {self.method[:40]!r}, which dgq does not open; {OPENS}")

    def _modelopt(self) -> Modelopt | Mixed:
        algo = self.raw.get("quant_algo")
        layers = self.raw.get("quantized_layers") if algo == _SEVERAL else {"": self.raw}
        if not isinstance(layers, dict) or not layers or not all(isinstance(one, dict) for one in layers.values()):
            raise InputError(f"{self.source}: {algo} without quantized_layers, an object; fetch the file again")
        for name, layer in layers.items():
            if (found := layer.get("quant_algo")) not in (W4A4, W4A16, *_EIGHTS):
                of = f" of {name[:80]}" if name else ""
                raise InputError(f"{self.source}: modelopt's quant_algo {str(found)[:40]!r}{of} is not opened; {OPENS}")
        _check_group_size(self.raw, self.source)
        _check_group_size({"config_groups": layers}, self.source)
        algos = {layer["quant_algo"] for layer in layers.values()}
        base = Modelopt(activations=W4A4 in algos)
        eight_bits = {name: layer["quant_algo"] in _EIGHTS for name, layer in layers.items()}
        eight_bits |= {"": True} if all(eight_bits.values()) else {}
        return base if algos in ({W4A4}, {W4A16}) else Mixed(base, {W4A4, W4A16} <= algos, eight_bits)

    def _bitsandbytes(self) -> BitsAndBytes:
        for key, allowed in _BITSANDBYTES.items():
            value = self.raw.get(key)
            if value not in allowed:
                said = f"{self.source}: bitsandbytes with {key} {repr(value)[:40]} is not opened"
                raise InputError(f"{said}; dgq reads NF4 and FP4 in blocks of {BLOCK}, stored as uint8")
        kind = self.raw.get("bnb_4bit_quant_type") or "fp4"  # bitsandbytes' default
        return BitsAndBytes(double=bool(self.raw.get("bnb_4bit_use_double_quant")), kind=kind)


def scale_remarks(layout: NVFP4Modules, declared: Any) -> list[str]:
    """What vLLM does with NVFP4 that is declared W4A4 and lacks input scales. declared: the layout that the directory's
    declaration means; layout: that of its tensors. Sources: issues 45212 and 54189 of vLLM."""
    if isinstance(declared, NVFP4Modules) and declared.activations and not layout.activations:
        what = "declared W4A4 (NVFP4), but no file holds an input scale: read as W4A16"
        vllm = "vLLM without pull request 54427 (of August 2026) multiplies its experts by memory that nobody set"
        return [f"{what}. {vllm}; there, set quant_algo to {W4A16} in config.json and {HF_QUANT_CONFIG}"]
    if not layout.unscaled:
        return []
    vllm = "vLLM does not check that: with 4-bit activations (Blackwell) tokens that reach them give NaN or nothing"
    return [
        f"no input_scale, as ModelOpt leaves it out where no token came: {_places(layout.unscaled)}; their inputs stay"
        f" in 16 bits. {vllm}; its weight-only Marlin (Hopper, Ada) reads none. Calibrate with more text"
    ]


def _places(bases: Collection[str]) -> str:
    """Layers and experts of modules' names, in words; the first layers if there are many."""
    layers: dict[str, set[int]] = {}
    for base in bases:
        match = _EXPERT.search(base)
        place, expert = (f"layer {match[1]} experts", int(match[2])) if match else (base.rstrip("."), -1)
        layers.setdefault(place, set()).add(expert)
    order = sorted(layers, key=lambda place: (-1 in layers[place], len(place), place))
    lines = [f"{place} {', '.join(map(str, sorted(layers[place])))}".removesuffix(" -1") for place in order]
    more = f" and {len(lines) - _SHOWN} more layers" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def stale_declaration(path: Path, config: Mapping[str, Any], specs: Mapping[str, Spec]) -> str | None:
    """A notice for a declaration of quantisation that the tensors contradict: all of `specs`, the header entries, are
    BF16, F16 or F32, and none is a scale or the like. None if nothing is declared, or the tensors are quantised."""
    places = [f"config.json: {key}" for key in DECLARATIONS if config.get(key) is not None]
    places += [HF_QUANT_CONFIG] if (path / HF_QUANT_CONFIG).is_file() else []
    plain = all(spec.dtype in FLOATS and not name.endswith(COMPANIONS) for name, spec in specs.items())
    if not places or not plain:
        return None
    return f"{', '.join(places)} declares a quantisation, but every tensor is plain: stale, it is dropped"


def quantization(path: Path, config: Mapping[str, Any], specs: Mapping[str, Spec] | None = None) -> Quantization | None:
    """The declaration of the directory `path`, whose config.json is `config`; None if it declares no quantisation, or
    if that is stale. specs: the directory's header entries, read from its files if they are not given."""
    if config.get(MLX) is None and config.get("quantization_config") is None and not (path / HF_QUANT_CONFIG).is_file():
        return None
    if stale_declaration(path, config, stored_tensors(path) if specs is None else specs) is not None:
        return None
    for raw in (config.get(MLX), config.get("quantization_config")):
        if isinstance(raw, dict) and {"group_size", "bits"} <= raw.keys() and "quant_method" not in raw:
            raise InputError(
                f"{path / 'config.json'}: quantised by MLX ({raw['bits']!r} bits, groups of {raw['group_size']!r}); dgq"
                " opens no such, take the BF16 checkpoint that it was made from"
            )
    raw = config.get("quantization_config")
    older = path / HF_QUANT_CONFIG
    other: Any = read_json(older).get("quantization") if older.is_file() else None
    if older.is_file() and not isinstance(other, dict):
        raise InputError(f"{older}: has no object `quantization`; fetch the file again")
    if raw is None:
        return None if other is None else Quantization("modelopt", other, older)
    file = path / "config.json"
    if not isinstance(raw, dict) or not isinstance(raw.get("quant_method"), str):
        raise InputError(f"{file}: quantization_config has no quant_method, a text; fetch the file again")
    if other is not None and other.get("quant_algo") != raw.get("quant_algo"):
        raise InputError(
            f"{older}: quant_algo is {str(other.get('quant_algo'))[:40]!r}, but config.json says"
            f" {str(raw.get('quant_algo'))[:40]!r}; one of them is stale"
        )
    if other is not None:
        _check_group_size(other, older)
    return Quantization(raw["quant_method"], raw, file)


def _check_group_size(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse group sizes that NVFP4 does not have. They stand beside quant_algo in hf_quant_config.json, and below
    config_groups.….weights in config.json."""
    groups = raw.get("config_groups")
    places = [raw, *(groups.values() if isinstance(groups, dict) else ())]
    places += [place.get("weights") for place in places if isinstance(place, dict)]
    for place in places:
        size = place.get("group_size") if isinstance(place, dict) else None
        if size not in (None, NVFP4_BLOCK):
            raise InputError(f"{file}: group_size {str(size)[:40]}, NVFP4 has {NVFP4_BLOCK}")
