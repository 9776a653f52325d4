"""ggml's searches for the scale of a block (search.py), in one launch each, for error feedback (Triton).

The same candidates are tried by the same formulas; sums go over a block in any order and products may be fused, so
that where two candidates are nearly as good the other one may win. Where bytes must be ggml's, search.py is used.

A program takes BLOCKS blocks, one a thread, whose positions stay in registers: tiles (positions, BLOCKS).
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgq.quant.schemes.ggml.search import GROUP_MAX_EPS

BLOCKS, WARPS = 32, 1
_EPS = tl.constexpr(GROUP_MAX_EPS)


def make_qx_quants(nmax: int, x: Tensor, weight: Tensor) -> tuple[Tensor]:
    """x and weight (positions, blocks) float32, positions a power of two -> scale (blocks,) of x ~ scale * l, with l
    in -nmax … nmax - 1; 0 where the block is 0."""
    scale = torch.empty_like(x[0])
    _qx[triton.cdiv(x.shape[1], BLOCKS),](
        x.contiguous(), weight.contiguous(), scale, x.shape[1],
        NMAX=nmax, POSITIONS=len(x), BLOCKS=BLOCKS, num_warps=WARPS,
    )  # fmt: skip
    return (scale,)


def make_qkx_quants(
    nmax: int, x: Tensor, weight: Tensor, rmin: float, rdelta: float, nstep: int
) -> tuple[Tensor, Tensor]:
    """x and weight (positions, blocks) float32, positions a power of two -> scale and -min (blocks,) of
    x ~ scale * l + min, with l in 0 … nmax and min at most 0."""
    scale, rest = torch.empty_like(x[0]), torch.empty_like(x[0])
    _qkx[triton.cdiv(x.shape[1], BLOCKS),](
        x.contiguous(), weight.contiguous(), scale, rest, x.shape[1], rmin + nmax, rdelta,
        NMAX=nmax, STEPS=nstep, POSITIONS=len(x), BLOCKS=BLOCKS, num_warps=WARPS,
    )  # fmt: skip
    return scale, rest


@triton.jit
def _rounded(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """To the nearest integer, ties to even, of LOW … HIGH; NaN to LOW."""
    value = tl.where(value > LOW, value, LOW)
    value = tl.where(value < HIGH, value, HIGH)
    down = tl.floor(value)
    rest = value - down
    odd = down - 2 * tl.floor(down * 0.5)
    return down + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), 1.0, 0.0)


@triton.jit(do_not_specialize=["count"])
def _qx(
    x, weight, scale, count, NMAX: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < count
    at = tl.arange(0, POSITIONS).to(tl.int64)[:, None] * count + block[None, :]
    v, w = tl.load(x + at, real[None, :], 0.0), tl.load(weight + at, real[None, :], 0.0)
    high, low = tl.max(v, 0), tl.min(v, 0)
    extreme = tl.where(high >= -low, high, low)
    zero = tl.abs(extreme) < _EPS
    extreme = tl.where(zero, 1.0, extreme)
    wv = w * v
    best = tl.zeros((BLOCKS,), tl.float32)
    fitted = tl.zeros((BLOCKS,), tl.float32)
    for n in range(19):  # the middle first
        step = tl.where(n == 0, 0, tl.where(n < 10, n - 10, n - 9))
        level = _rounded(v * (-(NMAX + 0.1 * step) / extreme)[None, :], -NMAX, NMAX - 1)
        xl, l2 = tl.sum(wv * level, 0), tl.sum(w * level * level, 0)
        better = (l2 > 0) & ((n == 0) | (xl * xl > best * l2))
        candidate = xl / tl.where(l2 > 0, l2, 1.0)
        fitted = tl.where(better, candidate, fitted)
        best = tl.where(better, candidate * xl, best)
    tl.store(scale + block, tl.where(zero, 0.0, fitted), real)


@triton.jit
def _error(v, w, level, scale, low):
    difference = level * scale[None, :] + low[None, :] - v
    return tl.sum(difference * difference * w, 0)


@triton.jit
def _inverse(number, span):
    """number / span, 0 where that is no use."""
    quotient = number / tl.where(span > 0, span, 1.0)
    return tl.where((span > 0) & (quotient < float("inf")), quotient, 0.0)


@triton.jit(do_not_specialize=["count"])
def _qkx(
    x, weight, scale, rest, count, first, delta,
    NMAX: tl.constexpr, STEPS: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < count
    at = tl.arange(0, POSITIONS).to(tl.int64)[:, None] * count + block[None, :]
    v, w = tl.load(x + at, real[None, :], 0.0), tl.load(weight + at, real[None, :], 0.0)
    high, low = tl.max(v, 0), tl.minimum(tl.min(v, 0), 0.0)
    sum_w, sum_x = tl.sum(w, 0), tl.sum(w * v, 0)
    inverse = _inverse(NMAX, high - low)
    fitted = (high - low) / NMAX
    best = _error(v, w, _rounded((v - low[None, :]) * inverse[None, :], 0, NMAX), fitted, low)
    for n in range(STEPS + 1):
        inverse = _inverse(first + delta * n, high - low)
        level = _rounded((v - low[None, :]) * inverse[None, :], 0, NMAX)
        wl = w * level
        sum_l, sum_l2, sum_xl = tl.sum(wl, 0), tl.sum(wl * level, 0), tl.sum(wl * v, 0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        solvable = determinant > 0
        divisor = tl.where(solvable, determinant, 1.0)
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        alone = sum_xl / tl.where(sum_l2 > 0, sum_l2, 1.0)
        new_scale = tl.where(new_low > 0, alone, (sum_w * sum_xl - sum_x * sum_l) / divisor)
        new_low = tl.minimum(new_low, 0.0)
        error = _error(v, w, level, new_scale, new_low)
        better = solvable & (error < best)
        best = tl.where(better, error, best)
        fitted = tl.where(better, new_scale, fitted)
        low = tl.where(better, new_low, low)
    tl.store(scale + block, fitted, real)
    tl.store(rest + block, -low, real)
