"""Q5_0: 32 weights in 22 bytes.

d:f16 | qh:u8[4] | qs:u8[16]          w = d * (q - 16)
q[j] = low nibble of qs[j] + bit j of qh, q[j+16] = high nibble + bit j+16
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked, half_value
from dgq.quant.schemes.ggml.grid import HalfScaleGrid
from dgq.quant.schemes.ggml.on_device import half, join, low_bytes, positions
from dgq.quant.schemes.ggml.search import make_qx_quants, numbers, signed_max, square_root, sum_positions
from dgq.quant.types import GGMLType, GPUForm


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 22) -> integers -16 … 15 and scales."""
    qh, qs = b[..., None, 2:6], b[..., None, 6:]
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device)
    high = ((qh.unsqueeze(-1) >> shifts) & 1).flatten(-2) << 4  # bit j of the 32-bit word, as 0 or 16
    q = torch.cat((qs & 15, qs >> 4), -1) | high
    return q.to(torch.int8) - 16, half_value(b[..., None, :2]), None


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 and importance (in,) -> uint8 (blocks, 22), ggml's bytes."""
    if importance is None:
        one = numbers([1.0], x)
        _, extreme = signed_max(positions(x, 32))
        d = extreme / -16
        scaled = x.view(-1, 32) * torch.where(d != 0, one / d, 0.0).unsqueeze(1) + 16.5
        level = scaled.nan_to_num_(0.0, 0.0, 0.0).clamp_(max=31.0)  # as in Q8_0
    else:
        count = numbers([x.shape[1]], x)
        squares = x * x
        sigma2 = sum_positions(squares, 1) / count  # of the whole row
        weight = importance * square_root(sigma2.unsqueeze(1) + squares)
        d, level = make_qx_quants(16, positions(x, 32), positions(weight, 32))
        level = level.t()
    return pack(half(d), level.to(torch.int32))


def pack(d: Tensor, q: Tensor) -> Tensor:
    """d float16 (blocks, 1), q int32 (blocks, 32) in 0 … 31 -> uint8 (blocks, 22)."""
    bits = (q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.int32, device=q.device)
    return join(d, low_bytes(bits.sum(-1)), low_bytes(q[:, :16] & 15 | (q[:, 16:] & 15) << 4))


class Grid(HalfScaleGrid):
    level_values = tuple(map(float, range(-16, 16)))
    largest = 16
    factors = tuple(sign * f for sign in (1, -1) for f in (0.84, 0.88, 0.92, 0.95, 0.98, 1.01, 1.04, 1.07))

    def pack_blocks(self, d: Tensor, codes: Tensor) -> Tensor:
        return pack(d, codes)


Q5_0 = GGMLScheme(
    name="q5_0",
    ggml=GGMLType("Q5_0", id=6, file_type=8),
    block=32,
    block_bytes=22,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=GPUForm("q5_0", bits=5.5),
    in_mix=True,
)
