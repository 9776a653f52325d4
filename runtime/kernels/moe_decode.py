"""A tile of an expert's weight, decoded in registers as the first operand of the tensor cores' matrix instruction.

128 rows and 64 columns, for the four warps of a program. That operand's rows lie in registers, and of a tile a thread
holds, for every bit m, n, a, b, h, p,

    row     m w w n r r r    of warp w and lane 4 * r + t        (bits of a number, highest first)
    column  a b h t t p      as the instruction counts them: four instructions a and b
            t t a b h p      as the model does: a thread has 16 neighbours, and hence few scales

which are 64 weights. repack.py has put them where the thread loads them, 16 bytes at a time, and activations come with
their columns in the instruction's order: nothing moves between threads. Columns p = 0 and 1 are a "pair", the halves of
a 32-bit word, decoded together as two bfloat16:

    bf16           as it is
    q8_0, q6_k     a byte in each half is the bits of q * 2^-133, a subnormal; times a scale, minus the scale's offset
    q5_0, q4_k     the same with a nibble (and a fifth bit); q4_k's codes minus 8 first, then times a scale, plus a rest
    nvfp4          sign to bit 15, the rest to bits 8 to 6: the bits of w * 2^-126; times a scale's code. They lie where
                   a mask finds one of a word's four pairs, and a shift and a mask the next
    tables         a pair of the table's 16 entries from pair_table.py, or their bytes by permute instructions, times
                   the block's scale: NF4, IQ4_NL

NVFP4's weights are exact; the others are rounded, as ggml's scales and NF4's table were before. The powers of two go
into the float32 factor of an expert. Where Triton interprets, on a CPU, assembly and bfloat16 arithmetic are spelt out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels import pair_table

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_HIGH = tl.constexpr(-0x10000)  # 0xFFFF0000
_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000
_TWICE = tl.constexpr(0x10001)
_MINUS_ZERO = tl.constexpr(_SIGNS.value)
_ONE = tl.constexpr(0x3F803F80)
_NIBBLES, _BYTES, _FIFTH = tl.constexpr(0x000F000F), tl.constexpr(0x00FF00FF), tl.constexpr(0x00100010)
_E2M1 = tl.constexpr(0x01C001C0)
_SIGNED_E2M1 = tl.constexpr(_SIGNS.value | _E2M1.value)
_NVFP4_ONE = tl.constexpr(0x75807580)  # see repack.py: scale codes are bits 11 to 4 of a bfloat16 above this one
_MINUS_8, _MINUS_16 = (tl.constexpr(_SIGNS.value | n * 0x10001) for n in (8, 16))  # of 2^-133
_MINUS_32, _MINUS_128 = (tl.constexpr(_SIGNS.value | n * 0x10001) for n in (32, 128))


@triton.jit
def _low_half(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high_half(pair):
    return (pair & _HIGH).to(tl.float32, bitcast=True)


@triton.jit
def _round(x):
    """float32 -> the bits of the nearest bfloat16, in the high half."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & _HIGH


@triton.jit
def to_bfloat16(x):
    if INTERPRETED:  # which cuts off
        return (_round(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _fma(a, b, c):
    """a * b + c of two bfloat16 at once."""
    if INTERPRETED:
        b, c = a * 0 + b, a * 0 + c  # constants become tensors
        low = _round(_low_half(a) * _low_half(b) + _low_half(c))
        return _round(_high_half(a) * _high_half(b) + _high_half(c)) | ((low >> 16) & 0xFFFF)
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _permute(a, b, selector):
    """Four of the eight bytes of b:a, by the nibbles of the selector's low half (0 to 7)."""
    if INTERPRETED:
        result = selector * 0
        for i in tl.static_range(4):
            at = (selector >> (4 * i)) & 7
            byte = (tl.where(at < 4, a, b) >> (8 * (at & 3))) & 255
            result = result | (byte << (8 * i))
        return result
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _twice(words, second):
    """The half of each word that `second` (0 or 1) says, in both halves."""
    return ((words >> (16 * second)) & 0xFFFF) * _TWICE


@triton.jit
def _split(pair):
    """The pair as a last axis of two."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _vector(words, number, lane):
    """A thread's four words of vector `number`: (lane, word)."""
    return tl.load(words + (number * 128 + lane) * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def _scaled(p0, p1, p2, p3, scale, l0, l1, l2, l3):
    """scale * p + l, a word's pairs as last axes (p, h, s0)."""
    s0 = tl.join(_split(_fma(p0, scale, l0)), _split(_fma(p1, scale, l1)))
    return tl.join(s0, tl.join(_split(_fma(p2, scale, l2)), _split(_fma(p3, scale, l3))))


@triton.jit
def _nvfp4(w, scales, tile, lane, mh, M6: tl.constexpr):
    code = tl.load(scales + tile * 128 + lane) >> (16 * M6 + 8 * mh)
    scale = (code & 255) * (16 * _TWICE) + _NVFP4_ONE
    p0, p1 = w & _SIGNED_E2M1, w << 3 & _SIGNED_E2M1
    p2, p3 = (w << 1 & _SIGNS) | (w << 6 & _E2M1), (w << 2 & _SIGNS) | (w >> 3 & _E2M1)
    return _scaled(p0, p1, p2, p3, scale, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO)


@triton.jit
def _entries(table, index, upper):
    """A byte of four of the table's 16: index has the codes' low three bits, upper picks between the table's halves."""
    low = _permute(tl.load(table), tl.load(table + 128), index)
    return _permute(low, _permute(tl.load(table + 256), tl.load(table + 384), index), upper)


@triton.jit
def _table_pairs(table, index, upper):
    low, high = _entries(table, index, upper), _entries(table + 512, index, upper)
    return _permute(low, high, 0x5140), _permute(low, high, 0x7362)


@triton.jit
def _table(w, scales, table, pairs, tile, lane, mh, M6: tl.constexpr, SCHEME: tl.constexpr, PAIRED: tl.constexpr):
    """table64: a scale for 64 columns; table64_split: and what its rounding lost; table32: one for 32 columns."""
    if PAIRED:
        bank = pair_table.bank(lane)
        p0, p1 = pair_table.look(w << 7, bank, pairs), pair_table.look(w >> 1, bank, pairs)
        p2, p3 = pair_table.look(w >> 9, bank, pairs), pair_table.look(w >> 17, bank, pairs)
    else:
        index, upper = w & 0x77777777, (w >> 1 & 0x44444444) | 0x32103210
        p0, p1 = _table_pairs(table, index, upper)
        p2, p3 = _table_pairs(table, index >> 16, upper >> 16)
    if SCHEME == "table64_split":
        at = scales + tile * 128 + M6 * 64 + lane // 4 * 2
        scale, lost = _twice(tl.load(at), mh), _twice(tl.load(at + 1), mh)
        l0, l1 = _fma(p0, lost, _MINUS_ZERO), _fma(p1, lost, _MINUS_ZERO)
        l2, l3 = _fma(p2, lost, _MINUS_ZERO), _fma(p3, lost, _MINUS_ZERO)
        return _scaled(p0, p1, p2, p3, scale, l0, l1, l2, l3)
    elif SCHEME == "table64":
        scale = _twice(tl.load(scales + tile * 64 + M6 * 32 + lane // 4), mh)
        return _scaled(p0, p1, p2, p3, scale, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO)
    else:
        scale = _twice(tl.load(scales + tile * 128 + M6 * 64 + lane // 2), mh)
        return _scaled(p0, p1, p2, p3, scale, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO, _MINUS_ZERO)


@triton.jit
def _q5_0(w, scales, high, tile, lane, word, mh, M6: tl.constexpr):
    scale = _twice(tl.load(scales + tile * 128 + M6 * 64 + lane // 2), mh)
    least = _fma(scale, _MINUS_16, _MINUS_ZERO)
    bits = tl.load(high + tile * 256 + M6 * 128 + lane) >> (4 * word)
    p0, p1 = (w & _NIBBLES) | (bits << 4 & _FIFTH), (w >> 4 & _NIBBLES) | (bits << 3 & _FIFTH)
    p2, p3 = (w >> 8 & _NIBBLES) | (bits << 2 & _FIFTH), (w >> 12 & _NIBBLES) | (bits << 1 & _FIFTH)
    return _scaled(p0, p1, p2, p3, scale, least, least, least, least)


@triton.jit
def _q4_k(w, scales, tile, lane, mh, M6: tl.constexpr):
    at = scales + tile * 256 + M6 * 128 + lane // 2 * 2
    scale, least = _twice(tl.load(at), mh), _twice(tl.load(at + 1), mh)
    # the offset first: scale * q and the minimum would cancel after they were rounded
    p0, p1 = _fma(w & _NIBBLES, _ONE, _MINUS_8), _fma(w >> 4 & _NIBBLES, _ONE, _MINUS_8)
    p2, p3 = _fma(w >> 8 & _NIBBLES, _ONE, _MINUS_8), _fma(w >> 12 & _NIBBLES, _ONE, _MINUS_8)
    return _scaled(p0, p1, p2, p3, scale, least, least, least, least)


@triton.jit
def _four_bits(
    codes, scales, high, pairs, tile, lane, M6: tl.constexpr, SCHEME: tl.constexpr, PAIRED: tl.constexpr
):  # fmt: skip
    """Half a tile, from (lane, mh s1) words of eight codes: (lane, mh s1, p, h, s0)."""
    w = _vector(codes + tile * 1024, M6, lane)
    word = tl.arange(0, 4)[None, :]
    if SCHEME == "nvfp4":
        return _nvfp4(w, scales, tile, lane, word // 2, M6)
    elif SCHEME == "table64" or SCHEME == "table64_split" or SCHEME == "table32":
        return _table(w, scales, high + lane, pairs, tile, lane, word // 2, M6, SCHEME, PAIRED)
    elif SCHEME == "q5_0":
        return _q5_0(w, scales, high, tile, lane, word, word // 2, M6)
    else:
        return _q4_k(w, scales, tile, lane, word // 2, M6)


@triton.jit
def _eight_bits(codes, scales, tile, lane, M6: tl.constexpr, MH: tl.constexpr, SCHEME: tl.constexpr):
    """A quarter of a tile, from (lane, s1 s0) words of four codes: (lane, s1 s0, p, h)."""
    w = _vector(codes + tile * 2048, 2 * M6 + MH, lane)
    if SCHEME == "q8_0":
        scale = _twice(tl.load(scales + tile * 128 + M6 * 64 + lane // 2), MH)
        least = _fma(scale, _MINUS_128, _MINUS_ZERO)
    else:  # q6_k
        scale = _twice(tl.load(scales + tile * 256 + M6 * 128 + lane), MH)
        least = _fma(scale, _MINUS_32, _MINUS_ZERO)
    return tl.join(_split(_fma(w & _BYTES, scale, least)), _split(_fma(w >> 8 & _BYTES, scale, least)))


@triton.jit
def _sixteen_bits(codes, tile, lane, M6: tl.constexpr, MH: tl.constexpr):
    """A quarter of a tile, from (lane, s0 h) words of two weights: (lane, s0 h, p, s1)."""
    s1 = _split(_vector(codes + tile * 4096, 4 * M6 + 2 * MH, lane))
    return tl.join(s1, _split(_vector(codes + tile * 4096, 4 * M6 + 2 * MH + 1, lane)))


@triton.jit
def weights(codes, scales, high, tile, SCHEME: tl.constexpr, pairs=0, PAIRED: tl.constexpr = False):
    """Tile number `tile`, decoded: bfloat16 (128, 64). What follows `lane` moves no value to another thread.
    PAIRED: `pairs` is where pair_table.fill() put a table's pairs."""
    lane = tl.arange(0, 128)[:, None]
    if SCHEME == "bf16":
        first = tl.join(_sixteen_bits(codes, tile, lane, 0, 0), _sixteen_bits(codes, tile, lane, 0, 1))
        other = tl.join(_sixteen_bits(codes, tile, lane, 1, 0), _sixteen_bits(codes, tile, lane, 1, 1))
        parts = tl.join(first, other).reshape(4, 8, 4, 2, 2, 2, 2, 2, 2)  # warp, r, t, s0, h, p, s1, mh, m6
        return parts.permute(8, 0, 7, 1, 6, 3, 4, 2, 5).reshape(128, 64)
    elif SCHEME == "q8_0" or SCHEME == "q6_k":
        first = _eight_bits(codes, scales, tile, lane, 0, 0, SCHEME)
        first = tl.join(first, _eight_bits(codes, scales, tile, lane, 0, 1, SCHEME))
        other = _eight_bits(codes, scales, tile, lane, 1, 0, SCHEME)
        other = tl.join(other, _eight_bits(codes, scales, tile, lane, 1, 1, SCHEME))
        parts = tl.join(first, other).reshape(4, 8, 4, 2, 2, 2, 2, 2, 2)  # warp, r, t, s1, s0, p, h, mh, m6
        return parts.permute(8, 0, 7, 1, 3, 4, 6, 2, 5).reshape(128, 64)
    else:
        first = _four_bits(codes, scales, high, pairs, tile, lane, 0, SCHEME, PAIRED)
        parts = tl.join(first, _four_bits(codes, scales, high, pairs, tile, lane, 1, SCHEME, PAIRED))
        parts = parts.reshape(4, 8, 4, 2, 2, 2, 2, 2, 2)  # warp, r, t, mh, s1, p, h, s0, m6
        return parts.permute(8, 0, 3, 1, 4, 7, 6, 2, 5).reshape(128, 64)
