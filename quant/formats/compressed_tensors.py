"""NVFP4 in compressed-tensors' layout (nvfp4-pack-quantized), as llm-compressor exports it. Read, never written. Groups
of FP8 beside it are quant/formats/fp8_groups.py's.

    …layers.L.experts.gate_up_proj (E, 2I, H)  ->  …layers.L.experts.E.gate_proj.  and  …up_proj.
    …layers.L.experts.down_proj    (E, H, I)   ->  …layers.L.experts.E.down_proj.
    …layers.L.mlp.up_proj.weight   (I, H)      ->  …layers.L.mlp.up_proj.        and other Linears, if not plain

                      weight_packed         U8       [out, in/2]    modelopt's weight
                      weight_scale          F8_E4M3  [out, in/16]   modelopt's weight_scale
                      weight_global_scale   F32      [1]            1 / modelopt's weight_scale_2
                      input_global_scale    F32      [1]            1 / modelopt's input_scale; W4A4 only

Experts may also be stacked, in the names of llm-compressor's repacked ones; then `unfused` names the bytes of each
module (repack_moe() of 0.14 itself leaves the experts plain beside their scales, which is refused):

    …experts.gate_up_proj.weight_packed [E, 2I, H/2], weight_scale [E, 2I, H/16], global scales [E, 2] or [E, 1]
    …experts.down_proj.weight_packed    [E, H, I/2],  weight_scale [E, H, I/16],  global scales [E, 1] or [E]
    (or …experts.gate_up_proj_packed, …_scale, …_global_scale and so on)

Source: compressed-tensors 0.20, NVFP4PackedCompressor. It divides a block's scale by the global one; dgq multiplies it
by the reciprocal, so that decoded weights differ by a rounding of float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dgq.quant.errors import InputError
from dgq.quant.formats.nvfp4_modules import PROJECTIONS, NVFP4Modules, Suffixes
from dgq.quant.schemes.nvfp4 import BLOCK
from dgq.quant.types import Packed, Spec

METHOD, FORMAT = "compressed-tensors", "nvfp4-pack-quantized"
_EIGHTS, _SEVERAL = ("float-quantized", "naive-quantized"), "mixed-precision"
# What a group says of its weights, None: the key may be absent.
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("float",),
    "group_size": (BLOCK,),
    "strategy": ("tensor_group",),
    "symmetric": (True, None),
    "dynamic": (False, None),
}
_EIGHT_BITS = _WEIGHTS | {"num_bits": (8,), "group_size": (None,), "strategy": ("tensor", "channel")}


def refused(config: Mapping[str, Any]) -> str | None:
    """What of a quantization_config dgq does not read, in a few words; None if it reads all."""
    if config.get("format") not in (FORMAT, *_EIGHTS, _SEVERAL):
        return f"format {str(config.get('format'))[:40]!r}"
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            return key
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "no config_groups"
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return f"group {name[:40]!r} without weights"
        if (form := _format(config, group)) not in (FORMAT, *_EIGHTS):
            return f"group {name[:40]!r} of format {str(form)[:40]!r}"
        for key, allowed in (_WEIGHTS if form == FORMAT else _EIGHT_BITS).items():
            if weights.get(key) not in allowed:
                return f"group {name[:40]!r} with {key} {str(weights.get(key))[:40]!r}"
    return None


def layout_of(config: Mapping[str, Any]) -> tuple[CompressedTensors, set[bool], bool]:
    """Of a quantization_config that is not refused(): the layout; whether its groups of NVFP4 have input scales; and
    whether there are groups of FP8."""
    groups = [(_format(config, group), group) for group in config["config_groups"].values()]
    inputs = {_rounds_inputs(group) for form, group in groups if form == FORMAT}
    return CompressedTensors(True in inputs), inputs, any(form != FORMAT for form, _ in groups)


def _format(config: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    return group.get("format") or config.get("format")


def _rounds_inputs(group: Mapping[str, Any]) -> bool:
    inputs = group.get("input_activations")
    return isinstance(inputs, dict) and inputs.get("dynamic") is not True


@dataclass(frozen=True)
class CompressedTensors(NVFP4Modules):
    """The layout."""

    suffixes = Suffixes(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", scalar=(1,), inverted=True
    )

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError(f"{name}: dgq writes modelopt's layout")


_STACKED = re.compile(
    r"(.*\.experts)\.(gate_up_proj|down_proj)[._](?:(?:weight_)?(packed|scale|global_scale)|(input_global_scale))"
)


def unfused(specs: Mapping[str, Spec], experts: int) -> dict[str, Spec]:
    """Stacks of so many experts' tensors become a tensor a module; what has no shape of a stack stays as it is.
    InputError for scales beside plain stacks."""
    modules: dict[str, Spec] = {}
    for name, spec in specs.items():
        if (match := _STACKED.fullmatch(name)) and (plain := f"{match[1]}.{match[2]}") in specs:
            what = f"{spec.file}: {name} is there, but {plain} is not quantised"
            raise InputError(f"{what}; llm-compressor's repack_moe() leaves it so: export again without it")
        pieces = _pieces(spec, experts)
        modules |= {name: spec} if not pieces or any(piece in specs for piece in pieces) else pieces
    return modules


def _pieces(spec: Spec, experts: int) -> dict[str, Spec]:
    match = _STACKED.fullmatch(spec.name)
    if not match or spec.shape[:1] != (experts,) or not spec.numel:
        return {}
    owner, last, suffix = match[1], match[2], match[4] or f"weight_{match[3]}"
    parts = PROJECTIONS[last]
    shape: tuple[int, ...] = (1,)
    numbers, each = spec.numel // experts, (spec.stop - spec.start) // experts
    if suffix.endswith("global_scale"):
        if numbers not in (1, len(parts)):
            return {}
        size = each // numbers
        step = size if numbers == len(parts) else 0
    else:
        if len(spec.shape) != 3 or spec.shape[1] % len(parts):
            return {}
        shape = (spec.shape[1] // len(parts), spec.shape[2])
        size = step = each // len(parts)
    pieces = {}
    for expert in range(experts):
        for number, part in enumerate(parts):
            name, start = f"{owner}.{expert}.{part}.{suffix}", spec.start + expert * each + number * step
            pieces[name] = replace(spec, name=name, shape=shape, start=start, stop=start + size)
    return pieces
