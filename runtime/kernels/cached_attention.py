"""Attention over what fused.place() has put into a cache: a ring, or pages, with lengths that only the device knows.

torch's kernels take neither: beside them (with the group of query heads folded into the queries, as here) these are
1.4 times as fast at head_dim 256 and 2.2 times at 512, where torch has no flash kernel at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import attend_kernels
from dgq.runtime.kernels.repack import COLUMNS


@dataclass(frozen=True)
class Blocks:
    """How attend() cuts its work: queries and keys of a program, warps, stages of loads; apart: whether keys that all
    queries see are gone through without masks; pieces: of the values' columns, a program each."""

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = True
    pieces: int = 1


def blocks_for(dim: int, device: torch.device) -> Blocks:
    """As measured on Hopper; where shared memory is smaller, what fits there."""
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
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    window: int | None = None,
    causal: bool = False,
    start: Tensor | None = None,
    pages: Tensor | None = None,
    ordered: bool = False,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
    splits: int | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T) v, unscaled: place()'s queries over the tokens in the cache -> bfloat16 (rows, tokens, heads *
    head_dim).

    A row's queries see the length[row] tokens that are there and all of the queries' own ones; causal: only those up
    to themselves. window: only the last window - 1 of the length[row], or, causal, of those before the query. start
    int32 (rows,): no token before that. keys, values, pages: as place() has them; size is a multiple of 64, and at
    least window - 1 + tokens, or whatever length + tokens will be. ordered: a token's columns as repack.in_order puts
    them. reach int32 (2, tokens), of a causal single row: each query also sees so many of the row's tokens before it,
    window or not, and so many of its own ones behind it (those of its image: pictured.py).
    """
    rows, heads, tokens, dim = q.shape
    _, kv_heads, size, _ = keys.shape
    group = heads // kv_heads
    cut = blocks_for(dim, q.device) if blocks is None else blocks
    assert q.is_contiguous() and keys.stride() == values.stride() and size % cut.keys == 0
    assert not ordered or heads * dim % COLUMNS == 0
    assert reach is None or (causal and rows == 1 and reach.shape == (2, tokens) and reach.is_contiguous())
    row_blocks, heads_and_pieces = triton.cdiv(group * tokens, cut.queries), kv_heads * cut.pieces
    splits = _splits(row_blocks * heads_and_pieces * rows, q.device) if splits is None else splits
    out = torch.empty(rows, tokens, heads * dim, dtype=torch.bfloat16, device=q.device) if out is None else out
    parts, weights = out, None
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        weights = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    table = 0 if pages is None else pages.stride(0)
    attend_kernels.attend[(row_blocks, heads_and_pieces, rows * splits)](
        q, keys, values, pages, length, start, reach, parts, weights, tokens, group, *keys.stride()[:3], table, size,
        1 << 30 if window is None else window, splits, D=dim, WIDTH=dim // cut.pieces, BLOCK_M=cut.queries,
        BLOCK_N=cut.keys, SPLIT=splits > 1, CAUSAL=causal, PAGED=pages is not None, ORDERED=ordered, APART=cut.apart,
        STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    if weights is not None:
        attend_kernels.join[(rows * tokens,)](
            parts, weights, out, tokens, heads, rows * heads * tokens, splits, D=dim,
            HEADS=triton.next_power_of_2(heads), ORDERED=ordered, num_warps=8,
        )  # fmt: skip
    return out


def _splits(programs: int, device: torch.device) -> int:
    """As many parts of the keys as make one wave of programs."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(8, processors // programs))
