"""Q6_K: 256 weights in 210 bytes, with an 8-bit scale for every 16 of them.

ql:u8[128] | qh:u8[64] | scales:i8[16] | d:f16          w = (d * scale) * (q - 32)
per half (128 weights) and l < 32: weight l + 32k takes its low 4 bits from nibble k//2 of ql[l + 32*(k%2)] and its
high 2 bits from bits 2k of qh[l]
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.quant.schemes.ggml.blocks import GGMLScheme, Unpacked, half_value
from dgq.quant.schemes.ggml.grid import half_column, inverse, searches
from dgq.quant.schemes.ggml.on_device import half, join, low_bytes, positions
from dgq.quant.schemes.ggml.search import GROUP_MAX_EPS, make_qx_quants, nearest_int, numbers, signed_max
from dgq.quant.types import GGMLType, GPUForm


def unpack(b: Tensor) -> Unpacked:
    """uint8 (…, blocks, 210) -> integers -32 … 31 and scales, in 16 groups of 16."""
    ql = b[..., :128].unflatten(-1, (2, 2, 32))  # half, k % 2, l
    qh = b[..., 128:192].unflatten(-1, (2, 1, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).unsqueeze(-1)
    high = ((qh >> shifts) & 3) << 4  # half, k, l
    q = (torch.cat((ql & 15, ql >> 4), -2) | high).to(torch.int8) - 32
    scale = half_value(b[..., 208:210]) * b[..., 192:208].view(torch.int8)
    return q.flatten(-3).unflatten(-1, (16, 16)), scale.unsqueeze(-1), None


def encode(x: Tensor, importance: Tensor | None) -> Tensor:
    """x (rows, in) float32 and importance (in,) -> uint8 (blocks, 210), ggml's bytes."""
    columns = positions(x, 16)
    weight = columns * columns if importance is None else positions(importance.expand_as(x), 16)
    scales, level = make_qx_quants(32, columns, weight)
    magnitude, extreme = signed_max(positions(scales, 16))
    one, full = numbers([1.0, -128.0], x)
    iscale = full / extreme
    d = half(one / iscale)
    quantised = nearest_int(iscale.unsqueeze(1) * scales.view(-1, 16)).clamp(max=127)
    scale = (d.float() * quantised).view(-1)
    level = torch.where(scale != 0, nearest_int(columns / scale).clamp_(-32, 31) + 32, level.to(torch.int32))
    packed = pack(d, quantised, level.t().reshape(-1, 256))
    return torch.where(magnitude.unsqueeze(1) < GROUP_MAX_EPS, 0, packed)


def pack(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """d float16 (blocks, 1), scales int32 (blocks, 16), q int32 (blocks, 256) in 0 … 63 -> uint8 (blocks, 210)."""
    q = q.view(-1, 2, 4, 32)  # half, k, l
    low, high = q & 15, q >> 4
    ql = (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1)
    qh = (high << torch.arange(0, 8, 2, dtype=torch.int32, device=q.device).unsqueeze(1)).sum(2).flatten(1)
    return join(low_bytes(ql), low_bytes(qh), low_bytes(scales), d)


class Grid:
    """open() fixes d of the 256; the scale of each 16 is one of the five 8-bit codes around ggml's choice."""

    block, sub = 256, 16
    offsets = (-2, -1, 0, 1, 2)

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.arange(-32, 32, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """d (B, rows), and what ggml would make of each 16 as it is now: codes (B, rows, 16)."""
        flat, weights = (v.reshape(-1, 16).t().contiguous() for v in (x, cost.expand_as(x)))
        best = searches(x).make_qx_quants(32, flat, weights)[0].view(*x.shape[:-1], 16)
        largest = best.gather(-1, best.abs().argmax(-1, keepdim=True)).squeeze(-1)
        d = (largest / -128).half().float()
        return d, (best * inverse(d).unsqueeze(-1)).round()

    def scales(
        self, x: Tensor, cost: Tensor, state: tuple[Tensor, Tensor], number: int
    ) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        d, near = state
        codes = torch.stack([(near[..., number] + offset).clamp(-128, 127) for offset in self.offsets])
        return codes * d, None, (codes, d.expand_as(codes))

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        d = half_column(notes[1][..., ::16])
        packed = pack(d, notes[0].int().reshape(-1, 16), codes.int().reshape(-1, 256))
        return {"": packed.reshape(*codes.shape[:-1], -1)}


Q6_K = GGMLScheme(
    name="q6_k",
    ggml=GGMLType("Q6_K", id=14, file_type=18, fallback="q8_0"),
    block=256,
    block_bytes=210,
    unpack_blocks=unpack,
    encode=encode,
    grid=Grid,
    gpu=GPUForm("q6_k", bits=9.0, embedding=True),
    in_mix=True,
)
