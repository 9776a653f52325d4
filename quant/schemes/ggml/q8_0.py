"""Q8_0: 32 weights in 34 bytes.

d:f16 | qs:i8[32]          w = d * q
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked, half_value
from dgq.quant.schemes.ggml.grid import HalfScaleGrid
from dgq.quant.schemes.ggml.on_device import half, join, low_bytes
from dgq.quant.schemes.ggml.search import numbers
from dgq.quant.types import GGMLType, GPUForm


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 34) -> int8 and scales."""
    return b[..., None, 2:].view(torch.int8), half_value(b[..., None, :2]), None


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 -> uint8 (blocks, 34). There is nothing to choose, and importance changes nothing."""
    blocks = x.view(-1, 32)
    one, most = numbers([1.0, 127.0], x)
    d = blocks.abs().amax(1) / most
    scaled = blocks * torch.where(d != 0, one / d, 0.0).unsqueeze(1)
    scaled = scaled.nan_to_num_(0.0, 0.0, 0.0)  # d so small that 1/d overflows: C's cast gives low bytes of 0
    whole = scaled.trunc()
    rounded = whole + ((scaled - whole) * 2).trunc()  # roundf: halves go away from zero
    return join(half(d), low_bytes(rounded))


class Grid(HalfScaleGrid):
    level_values = tuple(map(float, range(-127, 128)))
    largest = 127
    factors = (0.985, 0.99, 0.995, 1.0, 1.004)

    def pack_blocks(self, d: Tensor, codes: Tensor) -> Tensor:
        signed = (codes - 127).to(torch.int8)
        return torch.cat((d.view(torch.uint8), signed.view(torch.uint8)), -1)


Q8_0 = GGMLScheme(
    name="q8_0",
    ggml=GGMLType("Q8_0", id=8, file_type=7),
    block=32,
    block_bytes=34,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=GPUForm("q8_0", bits=8.5, embedding=True),
    in_mix=True,
)
