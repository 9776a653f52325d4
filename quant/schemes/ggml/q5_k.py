"""Q5_K: Q4_K with a fifth bit, 256 weights in 176 bytes. llama-quantize gives it to attention's outputs in Q4_K_M of
models with exactly 8 experts.

d:f16 | dmin:f16 | scales:u8[12] | qh:u8[32] | qs:u8[128]      w = (d * sc) * q - (dmin * m)
scales as in Q4_K; qs[32g + l]: the low four bits of weights 64g + l and 64g + 32 + l, in its low and its high nibble
qh[l]: bit 2g is the fifth bit of weight 64g + l, bit 2g + 1 that of weight 64g + 32 + l
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.quant.schemes.ggml import q4_k
from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked
from dgq.quant.schemes.ggml.grid import half_column
from dgq.quant.schemes.ggml.on_device import join, low_bytes
from dgq.quant.types import DECODED, GGMLType

_BITS = torch.arange(8)


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 176) -> integers 0 … 31, scales and minimums, in 8 groups of 32."""
    q, scale, minimum = q4_k.unpack(torch.cat((b[..., :16], b[..., 48:]), -1))
    fifth = b[..., 16:48].unsqueeze(-2) >> _BITS.to(b.device, torch.uint8).unsqueeze(-1) & 1
    return q | fifth << 4, scale, minimum


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 and importance (in,) -> uint8 (blocks, 176), ggml's bytes."""
    return pack(*q4_k.chosen(x, importance, 31, (-0.5, 0.1, 15)))


def pack(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """d, dmin float16 (blocks, 1); scales, mins int32 (blocks, 8) of 6 bits; q int32 (blocks, 256) in 0 … 31 -> uint8
    (blocks, 176)."""
    groups = q.view(-1, 8, 32)
    qh = (groups >> 4 << _BITS.to(q.device).view(8, 1)).sum(1)
    qs = (groups[:, ::2] & 15 | (groups[:, 1::2] & 15) << 4).flatten(1)
    return join(d, dmin, *map(low_bytes, (*q4_k.six_bits(scales, mins), qh.to(torch.int32), qs)))


class Grid(q4_k.Grid):
    """Q4_K's, with 32 levels."""

    top = 31

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        sc, m = (note.int().reshape(-1, 8) for note in notes[:2])
        d, dmin = (half_column(note[..., ::8]) for note in notes[2:])
        packed = pack(d, dmin, sc, m, codes.int().reshape(-1, 256))
        return {"": packed.reshape(*codes.shape[:-1], -1)}


Q5_K = GGMLScheme(
    name="q5_k",
    ggml=GGMLType("Q5_K", id=13, file_type=17),  # ggml's fallback is Q5_1, which dgq does not write
    block=256,
    block_bytes=176,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=DECODED,
    in_mix=False,
)
