"""ggml's types that dgq has no scheme for: what they are called and take, and their weights as dgq's kernels read them.

    NVFP4              repacked without loss: ggml's E4M3 scales are modelopt's with a scale_2 of 1
    any other type     decoded by the gguf package to BF16, a slice at a time, vectors to F32; refused by name where the
                       package has no decoder (Q8_1, Q8_K, integers, F64, Q1_0)

ggml's NVFP4 (ggml-common.h), 64 weights in 36 bytes:  d: u8[4] | qs: u8[32]. Sub-block s has the scale d[s], an E4M3
without sign, and qs[8s + j] holds its weight j in the low nibble, weight j + 8 in the high one; codes are E2M1. ggml
reads the scale 0x7F, NaN elsewhere, as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes.dense import BF16, F32
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import DECODED, GPUForm, Packed

SLICE = 1 << 22  # weights decoded at a time; in float32, with gguf's temporaries, some 100 MB


@dataclass(frozen=True)
class Guest:
    """A ggml type as a Scheme that is only read: sizes, and gguf's decoder. parts[""]: uint8 (…, bytes of a row)."""

    name: str
    block: int
    block_bytes: int
    max_abs: float = 65504.0
    shared: frozenset[str] = frozenset()
    whole: bool = False
    ggml: None = None
    gpu: GPUForm = DECODED
    grid: None = None
    searched: bool = False
    in_mix: bool = False

    @property
    def bits(self) -> float:
        return 8.0 * self.block_bytes / self.block

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block * self.block_bytes

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        raise InputError(f"{self.name}: dgq reads this type and does not write it; use another scheme")

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        import gguf

        with np.errstate(all="ignore"):  # damaged scales; whoever uses the values looks at them
            values = gguf.quants.dequantize(parts[""].numpy(), gguf.GGMLQuantizationType[self.name.upper()])
        return torch.from_numpy(values).to(dtype)


@cache
def guest(kind: str) -> Guest | None:
    """kind: ggml's name of a type, in capitals. None if the gguf package cannot decode it."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    try:  # one block of zeros
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), number)
    except NotImplementedError:
        return None
    return Guest(kind.lower(), block, block_bytes)


def stays_packed(kind: Guest) -> bool:
    """Whether received() keeps its bits."""
    return kind.name == NVFP4.name


def received(kind: Guest, shape: tuple[int, ...], raw: torch.Tensor, where: str) -> Packed:
    """raw uint8 (…, bytes of a row) -> the weight as dgq's kernels take it. where: file and tensor, for errors.

    InputError if it holds values that are not finite, or, NVFP4, scales with a sign.
    """
    if stays_packed(kind):
        return _repacked(shape, raw, where)
    plain = BF16 if len(shape) > 1 else F32
    rows, columns = raw.reshape(-1, raw.shape[-1]), shape[-1]
    out = torch.empty(len(rows), columns, dtype=plain.dtype)
    step = max(1, SLICE // columns)
    for start in range(0, len(rows), step):
        out[start : start + step] = kind.dequantize({"": rows[start : start + step]})
        if not bool(out[start : start + step].isfinite().all()):
            raise InputError(f"{where} holds values that are not finite; the file is damaged, fetch it again")
    return Packed(plain, shape, {"": out.view(shape)})


def _repacked(shape: tuple[int, ...], raw: torch.Tensor, where: str) -> Packed:
    blocks = raw.unflatten(-1, (-1, 36))
    scales = blocks[..., :4].flatten(-2)
    if bool((scales > 127).any()):
        raise InputError(f"{where} holds scales with a sign; the file is damaged, fetch it again")
    scales = torch.where(scales == 127, 0, scales)
    halves = blocks[..., 4:].unflatten(-1, (4, 8))  # sub-blocks; the first 8 weights of each low, the others high
    codes = torch.cat((halves & 15, halves >> 4), -1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).flatten(-3)
    ones = torch.ones(()).expand(*shape[:-1], 1)
    return Packed(NVFP4, shape, {"": packed, "weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": ones})
