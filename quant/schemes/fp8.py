"""FP8 (E4M3) weights with a float32 scale a row. dgq reads them and does not write them; quant/formats/fp8_groups.py
says where they lie in a directory.

    ""            float8_e4m3fn  (…, in)
    weight_scale  float32        (…, rows, 1)          w = code * weight_scale
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import e4m3_values
from dgq.quant.types import DECODED, GPUForm


@dataclass(frozen=True)
class FP8Scheme:
    """parts: "" float8_e4m3fn (…, in), "weight_scale" float32 (…, rows, 1)."""

    name: str = "fp8"
    block: int = 1
    bits: float = 8.0
    max_abs: float = torch.finfo(torch.float32).max
    shared: frozenset[str] = frozenset()
    whole: bool = False
    ggml: None = None
    gpu: GPUForm = DECODED
    grid: None = None
    searched: bool = False
    in_mix: bool = False

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        raise InputError(f"{self.name}: dgq reads this scheme and does not write it; use another")

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (e4m3_values(parts[""]) * parts["weight_scale"]).to(dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)


FP8 = FP8Scheme()
