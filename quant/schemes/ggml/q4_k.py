"""Q4_K: 256 weights in 144 bytes, with a 6-bit scale and a 6-bit minimum for every 32 of them.

d:f16 | dmin:f16 | scales:u8[12] | qs:u8[128]          w = (d * sc) * q - (dmin * m)
8 sub-blocks of 32 with a 6-bit scale sc and minimum m each, packed into 12 bytes s:
sub-blocks 0-3  sc = s[j] & 63                        m = s[j+4] & 63
sub-blocks 4-7  sc = s[j+4] & 15 | s[j-4] >> 6 << 4   m = s[j+4] >> 4 | s[j] >> 6 << 4
qs[32g + l]: the low nibble is weight 64g + l, the high nibble weight 64g + 32 + l
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked, half_value
from dgq.quant.schemes.ggml.grid import half_column, inverse, searches
from dgq.quant.schemes.ggml.on_device import half, join, low_bytes, positions
from dgq.quant.schemes.ggml.search import (
    make_qkx_quants,
    make_qp_quants,
    nearest_int,
    numbers,
    square_root,
    sum_positions,
)
from dgq.quant.types import GGMLType, GPUForm


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 144) -> integers 0 … 15, scales and minimums, in 8 groups of 32."""
    s = b[..., 4:16]
    low, mid, high = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), -1)
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), -1)
    qs = b[..., 16:].unflatten(-1, (4, 1, 32))
    q = torch.cat((qs & 15, qs >> 4), -2).flatten(-3, -2)  # (…, 8, 32)
    return q, (half_value(b[..., 0:2]) * scale).unsqueeze(-1), (half_value(b[..., 2:4]) * minimum).unsqueeze(-1)


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 and importance (in,) -> uint8 (blocks, 144), ggml's bytes."""
    return pack(*chosen(x, importance, 15, (-1.0, 0.1, 20)))


def chosen(x: Tensor, importance: Tensor | None, top: int, search: tuple[float, float, int]) -> tuple[Tensor, ...]:
    """What pack() takes, of Q4_K and of Q5_K, whose levels go to `top`; search: make_qkx_quants' settings without
    importance."""
    columns = positions(x, 32)
    if importance is None:
        weight = columns.abs().add_(square_root(sum_positions(columns * columns) / 32))
        scales, mins, level = make_qkx_quants(top, columns, weight, *search)
        d, ls = _fractions_of_largest(scales.view(-1, 8))
        dmin, lm = _fractions_of_largest(mins.view(-1, 8))
    else:
        squares = x * x
        sigma2 = 2 * sum_positions(positions(squares, 256)) / 256
        importance = importance.expand_as(x).reshape(-1, 256)
        weight = positions(importance * square_root(sigma2.unsqueeze(1) + squares.view(-1, 256)), 32)
        scales, mins, level = make_qkx_quants(top, columns, weight, -0.9, 0.05, 36)
        both = torch.cat((positions(scales, 8), positions(mins, 8)), 1)
        d_dmin, ls_lm = make_qp_quants(63, both, positions(sum_positions(weight), 8).repeat(1, 2))
        if top > 15:  # quantize_row_q5_K_impl bounds them, quantize_row_q4_K_impl does not
            ls_lm = (ls_lm & 255).clamp_(max=63)
        (d, dmin), (ls, lm) = d_dmin.chunk(2), ls_lm.t().chunk(2)
    low, mid, high = six_bits(ls, lm)
    d16, dmin16 = half(d), half(dmin)
    sc = torch.cat((low & 63, high & 15 | low >> 6 << 4), 1)
    m = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), 1)
    scale, minimum = (d16.float() * sc).view(-1), (dmin16.float() * m).view(-1)
    rounded = nearest_int((columns + minimum) / scale).clamp_(0, top)
    q = torch.where(scale != 0, rounded, level.to(torch.int32)).t().reshape(-1, 256)
    return d16, dmin16, ls, lm, q


def pack(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """d, dmin float16 (blocks, 1); scales, mins int32 (blocks, 8) of 6 bits; q int32 (blocks, 256) in 0 … 15 -> uint8
    (blocks, 144)."""
    q = q.view(-1, 4, 2, 32)
    qs = (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)
    return join(d, dmin, *map(low_bytes, six_bits(scales, mins)), low_bytes(qs))


def six_bits(ls: Tensor, lm: Tensor) -> tuple[Tensor, ...]:
    """The twelve bytes of scales and mins (blocks, 8), in three times four; the low four of scales are whole bytes
    first, so that a wrapped 255 spoils their neighbours as in C."""
    packed = (ls[:, :4] | ls[:, 4:] >> 4 << 6, lm[:, :4] | lm[:, 4:] >> 4 << 6, ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4)
    return tuple(part & 255 for part in packed)


def _fractions_of_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, 8) -> d = largest / 63 (blocks,) and each value as 0 … 63 of them; all 0 where none is positive."""
    most = numbers([63.0], values)
    largest = values.amax(1).clamp(min=0.0) + 0.0  # no -0
    inverses = torch.where(largest > 0, most / largest, 0.0)
    return largest / most, (nearest_int(inverses.unsqueeze(1) * values) & 255).clamp(max=63)


class Grid:
    """open() fixes d and dmin of the 256; scale and minimum of each 32 are one of 25 pairs around ggml's choice. top:
    the largest level."""

    block, sub, top = 256, 32, 15
    around = (-2, -1, 0, 1, 2)

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.arange(self.top + 1, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> tuple[Tensor, ...]:
        """d and dmin (B, rows), and what ggml would make of each 32 as it is now: scales and mins (B, rows, 8)."""
        flat, weights = (v.reshape(-1, 32).t().contiguous() for v in (x, cost.expand_as(x)))
        scale, low = (
            v.view(*x.shape[:-1], 8) for v in searches(x).make_qkx_quants(self.top, flat, weights, -0.9, 0.05, 36)[:2]
        )
        d, dmin = ((v.amax(-1).clamp(min=0) / 63).half().float() for v in (scale, low))
        near = ((v * inverse(by).unsqueeze(-1)).round() for v, by in ((scale, d), (low, dmin)))
        return d, dmin, *near

    def scales(
        self, x: Tensor, cost: Tensor, state: tuple[Tensor, ...], number: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        d, dmin, sc, m = state
        sc, m = sc[..., number], m[..., number]
        scs = torch.stack([(sc + a).clamp(0, 63) for a in self.around for _ in self.around])
        ms = torch.stack([(m + b).clamp(0, 63) for _ in self.around for b in self.around])
        return scs * d, -(ms * dmin), (scs, ms, d.expand_as(scs), dmin.expand_as(ms))

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        sc, m = (note.int().reshape(-1, 8) for note in notes[:2])
        d, dmin = (half_column(note[..., ::8]) for note in notes[2:])
        packed = pack(d, dmin, sc, m, codes.int().reshape(-1, 256))
        return {"": packed.reshape(*codes.shape[:-1], -1)}


Q4_K = GGMLScheme(
    name="q4_k",
    ggml=GGMLType("Q4_K", id=12, file_type=15, fallback="q5_0"),
    block=256,
    block_bytes=144,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=GPUForm("q4_k", bits=5.0),  # scales and rests of 32 are two bfloat16
    in_mix=True,
)
