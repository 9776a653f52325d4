"""FP4, the 4-bit format that bitsandbytes takes unless it is asked for NF4: 16 values of a small float, a third of a
power of two each, times the largest |w| of 64 weights. dgq reads it and does not write it: NF4 loses less.

    ""       uint8    (…, in / 2)     even column in the HIGH nibble
    absmax   float32  (…, in / 64)    w = FP4[code] * absmax; with double quantisation decoded when it is read

Source: bitsandbytes 0.50, functional.get_4bit_type("fp4"), whose quant_map these files hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dgq.quant.errors import InputError
from dgq.quant.types import DECODED, GPUForm

BLOCK = 64
_POSITIVE = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4_MAP = torch.cat((_POSITIVE, -_POSITIVE))


@dataclass(frozen=True)
class FP4Scheme:
    """parts: "" uint8 (…, in/2), "absmax" float32 (…, in/64)."""

    name: str = "fp4"
    block: int = BLOCK
    bits: float = 4 + 32 / BLOCK
    max_abs: float = torch.finfo(torch.float32).max
    shared: frozenset[str] = frozenset()
    whole: bool = False
    ggml: None = None
    gpu: GPUForm = DECODED
    grid: None = None
    searched: bool = False
    in_mix: bool = False

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        raise InputError(f"{self.name}: dgq reads this scheme and does not write it; use nf4")

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        packed = parts[""]
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten(-2)
        values = FP4_MAP.to(codes.device)[codes.int()].unflatten(-1, (-1, BLOCK))
        weight: torch.Tensor = values * parts["absmax"].unsqueeze(-1)
        return weight.flatten(-2).to(dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // 2 + 4 * (math.prod(shape) // BLOCK)


FP4 = FP4Scheme()
