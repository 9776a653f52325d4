"""Triton kernels between a layer's products: norms and the additions before them, routing, RoPE, and writing to the
cache's slots. They compute in float32, and read and write bfloat16. A program computes one token, or a few."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels.moe_decode import to_bfloat16


@triton.jit
def _inverse_rms(x, width, eps):
    return tl.rsqrt(tl.sum(x * x) / width + eps)


@triton.jit
def instruction_order(column):
    """Where repack.in_order puts a column: t t a b h p -> a b h t t p."""
    return column // 64 * 64 + (column >> 1 & 7) * 8 + (column >> 4 & 3) * 2 + (column & 1)


@triton.jit
def _store(out, column, value, wide, ORDERED: tl.constexpr):
    """Store a row of `wide` columns, of which those behind the width are zero."""
    if ORDERED:
        tl.store(out + instruction_order(column), to_bfloat16(value), column < wide)
    else:
        tl.store(out + column, to_bfloat16(value), column < wide)


@triton.jit
def norm(
    x,
    y,
    scale,
    weight,
    out,
    x_stride,
    y_stride,
    scale_stride,
    width,
    wide,
    factor,
    eps,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program row: out = norm((x + y) * scale * factor) * weight; y, scale (a row's own) and weight may be None."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * x_stride + column, real, other=0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + row * y_stride + column, real, other=0.0).to(tl.float32)
    if scale is not None:
        value *= tl.load(scale + row * scale_stride)
    value *= factor
    value *= _inverse_rms(value, width, eps)
    if weight is not None:
        value *= tl.load(weight + column, real, other=0.0)
    _store(out + row * wide, column, value, wide, ORDERED)


@triton.jit
def mixed(
    x, seen, after, dense, routed, router_scale, to_dense, to_routed, to_router, width, dense_wide, wide, factor, eps,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program row, after attention: x += norm(seen) * after; what MLP, experts and router read of the new x."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real, at = column < width, row * width + column
    value = tl.load(seen + at, real, other=0.0).to(tl.float32)
    value *= _inverse_rms(value, width, eps) * tl.load(after + column, real, other=0.0)
    kept = to_bfloat16(value + tl.load(x + at, real, other=0.0).to(tl.float32))
    tl.store(x + at, kept, real)
    value = kept.to(tl.float32)
    value *= _inverse_rms(value, width, eps)
    _store(to_dense + row * dense_wide, column, value * tl.load(dense + column, real, other=0.0), dense_wide, ORDERED)
    _store(to_routed + row * wide, column, value * tl.load(routed + column, real, other=0.0), wide, True)
    scale = tl.load(router_scale + column, real, other=0.0).to(tl.float32) * factor
    tl.store(to_router + at, to_bfloat16(value * scale), real)


@triton.jit
def fed(
    x, dense, routed, dense_weight, routed_weight, both_weight, scalar, following, out, width, wide, eps,
    K: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program row, after the MLP and the experts, whose K parts are summed: the layer's x, and what the next reads."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    real, at = column < width, row * width + column
    one = tl.load(dense + at, real, other=0.0).to(tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(K):
        other += tl.load(routed + (row * K + i) * width + column, real, other=0.0).to(tl.float32)
    one *= _inverse_rms(one, width, eps) * tl.load(dense_weight + column, real, other=0.0)
    other *= _inverse_rms(other, width, eps) * tl.load(routed_weight + column, real, other=0.0)
    both = one + other
    both *= _inverse_rms(both, width, eps) * tl.load(both_weight + column, real, other=0.0)
    value = tl.load(x + at, real, other=0.0).to(tl.float32) + both
    kept = to_bfloat16(value * tl.load(scalar).to(tl.float32))
    tl.store(x + at, kept, real)
    value = kept.to(tl.float32)
    value *= _inverse_rms(value, width, eps) * tl.load(following + column, real, other=0.0)
    _store(out + row * wide, column, value, wide, ORDERED)


@triton.jit
def route(
    scores, scale, chosen, share, tokens, experts, K: tl.constexpr, PICKS: tl.constexpr, EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens' K best experts, the first of equals, and their shares of the softmax over those K times scale."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert, pick = tl.arange(0, EXPERTS)[None, :], tl.arange(0, PICKS)[None, :]
    real = (token < tokens)[:, None]
    left = tl.load(scores + token[:, None] * experts + expert, real & (expert < experts), other=float("-inf"))
    left = left.to(tl.float32)
    top = tl.max(left, 1)
    numbers = tl.zeros((TOKENS, PICKS), tl.int32)
    weights = tl.zeros((TOKENS, PICKS), tl.float32)
    for i in tl.static_range(K):
        best = tl.max(left, 1)
        number = tl.min(tl.where((left == best[:, None]) & (expert < experts), expert, EXPERTS), 1)
        number = tl.minimum(number, experts - 1)  # scores that are no numbers are equal to nothing
        left = tl.where(expert == number[:, None], float("-inf"), left)
        numbers = tl.where(pick == i, number[:, None], numbers)
        weights = tl.where(pick == i, tl.exp(best - top)[:, None], weights)
    weights /= tl.sum(weights, 1)[:, None]
    weights *= tl.load(scale + numbers).to(tl.float32)
    to = token[:, None] * K + pick
    tl.store(chosen + to, numbers, real & (pick < K))
    tl.store(share + to, weights, real & (pick < K))


@triton.jit
def angles(length, frequencies, cos, sin, tokens, half, HALF: tl.constexpr):
    """Program token: cos and sin of its position's angles. The position is length[row] + its place."""
    token, lane = tl.program_id(0), tl.arange(0, HALF)
    position = tl.load(length + token // tokens) + token % tokens
    angle = position.to(tl.float32) * tl.load(frequencies + lane, lane < half, other=0.0)
    tl.store(cos + token * half + lane, tl.cos(angle), lane < half)
    tl.store(sin + token * half + lane, tl.sin(angle), lane < half)


@triton.jit
def slot_of(pages, row, position, table, size, PAGED: tl.constexpr):
    """Page and place in it of a row's position: of its own ring, or of the page that its table names."""
    if PAGED:
        return tl.load(pages + row * table + position // size).to(tl.int64), position % size
    else:
        return row.to(tl.int64), position % size


@triton.jit
def _halves(x, weight, lane, real, eps, HALF: tl.constexpr):
    """A head's two halves, normed: x points to heads (n, 1)."""
    a, b = tl.load(x + lane, real, other=0.0).to(tl.float32), tl.load(x + HALF + lane, real, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    if weight is not None:
        return a * scale * tl.load(weight + lane), b * scale * tl.load(weight + HALF + lane)
    else:
        return a * scale, b * scale


@triton.jit
def _turned(x, weight, c, s, to, lane, real, eps, HALF: tl.constexpr):
    """Heads at x normed, turned by cos c and sin s, stored at `to`."""
    a, b = _halves(x, weight, lane, real, eps, HALF)
    tl.store(to, to_bfloat16(a * c - b * s), real)
    tl.store(to + HALF, to_bfloat16(b * c + a * s), real)


@triton.jit
def place(
    q, k, v, q_weight, k_weight, cos, sin, out, keys, values, pages, length, q_stride, k_stride, v_stride, tokens,
    heads, kv_heads, page_stride, head_stride, slot_stride, table, size, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Program (token, part): 0 norms and turns the queries, 1 keys and values, which go to the token's slot."""
    at = tl.program_id(0).to(tl.int64)
    row, i = at // tokens, at % tokens
    lane = tl.arange(0, HALF)[None, :]
    c, s = tl.load(cos + at * HALF + lane).to(tl.float32), tl.load(sin + at * HALF + lane).to(tl.float32)
    if tl.program_id(1) == 0:
        query = tl.arange(0, HEADS)[:, None]
        to_query = out + ((row * heads + query) * tokens + i) * (2 * HALF) + lane
        _turned(q + at * q_stride + query * (2 * HALF), q_weight, c, s, to_query, lane, query < heads, eps, HALF)
    else:
        head = tl.arange(0, KV_HEADS)[:, None]
        real = head < kv_heads
        page, slot = slot_of(pages, row, tl.load(length + row) + i, table, size, PAGED)
        to = page * page_stride + head * head_stride + slot.to(tl.int64) * slot_stride + lane
        first, second = _halves(v + at * v_stride + head * (2 * HALF), None, lane, real, eps, HALF)
        tl.store(values + to, to_bfloat16(first), real)
        tl.store(values + to + HALF, to_bfloat16(second), real)
        _turned(k + at * k_stride + head * (2 * HALF), k_weight, c, s, keys + to, lane, real, eps, HALF)
