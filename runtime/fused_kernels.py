"""Triton kernels of a denoising step's small parts; fused.py says what each is for.

The sampler reads every logit once. A vocabulary is cut into slices, a program each, which holds its slice in registers:

    logits ── slices ─┬─ largest, its place, sum of e, sum of e * log e ── pick ── entropy, argmax, sampled token
    (n, vocab)        └─ e in bfloat16 (n, vocab), every row with a factor of its own, which pick finds

with e = 2^(y - the slice's largest), y = log2 of a token's unscaled probability. So an entropy near zero is a sum of
small numbers, not a difference of large ones, and no temperature overflows. A token is found as rng.inverse_cdf finds
it, on three levels: slice, chunk, token.

Where Triton interprets, on a CPU, assembly is spelt out.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.moe_decode import INTERPRETED, to_bfloat16

_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_CHUNK = tl.constexpr(512)
# e is written times a power of two that depends on the temperature alone: at most 2^100, so that sums over the
# vocabulary stay finite, and at least 2^-60 for a row's likeliest token; `rewrite` does rows that are below.
_HIGHEST, _LOWEST = tl.constexpr(100.0), tl.constexpr(-60.0)


@triton.jit
def _exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2_share(logits, softcap, temperature):
    """softcap * tanh(logits / softcap) / temperature * log2(e); tanh(u) = 1 - 2 / (e^2u + 1)."""
    bound = softcap / temperature * _LOG2E
    return bound - 2 * bound * _reciprocal(1 + _exp2(logits * (2 * _LOG2E / softcap)))


@triton.jit
def _shift(softcap, temperature):
    """The power of two that e is divided by where it is written."""
    return softcap / temperature * _LOG2E - _HIGHEST


@triton.jit
def slices(
    logits, temperature, done, largest, first, mass, weighted, probabilities, stride, canvas, vocab, softcap,
    SLICE: tl.constexpr, WRITE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program (position, slice): the slice's largest y, the first token that has it, and the sums of e and e log2 e."""
    position, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = position // canvas
    if tl.load(done + row) != 0:
        return
    heat = tl.load(temperature + row)
    token = number * SLICE + tl.arange(0, SLICE)
    if EVEN:
        y = _log2_share(tl.load(logits + position * stride + token).to(tl.float32), softcap, heat)
        top = tl.max(y)
        y -= top
        e = _exp2(y)
        place = tl.min(tl.where(y == 0, token, 1 << 30))
        terms = e * y
    else:
        real = token < vocab
        y = _log2_share(tl.load(logits + position * stride + token, real, other=0.0).to(tl.float32), softcap, heat)
        top = tl.max(tl.where(real, y, float("-inf")))
        y -= top
        e = tl.where(real, _exp2(y), 0.0)
        place = tl.min(tl.where(real & (y == 0), token, 1 << 30))
        terms = e * y
    to = position * tl.num_programs(1) + number
    tl.store(largest + to, top)
    tl.store(first + to, place)
    tl.store(mass + to, tl.sum(e))
    tl.store(weighted + to, tl.sum(terms))
    if WRITE:
        e *= _exp2(top - _shift(softcap, heat))
        at = probabilities + position * vocab + token
        if EVEN:
            tl.store(at, to_bfloat16(e))
        else:
            tl.store(at, to_bfloat16(e), token < vocab)


@triton.jit
def _search(weights, target, N: tl.constexpr):
    """rng._search for weights (N,) float64: the first index whose cumulative weight exceeds target, and how far target
    lies into it."""
    index = tl.arange(0, N)
    upto = tl.cumsum(weights)
    counted = tl.where(weights > 0, upto, -1.0)
    hit = tl.min(tl.where((counted > target) | (counted == tl.max(counted)), index, N - 1))
    return hit, target - tl.sum(tl.where(index == hit, upto - weights, 0.0))


@triton.jit
def _words(seed, position, step, block, number):
    """The first two of Philox4x32-10's words, uint32."""
    zero = position * 0
    a, b, _, _ = tl.philox(
        tl.load(seed).to(tl.uint64, bitcast=True), position.to(tl.uint32), (zero + step).to(tl.uint32),
        (zero + block).to(tl.uint32), (zero + number).to(tl.uint32), n_rounds=10,
    )  # fmt: skip
    return a, b


@triton.jit
def _fresh(word, vocab):
    return (word.to(tl.uint64) * vocab.to(tl.uint64) >> 32).to(tl.int64)


@triton.jit
def pick(
    logits, temperature, done, seed, step, block, numbers, largest, first, mass, weighted, entropy, argmax, sampled,
    whole, stride, canvas, vocab, count, softcap, SLICE: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program position: its entropy in nats, argmax and sampled token. whole (n, 3): what the row of probabilities is
    to be multiplied with, the largest y, the sum of e."""
    position = tl.program_id(0).to(tl.int64)
    row = position // canvas
    if tl.load(done + row) != 0:
        return
    heat = tl.load(temperature + row)
    index = tl.arange(0, COUNT)
    real = index < count
    tops = tl.load(largest + position * count + index, real, other=float("-inf"))
    top = tl.max(tops)
    lower = tl.where(real, tops - top, 0.0)
    share = tl.where(real, tl.exp2(lower), 0.0)
    sums = share * tl.load(mass + position * count + index, real, other=0.0)
    total = tl.sum(sums)
    terms = tl.sum(share * tl.load(weighted + position * count + index, real, other=0.0) + sums * lower)
    tl.store(entropy + position, (tl.log2(total) - terms / total) * _LN2)
    best = tl.min(tl.where(tops == top, index, COUNT - 1))
    tl.store(argmax + position, tl.load(first + position * count + best).to(tl.int64))
    shift = _shift(softcap, heat)
    factor = tl.where(top - shift < _LOWEST, 1.0, 1.0 / (total * tl.exp2(top - shift)))
    tl.store(whole + 3 * position, factor)
    tl.store(whole + 3 * position + 1, top)
    tl.store(whole + 3 * position + 2, total)

    lane = (position % canvas).to(tl.int32) + tl.zeros((1,), tl.int32)
    word, _ = _words(seed, lane, tl.load(step + row), tl.load(block + row), tl.load(numbers + row))
    u = tl.sum((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    wide = sums.to(tl.float64)
    number, rest = _search(wide, u * tl.sum(wide), COUNT)
    own = tl.load(largest + position * count + number)
    rest /= tl.sum(tl.where(index == number, share, 0.0)).to(tl.float64)
    begin = logits + position * stride
    token = number * SLICE + tl.arange(0, SLICE)
    e = _exp2(_log2_share(tl.load(begin + token, token < vocab, other=0.0).to(tl.float32), softcap, heat) - own)
    e = tl.where(token < vocab, e, 0.0)
    chunk, rest = _search(tl.sum(e.reshape(CHUNKS, _CHUNK), 1).to(tl.float64), rest, CHUNKS)
    token = number * SLICE + chunk * _CHUNK + tl.arange(0, _CHUNK)
    e = _exp2(_log2_share(tl.load(begin + token, token < vocab, other=0.0).to(tl.float32), softcap, heat) - own)
    inside, _ = _search(tl.where(token < vocab, e, 0.0).to(tl.float64), rest, _CHUNK)
    tl.store(sampled + position, (number * SLICE + chunk * _CHUNK + inside).to(tl.int64))


@triton.jit
def rewrite(
    logits, temperature, done, whole, probabilities, stride, canvas, vocab, softcap, count, SLICE: tl.constexpr
):  # fmt: skip
    """Program (position, some slices): true probabilities where `slices` wrote numbers too small."""
    position = tl.program_id(0).to(tl.int64)
    row = position // canvas
    heat, top = tl.load(temperature + row), tl.load(whole + 3 * position + 1)
    if (tl.load(done + row) != 0) | (top - _shift(softcap, heat) >= _LOWEST):
        return
    total = tl.load(whole + 3 * position + 2)
    for number in range(tl.program_id(1), count, tl.num_programs(1)):
        token = number * SLICE + tl.arange(0, SLICE)
        y = _log2_share(tl.load(logits + position * stride + token, token < vocab).to(tl.float32), softcap, heat)
        tl.store(probabilities + position * vocab + token, to_bfloat16(_exp2(y - top) / total), token < vocab)


@triton.jit
def _heat(settings, step):
    """The divisor of step `step`, from 1."""
    steps = tl.load(settings + 2)
    return tl.load(settings) + tl.load(settings + 1) * ((steps + 1 - step) / steps)


@triton.jit
def begin(
    settings, seed, step, block, numbers, temperature, done, streak, took, canvas, length, vocab, C: tl.constexpr
):  # fmt: skip
    """Program row: a canvas of noise and the state before its first step."""
    row, place = tl.program_id(0), tl.arange(0, C)
    _, word = _words(seed, place, 0, tl.load(block + row), tl.load(numbers + row))
    tl.store(canvas + row * length + place, _fresh(word, vocab), place < length)
    tl.store(step + row, 1)
    tl.store(temperature + row, _heat(settings, 1))
    tl.store(done + row, 0)
    tl.store(streak + row, 0)
    tl.store(took + row, 0)


@triton.jit
def decide(
    settings, seed, step, block, numbers, temperature, done, streak, took, canvas, argmax, accepted, mean, entropy,
    found, sampled, length, vocab, C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program row: accept, scramble the others, stop or go on. found: this step's argmax."""
    row, place = tl.program_id(0), tl.arange(0, C)
    if tl.load(done + row) != 0:
        return
    now, run = tl.load(step + row), tl.load(streak + row)  # before others may have stored theirs
    real, at = place < length, row * length + place
    own = tl.load(entropy + at, real, other=float("inf"))
    before = tl.zeros((C,), tl.float32)
    for start in range(0, length, PART):
        other = start + tl.arange(0, PART)
        others = tl.load(entropy + row * length + other, other < length, other=float("inf"))[None, :]
        less = (others < own[:, None]) | ((others == own[:, None]) & (other[None, :] < place[:, None]))
        before += tl.sum(tl.where(less, others, 0.0), 1)
    kept = before <= tl.load(settings + 3)
    _, word = _words(seed, place, now, tl.load(block + row), tl.load(numbers + row))
    tl.store(accepted + at, kept, real)
    tl.store(canvas + at, tl.where(kept, tl.load(sampled + at, real, other=0), _fresh(word, vocab)), real)

    new, old = tl.load(found + at, real, other=0), tl.load(argmax + at, real, other=0)
    same = (tl.sum((new != old).to(tl.int32)) == 0) & (now > 1)
    run = tl.where(same, run + 1, 0)
    average = tl.sum(tl.where(real, own, 0.0)) / length
    stop = (average < tl.load(settings + 4)) & (run.to(tl.float32) >= tl.load(settings + 5))
    tl.store(argmax + at, new, real)
    tl.store(streak + row, run)
    tl.store(mean + row, average)
    tl.store(done + row, stop.to(tl.int8))
    tl.store(took + row, now)
    tl.store(step + row, now + 1)
    tl.store(temperature + row, _heat(settings, now + 1))


@triton.jit
def _inverse_rms(x, width, eps):
    return tl.rsqrt(tl.sum(x * x) / width + eps)


@triton.jit
def _instruction_order(column):
    """Where repack.in_order puts a column: t t a b h p -> a b h t t p."""
    return column // 64 * 64 + (column >> 1 & 7) * 8 + (column >> 4 & 3) * 2 + (column & 1)


@triton.jit
def _store(out, column, value, wide, ORDERED: tl.constexpr):
    """A row's columns, of which those that do not exist are zero, to `wide` places."""
    if ORDERED:
        tl.store(out + _instruction_order(column), to_bfloat16(value), column < wide)
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
def _slot(pages, row, position, table, size, PAGED: tl.constexpr):
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
        page, slot = _slot(pages, row, tl.load(length + row) + i, table, size, PAGED)
        to = page * page_stride + head * head_stride + slot.to(tl.int64) * slot_stride + lane
        first, second = _halves(v + at * v_stride + head * (2 * HALF), None, lane, real, eps, HALF)
        tl.store(values + to, to_bfloat16(first), real)
        tl.store(values + to + HALF, to_bfloat16(second), real)
        _turned(k + at * k_stride + head * (2 * HALF), k_weight, c, s, keys + to, lane, real, eps, HALF)


@triton.jit
def _attended(
    queries, keys, values, places, value_places, key, first, last, position, window, top, total, sums,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys more. MASKED: some are not seen by all, and what lies in empty slots may be no number."""
    k = tl.load(keys + places)
    if INTERPRETED:
        k = k.to(tl.float32)
    scores = tl.dot(queries, k.trans()) * _LOG2E
    if MASKED:
        seen = (key >= first) & (key < last)
        visible = seen[None, :]
        if CAUSAL:
            visible &= (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, -1e30)
        v = tl.load(values + value_places, seen[:, None], other=0.0)
    else:
        v = tl.load(values + value_places)
    higher = tl.maximum(top, tl.max(scores, 1))
    p = _exp2(scores - higher[:, None])
    shrink = _exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    sums *= shrink[:, None]
    if INTERPRETED:  # whose product of bfloat16 is wrong
        sums = tl.dot(to_bfloat16(p).to(tl.float32), v.to(tl.float32), sums)
    else:
        sums = tl.dot(p.to(tl.bfloat16), v, sums)
    return higher, total, sums


@triton.jit
def attend(
    q, keys, values, pages, length, start, out, weights, tokens, group, page_stride, head_stride, slot_stride, table,
    size, window, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, PAGED: tl.constexpr, ORDERED: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a key head's group, folded (group, tokens), over one of some parts of the keys they see,
    and WIDTH of the values' columns (a narrower result leaves room for more queries, but its scores are computed for
    every piece anew). APART: first the blocks of keys that all of them see whole, then those at the edges."""
    head, piece, split = tl.program_id(1) // (D // WIDTH), tl.program_id(1) % (D // WIDTH), tl.program_id(2) % splits
    row, rows, kv_heads = tl.program_id(2) // splits, tl.num_programs(2) // splits, tl.num_programs(1) // (D // WIDTH)
    held = tl.load(length + row)
    first = tl.load(start + row) if start is not None else 0
    last = held + tokens
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < group * tokens
    position = held + m % tokens
    if CAUSAL:
        least, most = tl.min(tl.where(real, position, last)), tl.max(tl.where(real, position, 0))
        whole_from, whole_to = tl.maximum(first, most - window + 1), least + 1
        first, last = tl.maximum(first, least - window + 1), most + 1
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
            page, slot = _slot(pages, row, block * BLOCK_N, table, size, PAGED)
            at = page * page_stride + head.to(tl.int64) * head_stride + slot.to(tl.int64) * slot_stride
            top, total, sums = _attended(
                queries, keys + at, values + at, places, value_places, block * BLOCK_N + n, first, last, position,
                window, top, total, sums, CAUSAL, False,
            )  # fmt: skip
    before = inner - tl.minimum(end, begin)
    for i in tl.range(before + end - outer, num_stages=STAGES):
        block = tl.where(i < before, begin + i, outer + i - before)
        page, slot = _slot(pages, row, block * BLOCK_N, table, size, PAGED)
        at = page * page_stride + head.to(tl.int64) * head_stride + slot.to(tl.int64) * slot_stride
        top, total, sums = _attended(
            queries, keys + at, values + at, places, value_places, block * BLOCK_N + n, first, last, position, window,
            top, total, sums, CAUSAL, True,
        )  # fmt: skip
    sums /= tl.where(total > 0, total, 1.0)[:, None]
    if not SPLIT:
        query, heads = m // tokens + head * group, kv_heads * group
        column = query[:, None] * D + wide[None, :]
        if ORDERED:
            column = _instruction_order(column)
        to = out + (row.to(tl.int64) * tokens + m % tokens)[:, None] * (heads * D) + column
        tl.store(to, to_bfloat16(sums), real[:, None])
    else:
        folded += (split * rows).to(tl.int64) * kv_heads * group * tokens
        tl.store(out + folded[:, None] * D + wide[None, :], sums, real[:, None])
        tl.store(weights + folded, tl.where(total > 0, top + tl.log2(total), -2e30), real & (piece == 0))


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
        column = _instruction_order(column)
    tl.store(out + at * heads * D + column, to_bfloat16(sums / total[:, None]), real[:, None])
