"""Attention over the cache that fused.place() fills: a ring or pages, whose lengths only the device knows.

    ring     position p of a row lies in slot p % size                                  keys (rows, kv heads, size, d)
    pages    position p of a row lies in slot p % size of page pages[row, p // size]    keys (pages, kv heads, size, d)

torch's kernels take neither. Against torch's over plain keys, with the group of query heads folded into the queries as
here, these kernels are 1.4 times as fast at head_dim 256, and 2.2 times at 512, where torch has no flash kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import attend_kernels
from dgq.runtime.kernels.repack import COLUMNS


@dataclass(frozen=True)
class KeyValues:
    """One layer's cache. keys, values: bfloat16 of equal strides, as in the module's picture; size is a multiple of 64.
    lengths: int32 (rows,), the tokens that were in each row before the new ones. pages: int32 (rows, n); None:
    rings."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    pages: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """Which tokens a query sees: the row's earlier tokens and all new ones; if causal, no token behind itself.

    window: of the earlier tokens only the last window - 1; if causal, of those before the query. start: int32 (rows,),
    no token before that. reach: int32 (2, tokens) of a causal single row with images: each query also sees so many
    tokens before it, window or not, and so many behind it, which are those of its image (pictured.py).
    """

    window: int | None = None
    causal: bool = False
    start: Tensor | None = None
    reach: Tensor | None = None


@dataclass(frozen=True)
class Blocks:
    """How attend() cuts its work into programs."""

    queries: int  # of a program
    keys: int  # of one iteration
    warps: int
    stages: int  # of loads
    apart: bool = True  # whether blocks of keys that all queries see are computed without masks
    pieces: int = 1  # of the values' columns, a program each


def blocks_for(dim: int, device: torch.device) -> Blocks:
    """The fastest cut for heads of `dim`, as measured on Hopper; where shared memory is smaller, one that fits
    there."""
    room = 227 << 10
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        room = getattr(properties, "shared_memory_per_block_optin", room)  # not in torch's annotations
    if dim > 256:
        return Blocks(64, 32, 4, 3, True, 2) if room >= 210 << 10 else Blocks(32, 16, 8, 2, False)
    if dim > 128:
        return Blocks(64, 64, 4, 3) if room >= 224 << 10 else Blocks(64, 32, 4, 2)
    return Blocks(64, 64, 4, 2)


def attend(
    q: Tensor,
    cache: KeyValues,
    mask: Mask,
    ordered: bool = False,
    blocks: Blocks | None = None,
    splits: int | None = None,
) -> Tensor:
    """softmax(q k^T) v, unscaled -> bfloat16 (rows, tokens, heads * head_dim).

    q: (rows, heads, tokens, head_dim) as place() returned it, after it put the new tokens into the cache. A ring has at
    least window - 1 + tokens slots, or as many as the row will ever have tokens. ordered: each token's columns are in
    the order of repack.in_order(). blocks, splits (parts of the keys): chosen by measurement unless given.
    """
    rows, heads, tokens, dim = q.shape
    keys, values, pages, reach = cache.keys, cache.values, cache.pages, mask.reach
    _, kv_heads, size, _ = keys.shape
    group = heads // kv_heads
    cut = blocks_for(dim, q.device) if blocks is None else blocks
    assert q.is_contiguous() and keys.stride() == values.stride() and size % cut.keys == 0
    assert not ordered or heads * dim % COLUMNS == 0
    assert reach is None or (mask.causal and rows == 1 and reach.shape == (2, tokens) and reach.is_contiguous())
    row_blocks, heads_and_pieces = triton.cdiv(group * tokens, cut.queries), kv_heads * cut.pieces
    splits = _splits(row_blocks * heads_and_pieces * rows, q.device) if splits is None else splits
    out = torch.empty(rows, tokens, heads * dim, dtype=torch.bfloat16, device=q.device)
    parts, weights = out, None
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        weights = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    table = 0 if pages is None else pages.stride(0)
    attend_kernels.attend[(row_blocks, heads_and_pieces, rows * splits)](
        q, keys, values, pages, cache.lengths, mask.start, reach, parts, weights, tokens, group, *keys.stride()[:3],
        table, size, 1 << 30 if mask.window is None else mask.window, splits, D=dim, WIDTH=dim // cut.pieces,
        BLOCK_M=cut.queries, BLOCK_N=cut.keys, SPLIT=splits > 1, CAUSAL=mask.causal, PAGED=pages is not None,
        ORDERED=ordered, APART=cut.apart, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    if weights is not None:
        attend_kernels.join[(rows * tokens,)](
            parts, weights, out, tokens, heads, rows * heads * tokens, splits, D=dim,
            HEADS=triton.next_power_of_2(heads), ORDERED=ordered, num_warps=8,
        )  # fmt: skip
    return out


def _splits(programs: int, device: torch.device) -> int:
    """How many parts the keys are split into, so that all programs together fill the processors once."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(8, processors // programs))
