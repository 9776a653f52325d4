"""Triton kernels of the routed experts: tokens sorted by expert, weights decoded in registers, no atomics.

chosen ── sort_picks ── map_tiles ──┬── expert_product ───────────┬── expert_product ── combine ── sum
 (tokens, k)   picks by expert      tiles of   gelu(gate) * up  tiles of   times share     over k
                                    tokens                      the same
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels import pair_table
from dgq.runtime.kernels.moe_decode import INTERPRETED, to_bfloat16, weights


@triton.jit
def _gated(gate, up):
    """gelu_tanh(gate) * up; 0.5 * (1 + tanh(u)) is the logistic function of 2u."""
    u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * up / (1 + tl.exp(-u))


@triton.jit
def settled(sums):
    """The product, finished. Triton 3.6 cuts one whose first operand lies in registers into four, of which three may
    still run when the next iteration overwrites those registers; where the result is used at once, it waits."""
    if INTERPRETED:
        return sums
    return tl.inline_asm_elementwise("", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def expert_product(
    x, out, codes, scales, high, factors, order, share, tile_map, x_stride, out_stride, width, row_tiles, column_tiles,
    k, SCHEME: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """One tile of tokens times 128 rows of its expert's weight.

    GATED: x has a row a token, and gelu(gate) * up goes to out, a row a pick, in `order`. Else x is such an out, and
    the product times the pick's share goes to out (picks as `chosen` has them, width). Neither gated nor with shares:
    x has a row a token, and the product goes to out (picks in `order`, width). PAIRED: see moe_decode.py's weights().
    A tile that is at most half full is multiplied as one of half the size, because the matrix instruction's time and
    the decoding's add up.
    """
    row_tile = tl.program_id(0)
    cut = tile_map + 3 * tl.program_id(1)
    expert, first, last = tl.load(cut), tl.load(cut + 1), tl.load(cut + 2)
    if expert < 0:
        return
    pairs = 0
    if PAIRED:
        pairs = pair_table.fill(high + 1024)
    if last - first <= BLOCK_N // 2:
        _tile_product(
            x, out, codes, scales, high, pairs, factors, order, share, expert, first, last, x_stride, out_stride, width,
            row_tile, row_tiles, column_tiles, k, SCHEME, GATED, PAIRED, BLOCK_N // 2, STAGES, UNROLL,
        )  # fmt: skip
        return
    _tile_product(
        x, out, codes, scales, high, pairs, factors, order, share, expert, first, last, x_stride, out_stride, width,
        row_tile, row_tiles, column_tiles, k, SCHEME, GATED, PAIRED, BLOCK_N, STAGES, UNROLL,
    )  # fmt: skip


@triton.jit
def _tile_product(
    x, out, codes, scales, high, pairs, factors, order, share, expert, first, last, x_stride, out_stride, width,
    row_tile, row_tiles, column_tiles, k, SCHEME: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """expert_product() of the picks from `first` to `last` in `order`, BLOCK_N at most."""
    slot = first + tl.arange(0, BLOCK_N)
    real = slot < last
    pick = tl.load(order + slot, real, other=0)
    rows = pick // k if share is None else slot
    column = tl.arange(0, 64)
    at = x + rows[:, None].to(tl.int64) * x_stride + column[None, :]
    tile = (expert.to(tl.int64) * row_tiles + row_tile) * column_tiles
    sums = tl.zeros((128, BLOCK_N), tl.float32)
    for step in tl.range(column_tiles, num_stages=STAGES, loop_unroll_factor=UNROLL):
        tokens = tl.load(at + step * 64, real[:, None], other=0.0)
        values = weights(codes, scales, high, tile + step, SCHEME, pairs, PAIRED)
        if INTERPRETED:  # whose product of bfloat16 is wrong
            sums = tl.dot(values.to(tl.float32), tokens.to(tl.float32).trans(), sums)
        else:
            sums = tl.dot(values, tokens.trans(), sums)
            if UNROLL == 1:  # the compiled code of two steps in one waits
                sums = settled(sums)
    sums *= tl.load(factors + expert)
    if GATED:
        gate, up = sums.reshape(8, 2, 8, BLOCK_N).permute(0, 2, 3, 1).split()
        result = _gated(gate, up).reshape(64, BLOCK_N)
        row = row_tile * 64 + tl.arange(0, 64)
        to = out + slot[:, None].to(tl.int64) * out_stride + row[None, :]
        tl.store(to, to_bfloat16(result.trans()), real[:, None])
    else:
        row = row_tile * 128 + tl.arange(0, 128)
        if share is None:
            result, place = sums, slot
        else:
            result, place = sums * tl.load(share + pick, real, other=0.0)[None, :], pick
        to = out + place[:, None].to(tl.int64) * out_stride + row[None, :]
        tl.store(to, to_bfloat16(result.trans()), real[:, None] & (row < width)[None, :])


@triton.jit
def sort_picks(chosen, order, bounds, picks, BLOCK: tl.constexpr):
    """Program e: the picks of expert e, rising, into order (picks,); where they begin, into bounds (E + 1,)."""
    expert = tl.program_id(0)
    below, mine = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, picks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        picked = tl.load(chosen + at, at < picks, other=1 << 30)
        below += (picked < expert).to(tl.int32)
        mine += (picked == expert).to(tl.int32)
    begin = tl.sum(below)
    tl.store(bounds + expert, begin)
    if expert == tl.num_programs(0) - 1:
        tl.store(bounds + expert + 1, begin + tl.sum(mine))
    for start in range(0, picks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        hit = tl.load(chosen + at, at < picks, other=1 << 30) == expert
        rank = tl.cumsum(hit.to(tl.int32))
        tl.store(order + begin + rank - 1, at, hit)
        begin += tl.sum(hit.to(tl.int32))


@triton.jit
def map_tiles(bounds, tile_map, experts, tiles, BLOCK_N: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr):
    """Cut each expert's picks into tiles of BLOCK_N: tile_map (tiles, 3) gets expert, first pick, last; -1 behind."""
    expert = tl.arange(0, EXPERTS)
    first = tl.load(bounds + expert, expert < experts, other=0)
    last = tl.load(bounds + expert + 1, expert < experts, other=0)
    count = tl.cdiv(last - first, BLOCK_N)
    place = tl.cumsum(count) - count
    unused = tl.arange(0, TILES)
    tl.store(tile_map + 3 * unused, unused * 0 - 1, (unused >= tl.sum(count)) & (unused < tiles))
    for i in range(tl.max(count)):
        to = tile_map + 3 * (place + i)
        tl.store(to, expert, i < count)
        tl.store(to + 1, first + i * BLOCK_N, i < count)
        tl.store(to + 2, tl.minimum(last, first + (i + 1) * BLOCK_N), i < count)


@triton.jit
def combine(parts, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """out (tokens, width) = the sum of each token's k parts, in float32 and always in the same order."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(K):
        total += tl.load(parts + (token * K + i) * width + column, column < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, to_bfloat16(total), column < width)
