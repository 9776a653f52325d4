"""Triton kernels for packed weights that every token goes through: repack.py's tiles and ggml's embedding tables.

product      128 rows of the weight, decoded in registers, times a block of tokens: moe_kernels.expert_product
             without experts. With few tokens the columns can be split among programs as well
add          the sum of the splits
unpack       the whole weight decoded, for so many tokens that decoding it once is cheaper
table_rows   rows of a table as ggml stores it, for lookups and for pieces of the head alike
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from dgq.runtime.kernels.moe_decode import INTERPRETED, to_bfloat16, weights
from dgq.runtime.kernels.moe_kernels import _gated, settled


@triton.jit
def product(
    x, out, codes, scales, high, factors, x_stride, out_stride, part_stride, width, tokens, column_tiles,
    SCHEME: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, row tile, split). x (tokens, columns in the instruction's order). out (tokens, width)
    bfloat16, GATED gelu(gate) * up, whole tiles; SPLIT: float32 (splits, tokens, rows of whole tiles)."""
    row_tile, split = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = token < tokens
    at = x + token[:, None].to(tl.int64) * x_stride + tl.arange(0, 64)[None, :]
    tile = row_tile.to(tl.int64) * column_tiles
    each = tl.cdiv(column_tiles, tl.num_programs(2))
    sums = tl.zeros((128, BLOCK_N), tl.float32)
    for step in tl.range(split * each, tl.minimum(split * each + each, column_tiles), num_stages=STAGES):
        some = tl.load(at + step * 64, real[:, None], other=0.0)
        values = weights(codes, scales, high, tile + step, SCHEME)
        if INTERPRETED:  # whose product of bfloat16 is wrong
            sums = tl.dot(values.to(tl.float32), some.to(tl.float32).trans(), sums)
        else:
            sums = settled(tl.dot(values, some.trans(), sums))
    sums *= tl.load(factors + row_tile)
    row = row_tile * 128 + tl.arange(0, 128)
    begin = out + token[:, None].to(tl.int64) * out_stride
    if SPLIT:
        tl.store(begin + split.to(tl.int64) * part_stride + row[None, :], sums.trans(), real[:, None])
    elif GATED:
        gate, up = sums.reshape(8, 2, 8, BLOCK_N).permute(0, 2, 3, 1).split()
        result = _gated(gate, up).reshape(64, BLOCK_N)
        row = row_tile * 64 + tl.arange(0, 64)
        tl.store(begin + row[None, :], to_bfloat16(result.trans()), real[:, None])
    else:
        tl.store(begin + row[None, :], to_bfloat16(sums.trans()), real[:, None] & (row < width)[None, :])


@triton.jit
def add(parts, out, stride, part_stride, out_stride, width, splits, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, piece of the width): the sum of the splits; GATED as `product` has it."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    if GATED:
        at = parts + token * stride + column // 8 * 16 + column % 8
        gate, up = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for s in range(splits):
            gate += tl.load(at + s * part_stride, real, other=0.0)
            up += tl.load(at + s * part_stride + 8, real, other=0.0)
        total = _gated(gate, up)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for s in range(splits):
            total += tl.load(parts + s * part_stride + token * stride + column, real, other=0.0)
    tl.store(out + token * out_stride + column, to_bfloat16(total), real)


@triton.jit
def gated(both, out, stride, width, BLOCK: tl.constexpr):
    """Program (token, piece): gelu(gate) * up of both (tokens, 2 * width), the gates first."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    gate = tl.load(both + token * stride + column, real, other=0.0).to(tl.float32)
    up = tl.load(both + token * stride + width + column, real, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, to_bfloat16(_gated(gate, up)), real)


@triton.jit
def unpack(
    out, codes, scales, high, factors, rows, column_tiles, half, SCHEME: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """Program (row tile, column tile) -> out (rows, columns in the instruction's order, whole tiles) bfloat16; GATED:
    the gates' rows from 0, the ups' from `half`, both in the order in which the next product counts its columns."""
    row_tile, column_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values = weights(codes, scales, high, row_tile * column_tiles + column_tile, SCHEME)
    values = values.to(tl.float32) * tl.load(factors + row_tile)
    r, column = tl.arange(0, 128), column_tile * 64 + tl.arange(0, 64)
    if GATED:
        row = (r // 8 % 2) * half + row_tile * 64 + r // 16 * 8 + r % 8
    else:
        row = row_tile * 128 + r
    at = out + row[:, None] * (column_tiles * 64) + column[None, :]
    tl.store(at, to_bfloat16(values), (row < rows)[:, None])


@triton.jit
def table_rows(
    ids, table, halves, out, first, columns, row_bytes, factor, SCHEME: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (i, piece of the columns): row ids[i], or first + i, of a table of ggml's blocks, as ggml decodes it and
    rounded to bfloat16; times factor if that is not 0. halves: the same bytes as float16."""
    i = tl.program_id(0)
    row = (tl.load(ids + i) if ids is not None else first + i).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    if SCHEME == "q8_0":
        block = row * row_bytes + column // 32 * 34
        scale = tl.load(halves + block // 2, real, other=0.0).to(tl.float32)
        code = tl.load(table + block + 2 + column % 32, real, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:  # q6_k
        block = row * row_bytes + column // 256 * 210
        half, k, lane = column // 128 % 2, column // 32 % 4, column % 32
        low = tl.load(table + block + half * 64 + k % 2 * 32 + lane, real, other=0).to(tl.int32) >> (k // 2 * 4)
        top = tl.load(table + block + 128 + half * 32 + lane, real, other=0).to(tl.int32) >> (2 * k)
        code = ((low & 15) | (top & 3) << 4).to(tl.float32) - 32
        own = tl.load(table + block + 192 + column % 256 // 16, real, other=0).to(tl.int8, bitcast=True)
        scale = tl.load(halves + block // 2 + 104, real, other=0.0).to(tl.float32) * own.to(tl.float32)
    value = to_bfloat16(scale * code)
    if factor != 0:
        value = to_bfloat16(value.to(tl.float32) * factor)
    tl.store(out + i.to(tl.int64) * columns + column, value, real)
