"""Triton kernels of attention over a cache: softmax(q k^T) v with running sums. Where there are few queries, the keys
are split among programs, and `join` adds the splits up.

    keys     . . . | x x x x | x x x x | x x . .      blocks of a ring or of pages; x: seen by all queries of a block
                  ^first  whole            ^last      whole blocks need no mask; the edges do
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels.fused_kernels import instruction_order, slot_of
from dgq.runtime.kernels.moe_decode import INTERPRETED, to_bfloat16
from dgq.runtime.kernels.sample_kernels import LOG2E, exp2


@triton.jit
def _attended(
    queries, keys, values, places, value_places, key, first, last, since, until, top, total, sums,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running sums. MASKED: not every query sees every key of it, and empty slots may hold
    NaNs. CAUSAL: a query sees the keys from `since` to `until`."""
    k = tl.load(keys + places)
    if INTERPRETED:
        k = k.to(tl.float32)
    scores = tl.dot(queries, k.trans()) * LOG2E
    if MASKED:
        seen = (key >= first) & (key < last)
        visible = seen[None, :]
        if CAUSAL:
            visible &= (key[None, :] >= since[:, None]) & (key[None, :] <= until[:, None])
        scores = tl.where(visible, scores, -1e30)
        v = tl.load(values + value_places, seen[:, None], other=0.0)
    else:
        v = tl.load(values + value_places)
    higher = tl.maximum(top, tl.max(scores, 1))
    p = exp2(scores - higher[:, None])
    shrink = exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    sums *= shrink[:, None]
    if INTERPRETED:  # whose product of bfloat16 is wrong
        sums = tl.dot(to_bfloat16(p).to(tl.float32), v.to(tl.float32), sums)
    else:
        sums = tl.dot(p.to(tl.bfloat16), v, sums)
    return higher, total, sums


@triton.jit
def attend(
    q, keys, values, pages, length, start, reach, out, weights, tokens, group, page_stride, head_stride, slot_stride,
    table, size, window, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, PAGED: tl.constexpr, ORDERED: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a key head's group, folded (group, tokens), over one of some parts of the keys they see,
    and WIDTH of the values' columns (a narrower result leaves room for more queries, but its scores are computed for
    every piece anew). APART: first the blocks of keys that all of them see whole, then those at the edges. reach: what
    queries of an image see beside the window and the tokens up to themselves."""
    head, piece, split = tl.program_id(1) // (D // WIDTH), tl.program_id(1) % (D // WIDTH), tl.program_id(2) % splits
    row, rows, kv_heads = tl.program_id(2) // splits, tl.num_programs(2) // splits, tl.num_programs(1) // (D // WIDTH)
    held = tl.load(length + row)
    first = tl.load(start + row) if start is not None else 0
    last = held + tokens
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < group * tokens
    until = held + m % tokens
    since = until - window + 1
    if reach is not None:
        since = tl.minimum(since, until - tl.load(reach + m % tokens))
        until += tl.load(reach + tokens + m % tokens)
    if CAUSAL:
        whole_from = tl.maximum(first, tl.max(tl.where(real, since, -(1 << 30))))
        whole_to = tl.min(tl.where(real, until, last)) + 1
        first = tl.maximum(first, tl.min(tl.where(real, since, last)))
        last = tl.max(tl.where(real, until, 0)) + 1
    else:
        first = tl.maximum(first, held - window + 1)
        whole_from, whole_to = first, last
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    wide = piece * WIDTH + tl.arange(0, WIDTH)
    folded = (row * kv_heads + head).to(tl.int64) * group * tokens + m
    queries = tl.load(q + folded[:, None] * D + d[None, :], real[:, None], other=0.0)
    if INTERPRETED:
        queries = queries.to(tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    begin, end = first // BLOCK_N, tl.cdiv(last, BLOCK_N)
    each = tl.cdiv(end - begin, splits)
    begin += split * each
    end = tl.minimum(begin + each, end)
    places, value_places = n[:, None] * slot_stride + d[None, :], n[:, None] * slot_stride + wide[None, :]
    inner = tl.minimum(end, begin)
    outer = inner
    if APART:
        inner = tl.minimum(end, tl.maximum(begin, tl.cdiv(whole_from, BLOCK_N)))
        outer = tl.minimum(end, tl.maximum(inner, whole_to // BLOCK_N))
        for block in tl.range(inner, outer, num_stages=STAGES):
            page, slot = slot_of(pages, row, block * BLOCK_N, table, size, PAGED)
            at = page * page_stride + head.to(tl.int64) * head_stride + slot.to(tl.int64) * slot_stride
            top, total, sums = _attended(
                queries, keys + at, values + at, places, value_places, block * BLOCK_N + n, first, last, since,
                until, top, total, sums, CAUSAL, False,
            )  # fmt: skip
    before = inner - tl.minimum(end, begin)
    for i in tl.range(before + end - outer, num_stages=STAGES):
        block = tl.where(i < before, begin + i, outer + i - before)
        page, slot = slot_of(pages, row, block * BLOCK_N, table, size, PAGED)
        at = page * page_stride + head.to(tl.int64) * head_stride + slot.to(tl.int64) * slot_stride
        top, total, sums = _attended(
            queries, keys + at, values + at, places, value_places, block * BLOCK_N + n, first, last, since, until,
            top, total, sums, CAUSAL, True,
        )  # fmt: skip
    sums /= tl.where(total > 0, total, 1.0)[:, None]
    if not SPLIT:
        query, heads = m // tokens + head * group, kv_heads * group
        column = query[:, None] * D + wide[None, :]
        if ORDERED:
            column = instruction_order(column)
        to = out + (row.to(tl.int64) * tokens + m % tokens)[:, None] * (heads * D) + column
        tl.store(to, to_bfloat16(sums), real[:, None])
    else:
        folded += (split * rows).to(tl.int64) * kv_heads * group * tokens
        tl.store(out + folded[:, None] * D + wide[None, :], sums, real[:, None])
        once = real & (tl.zeros((BLOCK_M,), tl.int32) + piece == 0)  # a scalar alone is no mask to some interpreters
        tl.store(weights + folded, tl.where(total > 0, top + tl.log2(total), -2e30), once)


@triton.jit
def join(
    parts, weights, out, tokens, heads, count, splits, D: tl.constexpr, HEADS: tl.constexpr, ORDERED: tl.constexpr
):  # fmt: skip
    """Program (row, token): the splits' results (splits, rows, heads, tokens, D), each by its weight (log2)."""
    at = tl.program_id(0).to(tl.int64)
    row, i = at // tokens, at % tokens
    head, d = tl.arange(0, HEADS), tl.arange(0, D)
    real = head < heads
    place = (row * heads + head) * tokens + i
    top = tl.full((HEADS,), -3e30, tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(weights + s * count + place, real, other=0.0))
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, D), tl.float32)
    for s in range(splits):
        weight = tl.exp2(tl.load(weights + s * count + place, real, other=0.0) - top)
        total += weight
        part = tl.load(parts + (s * count + place)[:, None] * D + d[None, :], real[:, None], other=0.0)
        sums += weight[:, None] * part.to(tl.float32)
    column = head[:, None] * D + d[None, :]
    if ORDERED:
        column = instruction_order(column)
    tl.store(out + at * heads * D + column, to_bfloat16(sums / total[:, None]), real[:, None])
