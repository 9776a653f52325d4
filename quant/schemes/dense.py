"""Unquantised weights: BF16, F16 and F32 are schemes like any other, so the baseline takes the same road.

parts[""]   the weight itself, shape (…, in), in the scheme's dtype
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dgq.quant.types import DECODED, GGMLType, GPUForm


@dataclass(frozen=True)
class Dense:
    """A plain tensor of `dtype`; quantize() rounds to nearest even, as every framework's cast does."""

    name: str
    dtype: torch.dtype
    ggml: GGMLType
    block: int = 1
    shared: frozenset[str] = frozenset()
    whole: bool = False
    gpu: GPUForm = DECODED  # the runtime computes in bfloat16
    grid: None = None
    searched: bool = False
    in_mix: bool = False  # `dgq mix` compares every scheme with BF16, which is no choice of a scheme

    @property
    def bits(self) -> float:
        return 8.0 * self.dtype.itemsize

    @property
    def max_abs(self) -> float:
        return torch.finfo(self.dtype).max

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"": weight.to(self.dtype)}

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return parts[""].to(dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize


BF16 = Dense("bf16", torch.bfloat16, GGMLType("BF16", id=30, file_type=32))
F16 = Dense("f16", torch.float16, GGMLType("F16", id=1, file_type=1))
F32 = Dense("f32", torch.float32, GGMLType("F32", id=0, file_type=0))
