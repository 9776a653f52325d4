"""IQ4_NL: 32 weights in 18 bytes, 16 values that lie closer together near zero, and one half.

    d:f16 | qs:u8[16]          w = d * VALUES[q]
    q[j] = low nibble of qs[j], q[j+16] = high nibble of qs[j]

VALUES are whole numbers and no symmetric ones, so that d may have either sign. Sources: ggml-common.h (block_iq4_nl,
kvalues_iq4nl) and ggml-quants.c (quantize_row_iq4_nl_impl), whose bytes these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked, half_value
from dgq.quant.schemes.ggml.grid import HalfScaleGrid
from dgq.quant.schemes.ggml.on_device import half, join, low_bytes, positions
from dgq.quant.schemes.ggml.search import GROUP_MAX_EPS, numbers, signed_max, square_root, sum_positions
from dgq.quant.types import GGMLType, GPUForm, Table

VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_MIDDLES = [(low + high) / 2 for low, high in pairwise(VALUES)]
_TRIES = 7  # scales tried on either side of largest / -127


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 18) -> VALUES as int8, and scales."""
    qs = b[..., None, 2:]
    codes = torch.cat((qs & 15, qs >> 4), -1)
    values = torch.tensor(VALUES, dtype=torch.int8, device=b.device)[codes.int()]
    return values, half_value(b[..., None, :2]), None


def codes_and_scales(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """parts of a weight (…, in) -> codes uint8 (…, in), one a byte, and scales float32 (…, in / 32)."""
    b = parts[""].unflatten(-1, (-1, 18))
    qs = b[..., 2:]
    return torch.cat((qs & 15, qs >> 4), -1).flatten(-2), half_value(b[..., :2]).squeeze(-1)


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 and importance (in,) -> uint8 (blocks, 18), ggml's bytes."""
    columns = positions(x, 32)
    squares = columns * columns
    weight = squares
    if importance is not None:
        sigma2 = sum_positions(squares) * 0.0625  # of the block's 32, times two
        weight = positions(importance.expand_as(x), 32) * square_root(sigma2 + squares)
    scale = _best_scale(columns, weight)
    inverse = torch.where(scale != 0, numbers([1.0], x) / scale, 0.0)
    return pack(half(scale), _codes(inverse * columns).t().to(torch.int32))


def _best_scale(x: Tensor, weight: Tensor) -> Tensor:
    """(32, blocks) -> the scale of least weighted squared error among those tried, (blocks,); of zeros 0."""
    values = numbers(list(VALUES), x)
    magnitude, extreme = signed_max(x)
    zero = magnitude < GROUP_MAX_EPS
    extreme = torch.where(zero, 1.0, extreme)
    one, lowest, *numerators = numbers([1.0, VALUES[0], *(VALUES[0] + n for n in range(-_TRIES, _TRIES + 1))], x)

    def sums(inverse: Tensor) -> Tensor:
        q = values[_codes(inverse * x).int()]
        weighted = weight * q
        return sum_positions(torch.stack((weighted * x, weighted * q)), 1)  # sum of w q x, sum of w q q

    qx, q2 = sums(one / (-extreme / lowest))
    scale = torch.where(q2 > 0, qx / q2, 0.0)
    best = scale * qx
    for numerator in numerators:
        qx, q2 = sums(numerator / extreme)
        better = (q2 > 0) & (qx * qx > best * q2)
        candidate = qx / q2
        scale = torch.where(better, candidate, scale)
        best = torch.where(better, candidate * qx, best)
    return torch.where(zero, 0.0, scale)


def _codes(x: Tensor) -> Tensor:
    """The nearest of VALUES: how many middles are not above x. A tie goes up, and NaN to the last code, as in C."""
    return torch.bucketize(x, numbers(_MIDDLES, x), right=True, out_int32=True)


def pack(d: Tensor, q: Tensor) -> Tensor:
    """d float16 (blocks, 1), q int32 (blocks, 32) in 0 … 15 -> uint8 (blocks, 18)."""
    return join(d, low_bytes(q[:, :16] | q[:, 16:] << 4))


class Grid(HalfScaleGrid):
    level_values = VALUES
    largest = 127
    factors = tuple(sign * f for sign in (1, -1) for f in (0.8, 0.86, 0.91, 0.95, 0.98, 1.01, 1.05, 1.12))

    def pack_blocks(self, d: Tensor, codes: Tensor) -> Tensor:
        return pack(d, codes)


IQ4_NL = GGMLScheme(
    name="iq4_nl",
    ggml=GGMLType("IQ4_NL", id=20, file_type=25),
    block=32,
    block_bytes=18,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=GPUForm("table", bits=4.5, table=Table(VALUES, 32, codes_and_scales)),
    in_mix=False,  # `dgq mix` has not been measured with it
)
