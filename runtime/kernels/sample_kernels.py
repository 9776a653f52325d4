"""Triton kernels of the sampler and of a step's decisions. sampler.py and rng.py define what they compute.

Every logit is read once. The vocabulary is cut into slices, and each program holds one slice in registers:

    logits ── slices ─┬─ largest, its place, sum of e, sum of e * log e ── pick ── entropy, argmax, sampled token
    (n, vocab)        └─ e in bfloat16 (n, vocab), every row with a factor of its own, which pick finds

with e = 2^(y - the slice's largest y), where y is the log2 of a token's unscaled probability. So an entropy near zero
is a sum of small numbers and not a difference of large ones, and no temperature overflows. A token is sampled as
rng.inverse_cdf() does, but on three levels: slice, chunk, token.

Triton's interpreter, on a CPU, has no inline assembly: there the same operations are written out.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels.moe_decode import INTERPRETED, to_bfloat16

LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_CHUNK = tl.constexpr(512)
# e is written times a power of two that depends on the temperature alone: at most 2^100, so that sums over the
# vocabulary stay finite, and at least 2^-60 for a row's likeliest token; `rewrite` does rows that are below.
_HIGHEST, _LOWEST = tl.constexpr(100.0), tl.constexpr(-60.0)


@triton.jit
def exp2(x):
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
    bound = softcap / temperature * LOG2E
    return bound - 2 * bound * _reciprocal(1 + exp2(logits * (2 * LOG2E / softcap)))


@triton.jit
def _shift(softcap, temperature):
    """The power of two that e is divided by where it is written."""
    return softcap / temperature * LOG2E - _HIGHEST


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
        e = exp2(y)
        place = tl.min(tl.where(y == 0, token, 1 << 30))
        terms = e * y
    else:
        real = token < vocab
        y = _log2_share(tl.load(logits + position * stride + token, real, other=0.0).to(tl.float32), softcap, heat)
        top = tl.max(tl.where(real, y, float("-inf")))
        y -= top
        e = tl.where(real, exp2(y), 0.0)
        place = tl.min(tl.where(real & (y == 0), token, 1 << 30))
        terms = e * y
    to = position * tl.num_programs(1) + number
    tl.store(largest + to, top)
    tl.store(first + to, place)
    tl.store(mass + to, tl.sum(e))
    tl.store(weighted + to, tl.sum(terms))
    if WRITE:
        e *= exp2(top - _shift(softcap, heat))
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
    word, _ = _words(seed + row, lane, tl.load(step + row), tl.load(block + row), tl.load(numbers + row))
    u = tl.sum((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    wide = sums.to(tl.float64)
    number, rest = _search(wide, u * tl.sum(wide), COUNT)
    slice_top = tl.load(largest + position * count + number)
    rest /= tl.sum(tl.where(index == number, share, 0.0)).to(tl.float64)
    begin = logits + position * stride
    token = number * SLICE + tl.arange(0, SLICE)
    e = exp2(_log2_share(tl.load(begin + token, token < vocab, other=0.0).to(tl.float32), softcap, heat) - slice_top)
    e = tl.where(token < vocab, e, 0.0)
    chunk, rest = _search(tl.sum(e.reshape(CHUNKS, _CHUNK), 1).to(tl.float64), rest, CHUNKS)
    token = number * SLICE + chunk * _CHUNK + tl.arange(0, _CHUNK)
    e = exp2(_log2_share(tl.load(begin + token, token < vocab, other=0.0).to(tl.float32), softcap, heat) - slice_top)
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
        tl.store(probabilities + position * vocab + token, to_bfloat16(exp2(y - top) / total), token < vocab)


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
    _, word = _words(seed + row, place, 0, tl.load(block + row), tl.load(numbers + row))
    tl.store(canvas + row * length + place, _fresh(word, vocab), place < length)
    tl.store(step + row, 1)
    tl.store(temperature + row, _heat(settings, 1))
    tl.store(done + row, 0)
    tl.store(streak + row, 0)
    tl.store(took + row, 0)


@triton.jit
def decide(
    settings, seed, step, block, numbers, temperature, done, streak, took, canvas, argmax, accepted, mean, entropy,
    newest, sampled, length, vocab, C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program row: accept, scramble the others, stop or go on. newest: this step's argmax."""
    row, place = tl.program_id(0), tl.arange(0, C)
    if tl.load(done + row) != 0:
        return
    now, run = tl.load(step + row), tl.load(streak + row)  # before others may have stored theirs
    real, at = place < length, row * length + place
    mine = tl.load(entropy + at, real, other=float("inf"))
    before = tl.zeros((C,), tl.float32)
    for start in range(0, length, PART):
        other = start + tl.arange(0, PART)
        others = tl.load(entropy + row * length + other, other < length, other=float("inf"))[None, :]
        less = (others < mine[:, None]) | ((others == mine[:, None]) & (other[None, :] < place[:, None]))
        before += tl.sum(tl.where(less, others, 0.0), 1)
    kept = before <= tl.load(settings + 3)
    _, word = _words(seed + row, place, now, tl.load(block + row), tl.load(numbers + row))
    tl.store(accepted + at, kept, real)
    tl.store(canvas + at, tl.where(kept, tl.load(sampled + at, real, other=0), _fresh(word, vocab)), real)

    new, old = tl.load(newest + at, real, other=0), tl.load(argmax + at, real, other=0)
    same = (tl.sum((new != old).to(tl.int32)) == 0) & (now > 1)
    run = tl.where(same, run + 1, 0)
    average = tl.sum(tl.where(real, mine, 0.0)) / length
    stop = (average < tl.load(settings + 4)) & (run.to(tl.float32) >= tl.load(settings + 5))
    tl.store(argmax + at, new, real)
    tl.store(streak + row, run)
    tl.store(mean + row, average)
    tl.store(done + row, stop.to(tl.int8))
    tl.store(took + row, now)
    tl.store(step + row, now + 1)
    tl.store(temperature + row, _heat(settings, now + 1))
