"""What each scheme leaves a quantiser to choose: the scales of a few weights, and the level of each.

    value = scale * LEVELS[code] + low          the same for all schemes; what they differ in is which scales there are

    scheme   columns of a scale   levels                      scales
    nvfp4    16                   0 .5 1 1.5 2 3 4 6, ±       E4M3 code * scale_2 of the matrix
    nf4      64                   16 quantiles of a normal    any float32; ours bfloat16, a word in the runtime
    q8_0     32                   -127 … 127                  any half
    q5_0     32                   -16 … 15                    any half, of either sign
    q6_k     16, in 256           -32 … 31                    d * int8, d a half of the 256
    q4_k     32, in 256           0 … 15                      d * 6 bits, and low = -dmin * 6 bits

A grid is one scheme over one weight. open() looks at a block and fixes what its columns share; scales() offers some
candidates for the next few columns, from which whoever asks takes the best by a measure of its own (feedback.py: what
the layer's output loses); pack() turns codes and choices into the scheme's parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dgq.quant.schemes import ggml_search, nf4, nvfp4
from dgq.quant.schemes.ggml_encode import pack_q4_k, pack_q5_0, pack_q6_k
from dgq.quant.types import Scheme


class Grid(Protocol):
    """block: columns that share what open() fixes; sub: columns that share a scale; levels: ascending, float32."""

    block: int
    sub: int
    levels: Tensor

    def open(self, x: Tensor, cost: Tensor) -> Any:
        """x (B, rows, block) -> what scales() needs of the block. cost (B, 1, block): of a squared error in each
        column."""
        ...

    def scales(
        self, x: Tensor, cost: Tensor, state: Any, number: int
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Candidates for columns x (B, rows, sub), the number-th of the block: scale (C, B, rows), low or None (= 0),
        and each candidate's notes (C, B, rows), which pack() gets back."""
        ...

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        """codes uint8 (B, rows, in) and notes (B, rows, in / sub), in the row's order -> parts."""
        ...


def grid_of(scheme: Scheme, weight: Tensor) -> Grid:
    """The grid of `scheme` over a weight (B, rows, in), float32."""
    return _GRIDS[scheme.name](weight)


class NVFP4Grid:
    block = sub = nvfp4.BLOCK
    offsets = (-4, -3, -2, -1, 0, 1, 2, 3, 4, 5)

    def __init__(self, weight: Tensor) -> None:
        self.scale_2 = nvfp4.global_scale(weight.abs().amax((-2, -1))).unsqueeze(-1)  # (B, 1)
        positive = torch.tensor(nvfp4.VALUES, device=weight.device)
        self.levels = torch.cat((-positive[1:].flip(0), positive))
        self._e4m3 = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(weight.device)

    def open(self, x: Tensor, cost: Tensor) -> None:
        return None

    def scales(self, x: Tensor, cost: Tensor, state: None, number: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        base = (x.abs().amax(-1) / (self.scale_2 * 6)).clamp(nvfp4.SCALE_MIN, nvfp4.SCALE_MAX)
        code = base.to(torch.float8_e4m3fn).view(torch.uint8).int()
        codes = torch.stack([(code + offset).clamp(1, 126) for offset in self.offsets])
        return self._e4m3[codes] * self.scale_2, None, (codes,)

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        signed = codes.int() - 7
        code = (signed.abs() + 8 * (signed < 0)).to(torch.uint8)
        scales = notes[0].to(torch.uint8).view(torch.float8_e4m3fn)
        scale_2 = self.scale_2.unsqueeze(-1).expand(*codes.shape[:2], 1)
        return {"": code[..., ::2] | code[..., 1::2] << 4, "weight_scale": scales, "weight_scale_2": scale_2}


class NF4Grid:
    block = sub = nf4.BLOCK
    factors = (0.76, 0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1)

    def __init__(self, weight: Tensor) -> None:
        self.levels = nf4.QUANT_MAP.to(weight.device)

    def open(self, x: Tensor, cost: Tensor) -> None:
        return None

    def scales(self, x: Tensor, cost: Tensor, state: None, number: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        absmax = x.abs().amax(-1)
        candidates = torch.stack([absmax * factor for factor in self.factors]).bfloat16().float()
        return candidates, None, (candidates,)

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        return {"": codes[..., ::2] << 4 | codes[..., 1::2], "absmax": notes[0]}


class _Simple:
    """Q8_0 and Q5_0: blocks of 32 with a half each."""

    block = sub = 32
    lowest = 0
    highest = 0
    factors: tuple[float, ...] = ()

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.arange(self.lowest, self.highest + 1, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> None:
        return None

    def scales(self, x: Tensor, cost: Tensor, state: None, number: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        step = x.abs().amax(-1) / -self.lowest
        d = torch.stack([step * factor for factor in self.factors]).half().float()
        return d, None, (d,)

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        shape = (*codes.shape[:-1], -1)
        d = notes[0].half().reshape(-1, 1)
        return {"": self._bytes(d, codes.reshape(-1, 32)).reshape(shape)}

    def _bytes(self, d: Tensor, codes: Tensor) -> Tensor:
        raise NotImplementedError


class Q80Grid(_Simple):
    lowest, highest = -127, 127
    factors = (0.985, 0.99, 0.995, 1.0, 1.004)

    def _bytes(self, d: Tensor, codes: Tensor) -> Tensor:
        signed = (codes.int() - 127).to(torch.int8)
        return torch.cat((d.view(torch.uint8), signed.view(torch.uint8)), -1)


class Q50Grid(_Simple):
    lowest, highest = -16, 15
    factors = tuple(sign * f for sign in (1, -1) for f in (0.84, 0.88, 0.92, 0.95, 0.98, 1.01, 1.04, 1.07))

    def _bytes(self, d: Tensor, codes: Tensor) -> Tensor:
        return pack_q5_0(d, codes.int())


class Q6KGrid:
    block, sub = 256, 16
    offsets = (-2, -1, 0, 1, 2)

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.arange(-32, 32, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """d (B, rows), and what ggml would make of each 16 as it is now: codes (B, rows, 16)."""
        flat, weights = (v.reshape(-1, 16).t().contiguous() for v in (x, cost.expand_as(x)))
        best = _search(x).make_qx_quants(32, flat, weights)[0].view(*x.shape[:-1], 16)
        largest = best.gather(-1, best.abs().argmax(-1, keepdim=True)).squeeze(-1)
        d = (largest / -128).half().float()
        return d, (best * _inverse(d).unsqueeze(-1)).round()

    def scales(
        self, x: Tensor, cost: Tensor, state: tuple[Tensor, Tensor], number: int
    ) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        d, near = state
        codes = torch.stack([(near[..., number] + offset).clamp(-128, 127) for offset in self.offsets])
        return codes * d, None, (codes, d.expand_as(codes))

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        d = _column(notes[1][..., ::16])
        packed = pack_q6_k(d, notes[0].int().reshape(-1, 16), codes.int().reshape(-1, 256))
        return {"": packed.reshape(*codes.shape[:-1], -1)}


class Q4KGrid:
    block, sub = 256, 32
    around = (-2, -1, 0, 1, 2)

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.arange(16, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> tuple[Tensor, ...]:
        """d and dmin (B, rows), and what ggml would make of each 32 as it is now: scales and mins (B, rows, 8)."""
        flat, weights = (v.reshape(-1, 32).t().contiguous() for v in (x, cost.expand_as(x)))
        found = _search(x).make_qkx_quants(15, flat, weights, -0.9, 0.05, 36)[:2]
        scale, low = (v.view(*x.shape[:-1], 8) for v in found)
        d, dmin = ((v.amax(-1).clamp(min=0) / 63).half().float() for v in (scale, low))
        near = ((v * _inverse(by).unsqueeze(-1)).round() for v, by in ((scale, d), (low, dmin)))
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
        d, dmin = (_column(note[..., ::8]) for note in notes[2:])
        packed = pack_q4_k(d, dmin, sc, m, codes.int().reshape(-1, 256))
        return {"": packed.reshape(*codes.shape[:-1], -1)}


_GRIDS: dict[str, Callable[[Tensor], Grid]] = {
    "nvfp4": NVFP4Grid,
    "nf4": NF4Grid,
    "q8_0": Q80Grid,
    "q5_0": Q50Grid,
    "q6_k": Q6KGrid,
    "q4_k": Q4KGrid,
}


def _search(x: Tensor) -> Any:
    """ggml's searches: of two thousand operations, or on a GPU in one kernel, whose sums are not ggml's to the bit."""
    if not x.is_cuda:
        return ggml_search
    from dgq.quant.feedback import search_kernel  # Triton is where CUDA is

    return search_kernel


def _column(values: Tensor) -> Tensor:
    """Halves, one a row, whose bytes can be looked at: a single value would keep the stride that it came with."""
    return values.half().reshape(-1, 1).clone(memory_format=torch.contiguous_format)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / x, 0.0)
