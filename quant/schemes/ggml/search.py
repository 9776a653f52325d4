"""The searches inside ggml's quantisers, in torch, float for float: which scale fits a block best?

    make_qx_quants     x ~ scale * (l - nmax)      signed levels: Q6_K's sub-blocks, Q5_0 with importance
    make_qkx_quants    x ~ scale * l + min         ggml's make_qkx2_quants and make_qkx3_quants: Q4_K's sub-blocks
    make_qp_quants     x ~ scale * l               levels of Q4_K's scales and minima, with importance

Each tries some twenty scales: it rounds the block to levels, fits the best scale to those levels by weighted least
squares, and keeps what has the least error. One wrong last bit makes another candidate win and changes the bytes, so
every float32 operation is ggml's: the same operands in the same order, each rounded once. (Its builds for x86-64 use
neither FMA nor fast-math.) Blocks lie side by side:

    x (positions, blocks)   a loop of C over a block is a loop over the first axis, one torch operation for all blocks;
                            a sum therefore adds position after position, which torch.sum would not
                            a branch of C is a torch.where; what a dead lane computes is thrown away, NaN or not

The same operations give the same bits on the CPU and on CUDA, with care: torch's CUDA kernels divide by a Python
number by multiplying with its reciprocal, and `number / tensor` does so everywhere. Numbers in divisions are tensors
here, powers of two excepted. Fused operations (addcmul, lerp, baddbmm) are not used.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

GROUP_MAX_EPS = 1e-15  # float32 below
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves a float's nearest integer (ties to even) in the low 23 bits
_MANTISSA, _ZERO = 0x7FFFFF, 0x400000  # those bits, and what they hold for 0


def numbers(values: list[float] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """float32 numbers on `like`'s device; unpacked, 0-dim tensors: see above for why. Not to be written to."""
    return _numbers(tuple(np.asarray(values, np.float32).tolist()), like.device)


@cache
def _numbers(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def square_root(x: torch.Tensor) -> torch.Tensor:
    """sqrtf, correctly rounded: torch's float32 sqrt on the CPU (MKL's) misses the last bit of a number in five."""
    return x.double().sqrt().float()


def sum_positions(terms: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """0 + terms[0] + terms[1] + … along `axis`, in that order; ggml starts its sums with 0, so -0 alone becomes +0."""
    first, *rest = terms.unbind(axis)
    total = first + 0.0
    for term in rest:
        total.add_(term)
    return total


def nearest_int(value: torch.Tensor) -> torch.Tensor:
    """ggml's nearest_int, out of its range too: int32, where beyond 2^22 it wraps, and NaN is 0 as on x86."""
    inf = float("inf")  # CUDA's NaN has all mantissa bits set, x86's only the first
    return ((value.nan_to_num(0.0, inf, -inf) + _ROUND).view(torch.int32) & _MANTISSA) - _ZERO


def signed_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, blocks) -> the largest magnitude and the first element that has it; NaN is passed over."""
    best, magnitude = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for value, size in zip(x, x.abs(), strict=True):
        larger = size > magnitude
        best, magnitude = torch.where(larger, value, best), torch.where(larger, size, magnitude)
    return magnitude, best


def make_qx_quants(nmax: int, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scale (blocks,), levels 0 … 2 nmax - 1 (positions, blocks) as float32, 0 where the block is 0."""
    magnitude, extreme = signed_max(x)
    zero = magnitude < GROUP_MAX_EPS
    extreme = torch.where(zero, 1.0, extreme)  # so that nothing below overflows: |iscale * x| stays near nmax
    steps = np.arange(-9, 10, dtype=np.float32)
    first, *others = numbers([-nmax, *-(np.float32(nmax) + np.float32(0.1) * steps[steps != 0])], x)
    weighted = weight * x
    terms = x.new_empty(2, *x.shape)

    def levels(iscale: torch.Tensor) -> torch.Tensor:
        return (x * iscale).round_().clamp_(-nmax, nmax - 1)

    def sums(iscale: torch.Tensor) -> torch.Tensor:
        level = levels(iscale)
        torch.mul(weighted, level, out=terms[0])
        torch.mul(weight, level, out=terms[1]).mul_(level)
        return sum_positions(terms, 1)  # sum of w x l, sum of w l l

    used = first / extreme
    xl, l2 = sums(used)
    scale = torch.where(l2 != 0, xl / l2, 0.0)
    best = scale * xl
    for number in others:
        iscale = number / extreme
        xl, l2 = sums(iscale)
        better = (l2 > 0) & (xl * xl > best * l2)
        candidate = xl / l2
        scale = torch.where(better, candidate, scale)
        best = torch.where(better, candidate * xl, best)
        used = torch.where(better, iscale, used)
    return torch.where(zero, 0.0, scale), torch.where(zero, 0.0, levels(used) + nmax)


def make_qkx_quants(
    nmax: int, x: torch.Tensor, weight: torch.Tensor, rmin: float, rdelta: float, nstep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> scale (blocks,), -min (blocks,), levels 0 … nmax (positions, blocks) as float32.

    A better fit moves min, and later candidates are rounded from there: where weights are 0, `max - min` may come so
    near 0 that nearest_int leaves its range and wraps. (llama.cpp's newest make_qkx3_quants clamps first, the ggml
    that dgq installs does not.) It shows in sub-blocks whose scale becomes 0, where nobody reads the levels.
    """
    low, high = x.amin(0).clamp(max=0.0), x.amax(0)
    terms = x.new_empty(3, *x.shape)
    terms[0] = weight
    torch.mul(weight, x, out=terms[1])
    sum_w, sum_x = sum_positions(terms[:2], 1)

    def error(scale: torch.Tensor, low: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        difference = level.mul_(scale).add_(low).sub_(x)
        return sum_positions(difference.mul_(difference).mul_(weight))

    (one, full), steps = numbers([1.0, nmax], x), np.arange(nstep + 1, dtype=np.float32)
    iscale = full / (high - low)
    scale = one / iscale
    used, base = iscale, low  # how the best levels were made
    best = error(scale, low, _qkx_levels(nmax, x, used, base))
    for number in numbers(np.float32(rmin) + np.float32(rdelta) * steps + np.float32(nmax), x):
        iscale = number / (high - low)
        level = _qkx_levels(nmax, x, iscale, low)
        torch.mul(weight, level, out=terms[0])
        torch.mul(terms[0], level, out=terms[1])
        torch.mul(terms[0], x, out=terms[2])
        sum_l, sum_l2, sum_xl = sum_positions(terms, 1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_low > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        new_low = torch.where(positive, 0.0, new_low)
        new_error = error(new_scale, new_low, level)
        better = (determinant > 0) & (new_error < best)
        best, scale = torch.where(better, new_error, best), torch.where(better, new_scale, scale)
        used, base = torch.where(better, iscale, used), torch.where(better, low, base)
        low = torch.where(better, new_low, low)
    return scale, -low, _qkx_levels(nmax, x, used, base)


def _qkx_levels(nmax: int, x: torch.Tensor, iscale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """(x - low) * iscale as the levels 0 … nmax that C makes of it, float32.

    An infinite iscale (all equal, or nearly subnormal), or 0 (the range overflowed), gives C only infinities, NaN and
    0: all of them level 0. From all equal, C returns at once: scale 0 and no better fit, as here.
    """
    live = iscale.isfinite() & (iscale != 0)
    value = (x - torch.where(live, low, 0.0)).mul_(torch.where(live, iscale, 0.0)).add_(_ROUND)
    bits = value.view(torch.int32).bitwise_and_(_MANTISSA).clamp_(_ZERO, _ZERO + nmax)
    bits.bitwise_or_(0x4B000000)  # the exponent of _ROUND again
    return value.sub_(_ROUND)


def make_qp_quants(nmax: int, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scale (blocks,), levels (positions, blocks) int32 in 0 … 255: C keeps them in a uint8_t, wrapping below 0."""
    high = x.amax(0).clamp(min=0.0)
    zero = high < GROUP_MAX_EPS
    tries = np.float32(0.1) * np.array([0, -4, -3, -2, -1, 1, 2, 3, 4], np.float32) + np.float32(nmax)
    one, *tried = numbers([1.0, *tries], x)
    weighted = weight * x

    def mse(iscale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        difference = x - one / iscale * level
        return sum_positions(weight * difference * difference)

    iscale = tried[0] / high
    best = mse(iscale, nearest_int(iscale * x) & 255)
    for number in tried[1:]:
        candidate = number / high
        error = mse(candidate, nearest_int(candidate * x).clamp(max=nmax))
        better = error < best
        best, iscale = torch.where(better, error, best), torch.where(better, candidate, iscale)
    level = nearest_int(iscale * x).clamp(max=nmax)
    xl, l2 = sum_positions(torch.stack((weighted * level, weight * level * level)), 1)
    level &= 255
    for _ in range(5):  # C stops after a round without a change, and another one changes nothing
        for position in range(len(x)):
            old, w, wx = level[position], weight[position], weighted[position]
            less_xl, less_l2 = xl - wx * old, l2 - w * old * old
            new = nearest_int(x[position] * less_l2 / less_xl).clamp(max=nmax)
            new_xl, new_l2 = less_xl + wx * new, less_l2 + w * new * new
            better = (less_xl > 0) & (less_l2 > 0) & (new != old) & (new_xl * new_xl * l2 > xl * xl * new_l2)
            xl, l2 = torch.where(better, new_xl, xl), torch.where(better, new_l2, l2)
            level[position] = torch.where(better, new & 255, old)
    scale = torch.where(l2 > 0, xl / l2, 0.0)
    return torch.where(zero, 0.0, scale), torch.where(zero, 0, level)
