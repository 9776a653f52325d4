"""NVFP4: 4-bit floats in blocks of 16 with an 8-bit scale each and one float32 scale a matrix, as modelopt packs them.

    weight        uint8          (…, in / 2)    even column in the low nibble, odd one in the high nibble
    weight_scale  float8_e4m3fn  (…, in / 16)   one a block, rows in plain order (not swizzled)
    weight_scale_2  float32      one a matrix   amax of the matrix / (6 * 448), so that block scales use E4M3's range

    code   0  1   2  3   4  5  6  7   and 8 more for the negative ones (8 itself, -0, is never written)
    value  0  .5  1  1.5 2  3  4  6        w = value * (weight_scale * weight_scale_2)

Rounding is to nearest, ties to the even code: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
Bytes are modelopt's (its `max` calibration, NVFP4QTensor) except that its -0 is written as 0, and that a matrix of
zeros, which it gives NaN scales, gets scale_2 = 1, scales 1 and codes 0.

A fused (E, out, in) weight has one scale_2 an expert: the gate and up halves of an expert share it, as vLLM expects.
In memory it is kept as a (…, rows, 1) view of that scalar, so that slices of rows take theirs along.

Every step is one IEEE operation on float32 tensors (divisors are tensors too: CUDA multiplies by the reciprocal of a
Python number), so the bytes are the same on a CPU and on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dgq.quant.schemes.fourbit import count_below, is_below, largest, pieces
from dgq.quant.types import GPUForm

BLOCK = 16
SCALE_MAX = 448.0  # the largest E4M3
SCALE_MIN = 2.0**-9  # the smallest above zero
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_VALUES = torch.tensor([*VALUES, *(-v for v in VALUES)])
# A code is the number of bounds below |w|. Where a tie goes up to the even code, the bound is the float just below it.
_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_BOUNDS[1::2] = torch.nextafter(_BOUNDS[1::2], torch.tensor(0.0))
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # torch decodes one by one on a CPU


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax, any shape -> scale_2: amax / (6 * 448), and 1 where that is 0."""
    scale: torch.Tensor = amax.float() / amax.new_tensor(VALUES[-1] * SCALE_MAX, dtype=torch.float32)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def encode(x: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (…, in) and a float32 scale_2 broadcasting to (…, 1) -> codes uint8 (…, in), one a byte, and E4M3 scales."""
    x = x.detach().float()
    scales = _block_scales(largest(x, BLOCK), scale_2)
    steps = (e4m3_values(scales) * scale_2).unsqueeze(-1)
    return _codes(x.unflatten(-1, (-1, BLOCK)), steps).flatten(-2), scales


def _block_scales(amax: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    scale = amax / (scale_2 * 6.0)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)


def e4m3_values(scales: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn, any shape -> float32."""
    if scales.device.type != "cpu":
        return scales.float()
    return _E4M3.index_select(0, scales.view(torch.uint8).flatten().int()).view(scales.shape)


def _codes(blocks: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """blocks (…, 16) and the float32 step (…, 1) of each -> codes, one a byte."""
    scaled = blocks.float() / steps
    negative = is_below(scaled, -VALUES[1] / 2)
    return count_below(scaled.abs_(), _BOUNDS).add_(negative, alpha=8)


def decode(codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The inverse of encode(): float32 (…, in)."""
    values = _VALUES.to(codes.device)[codes.int()].unflatten(-1, (-1, BLOCK))
    weight: torch.Tensor = values * (scales.float() * scale_2).unsqueeze(-1)
    return weight.flatten(-2)


def round_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """What a W4A4 kernel sees of its input: x (…, in) rounded to NVFP4 and back, in x's dtype.

    input_scale float32, broadcasting to (…, 1): the static scale_2 of activations; block scales are taken from x
    itself, and what exceeds input_scale * 448 * 6 saturates. Source: modelopt, NVFP4QTensor on an input.
    """
    return decode(*encode(x, input_scale), input_scale).to(x.dtype)


class Grid:
    """The scale of a block is one of ten neighbouring E4M3 codes around the reference's; scale_2 is the reference's."""

    block = sub = BLOCK
    offsets = (-4, -3, -2, -1, 0, 1, 2, 3, 4, 5)

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale_2 = global_scale(weight.abs().amax((-2, -1))).unsqueeze(-1)  # (B, 1)
        positive = torch.tensor(VALUES, device=weight.device)
        self.levels = torch.cat((-positive[1:].flip(0), positive))
        self._e4m3 = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(weight.device)

    def open(self, x: torch.Tensor, cost: torch.Tensor) -> None:
        return None

    def scales(
        self, x: torch.Tensor, cost: torch.Tensor, state: None, number: int
    ) -> tuple[torch.Tensor, None, tuple[torch.Tensor, ...]]:
        base = (x.abs().amax(-1) / (self.scale_2 * 6)).clamp(SCALE_MIN, SCALE_MAX)
        code = base.to(torch.float8_e4m3fn).view(torch.uint8).int()
        codes = torch.stack([(code + offset).clamp(1, 126) for offset in self.offsets])
        return self._e4m3[codes] * self.scale_2, None, (codes,)

    def pack(self, codes: torch.Tensor, notes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        signed = codes.int() - 7
        code = (signed.abs() + 8 * (signed < 0)).to(torch.uint8)
        scales = notes[0].to(torch.uint8).view(torch.float8_e4m3fn)
        scale_2 = self.scale_2.unsqueeze(-1).expand(*codes.shape[:2], 1)
        return {"": code[..., ::2] | code[..., 1::2] << 4, "weight_scale": scales, "weight_scale_2": scale_2}


GPU = GPUForm("nvfp4", bits=4.5)


@dataclass(frozen=True)
class NVFP4Scheme:
    """parts: "" uint8 (…, in/2), "weight_scale" float8_e4m3fn (…, in/16), "weight_scale_2" float32 (…, rows, 1)."""

    name: str = "nvfp4"
    block: int = BLOCK
    bits: float = 4.5
    max_abs: float = torch.finfo(torch.float32).max
    shared: frozenset[str] = frozenset()
    whole: bool = True  # the rows of a matrix share scale_2
    ggml: None = None  # ggml's NVFP4 has no scale_2 and another order; gguf_guests.py reads it
    gpu: GPUForm = GPU
    grid: type[Grid] = Grid
    searched: bool = True
    in_mix: bool = True

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """weight (…, out, in), whole matrices, any float dtype -> parts, on the weight's device."""
        if weight.shape[-1] % BLOCK:
            raise ValueError(f"rows of {weight.shape[-1]} are no multiple of {self.name}'s block of {BLOCK}")
        weight = weight.detach() if weight.itemsize < 8 else weight.detach().float()
        amax = largest(weight, BLOCK)
        scale_2 = global_scale(amax.amax((-2, -1), keepdim=True))
        scales = _block_scales(amax, scale_2)
        steps = (e4m3_values(scales) * scale_2).view(-1, 1)
        blocks = weight.reshape(-1, BLOCK)
        packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
        for part in pieces(weight.numel(), BLOCK, weight.device):
            pairs = _codes(blocks[part], steps[part]).view(torch.int16)  # little endian: the even column is below
            packed[part] = pairs | pairs >> 4
        packed = packed.view(*weight.shape[:-1], weight.shape[-1] // 2)
        return {"": packed, "weight_scale": scales, "weight_scale_2": scale_2.expand(*weight.shape[:-1], 1)}

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        packed = parts[""]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        return decode(codes, parts["weight_scale"], parts["weight_scale_2"]).to(dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // 2 + math.prod(shape) // BLOCK + 4 * math.prod(shape[:-2])


NVFP4 = NVFP4Scheme()
