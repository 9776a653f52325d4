"""FP8 weights among NVFP4 ones, or alone, as modelopt and compressed-tensors export them. Read, never written.

    …layers.L.self_attn.q_proj.   weight        F8_E4M3  [out, in]
                                  weight_scale  F32, BF16 or F16; [] or [1]: one a matrix; [out] or [out, 1]: one a row
                                  input_scale   F32      [] or [1]    static activations only; not applied
    …layers.L.experts.E.gate_proj. and so on: the same, where experts are in FP8; each projection has its own scale

    w = code * weight_scale

Which of the two a module is, its weight's dtype says. Sources: nvidia-modelopt 0.47 (quant_algo MIXED_PRECISION, FP8,
FP8_PER_CHANNEL_PER_TOKEN), compressed-tensors 0.20 (float-quantized, naive-quantized).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from dgq.quant.errors import InputError
from dgq.quant.formats.nvfp4_modules import NVFP4Modules, joined_bytes, modules
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.types import Entry, Packed, Scheme, Spec, Stored

_CODES, _SCALES = "F8_E4M3", ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Mixed:
    """The layout. base: that of its NVFP4; either: some of that with input scales and some without.

    declared: modules that the config names ("" is all others) -> whether it says FP8. specs: the directory's tensors,
    whose dtypes are what counts.
    """

    base: NVFP4Modules
    either: bool = False
    declared: Mapping[str, bool] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def slices(self) -> Scheme:
        return self.base.slices

    def scheme_of(self, name: str) -> Scheme:
        return FP8 if self._is_eight(modules(name, (1,))[0][0]) else self.base.scheme_of(name)

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.base.holds(name, shape)

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        """InputError for a module that is one of the two and said to be the other."""
        self._check_agreement(name)
        if self.scheme_of(name) is not FP8:
            return self._four(name).entries(name, shape)
        groups = modules(name, shape)
        rows, columns = shape[-2] // len(groups[0]), shape[-1]
        tensors: dict[str, Entry] = {}
        for base in (base for group in groups for base in group):
            tensors[base + "weight"] = (_CODES, (rows, columns))
            tensors[base + "weight_scale"] = self._entry(base + "weight_scale", ((), (1,), (rows,), (rows, 1)))
            if base + "input_scale" in self.specs:
                tensors[base + "input_scale"] = self._entry(base + "input_scale", ((), (1,)))
        return tensors

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError(f"{name}: dgq writes modelopt's NVFP4 alone")

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight, copied together. InputError for codes and scales that no quantiser writes."""
        if self.scheme_of(name) is not FP8:
            return self._four(name).join(name, shape, stored)
        bases = [base for group in modules(name, shape) for base in group]
        rows = math.prod(shape[:-1]) // len(bases)
        codes = joined_bytes([_checked_codes(stored, base + "weight") for base in bases])
        scales = [_checked_scale(stored, base + "weight_scale").view(-1, 1).expand(rows, 1) for base in bases]
        return Packed(FP8, shape, {"": codes.view(shape), "weight_scale": torch.cat(scales).view(*shape[:-1], 1)})

    def _is_eight(self, base: str) -> bool:
        spec = self.specs.get(base + "weight")
        return spec is not None and spec.dtype == _CODES

    def _check_agreement(self, name: str) -> None:
        module = modules(name, (1,))[0][0]
        spec = self.specs.get(module + "weight") or self.specs.get(module + "weight_packed")
        places = (module[:-1], name.rpartition(".")[0], "")
        eight = next((self.declared[at] for at in places if at in self.declared), None)
        if spec is not None and eight is not None and spec.dtype == ("U8" if eight else _CODES):
            kinds = ("FP8", "NVFP4") if eight else ("NVFP4", "FP8")
            what = f"{spec.file}: {spec.name} is {kinds[1]}, and said to be {kinds[0]}"
            raise InputError(f"{what}; one of file and config is stale, fetch both again")

    def _four(self, name: str) -> NVFP4Modules:
        if not self.either:
            return self.base
        base = modules(name, (1,))[0][0]
        given = any(base + suffix in self.specs for suffix in ("input_scale", "input_global_scale"))
        return replace(self.base, activations=given)

    def _entry(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> Entry:
        """What the file has there, if it may; else what is usual."""
        spec = self.specs.get(name)
        known = spec is not None and spec.dtype in _SCALES
        return (
            spec.dtype if spec is not None and known else _SCALES[0],
            spec.shape if spec is not None and spec.shape in shapes else shapes[0],
        )


def _checked_codes(stored: Stored, name: str) -> torch.Tensor:
    codes = stored.tensor(name)
    damaged = codes.view(torch.uint8) & 0x7F == 0x7F
    if bool(damaged.any()):
        raise InputError(f"{stored.file(name)}: {name} is not a number at {damaged.nonzero()[0].tolist()}; damaged")
    return codes


def _checked_scale(stored: Stored, name: str) -> torch.Tensor:
    scale = stored.tensor(name).float()
    wrong = ~(scale.isfinite() & (scale >= 0))
    if bool(wrong.any()):
        raise InputError(f"{stored.file(name)}: {name} holds {float(scale[wrong][0])}, no scale; damaged")
    return scale
