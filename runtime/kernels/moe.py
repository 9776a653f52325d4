"""The routed experts' sum by Triton kernels: what layers.experts() does, for weights that repack.tile() prepared.

    sort            picks (token, expert) by expert, cut into tiles of tokens
    first_product   gelu(gate) * up of every pick
    weighted        share * down of every pick        second_product   the same, summed over each token's picks

Everything happens on the device, and nothing waits for the host. The host knows only a bound for the number of tiles of
tokens; programs without a tile end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import moe_kernels, pair_table
from dgq.runtime.kernels.repack import ROWS, Tiles, in_order

_PICKS_AT_ONCE = 1024
_COMBINED_AT_ONCE = 1024
_FEWEST = 32  # tokens of a tile


@dataclass(frozen=True)
class Sorted:
    """Picks (token, expert) sorted by expert. order: int32 (picks,), the numbers token * k + rank, those of each expert
    together and rising. tile_map: int32 (tiles, 3), each tile's expert, and its first place in `order` and the place
    behind its last, at most `block` apart; expert -1 for no tile."""

    order: Tensor
    tile_map: Tensor
    k: int
    block: int


def experts(x: Tensor, chosen: Tensor, share: Tensor, gate_up: Tiles, down: Tiles) -> Tensor:
    """x (tokens, hidden) bfloat16, chosen (tokens, k) expert numbers, share (tokens, k) float32 -> (tokens, hidden).

    A token's k experts are summed in float32, in the order of `chosen`. The inner activations are bfloat16.
    """
    picks = sort(chosen, gate_up.shape[0])
    return second_product(first_product(x, picks, gate_up), picks, share, down)


def parts(x: Tensor, chosen: Tensor, share: Tensor, gate_up: Tiles, down: Tiles) -> Tensor:
    """experts() before the sum, (tokens, k, hidden), of x whose columns are in the order of repack.in_order()."""
    picks = sort(chosen, gate_up.shape[0])
    inner = torch.empty(len(picks.order), gate_up.codes.shape[1] * ROWS // 2, dtype=x.dtype, device=x.device)
    return weighted(_product(x, inner, picks, None, gate_up), picks, share, down)


def by_token(x: Tensor, picks: Sorted, weight: Tiles) -> Tensor:
    """weight @ x of each pick's token, in `order`: (picks, rows). x (tokens, columns) in the order of
    repack.in_order(); weight: tiles whose rows do not alternate."""
    out = torch.empty(len(picks.order), weight.shape[1], dtype=x.dtype, device=x.device)
    return _product(x, out, picks, None, weight, gated=False)


def sort(chosen: Tensor, experts: int) -> Sorted:
    """Sort the picks chosen (tokens, k), int32 or int64. experts: how many there are."""
    picks, k = chosen.numel(), chosen.shape[1]
    block = _tokens_a_tile(picks, experts)
    tiles = min(experts, picks) + picks // block
    order, bounds = (torch.empty(n, dtype=torch.int32, device=chosen.device) for n in (picks, experts + 1))
    tile_map = torch.empty(tiles, 3, dtype=torch.int32, device=chosen.device)
    moe_kernels.sort_picks[(experts,)](chosen.contiguous(), order, bounds, picks, BLOCK=_PICKS_AT_ONCE)
    powers = triton.next_power_of_2(experts), triton.next_power_of_2(tiles)
    moe_kernels.map_tiles[(1,)](bounds, tile_map, experts, tiles, BLOCK_N=block, EXPERTS=powers[0], TILES=powers[1])
    return Sorted(order, tile_map, k, block)


def first_product(x: Tensor, picks: Sorted, gate_up: Tiles) -> Tensor:
    """gelu(gate) * up of each pick, in `order`: (picks, inner up to whole tiles), its columns in the order in which
    second_product() reads them."""
    inner = gate_up.codes.shape[1] * ROWS // 2
    out = torch.empty(len(picks.order), inner, dtype=x.dtype, device=x.device)
    return _product(in_order(x), out, picks, None, gate_up)


def second_product(inner: Tensor, picks: Sorted, share: Tensor, down: Tiles) -> Tensor:
    """The sum over each token's picks of share * (down @ inner): (tokens, hidden)."""
    tokens, hidden = share.shape[0], down.shape[1]
    parts = weighted(inner, picks, share, down)
    result = torch.empty(tokens, hidden, dtype=inner.dtype, device=inner.device)
    grid = tokens, triton.cdiv(hidden, _COMBINED_AT_ONCE)
    moe_kernels.combine[grid](parts, result, hidden, K=picks.k, BLOCK=_COMBINED_AT_ONCE)
    return result


def weighted(inner: Tensor, picks: Sorted, share: Tensor, down: Tiles) -> Tensor:
    """share * (down @ inner) of each pick: (tokens, k, hidden)."""
    out = torch.empty(len(picks.order), down.shape[1], dtype=inner.dtype, device=inner.device)
    return _product(inner, out, picks, share.contiguous(), down).view(share.shape[0], picks.k, -1)


def _product(
    x: Tensor, out: Tensor, picks: Sorted, share: Tensor | None, weight: Tiles, gated: bool | None = None
) -> Tensor:
    gated = share is None if gated is None else gated
    row_tiles, column_tiles = weight.codes.shape[1:3]
    arguments = (
        x, out, weight.codes, weight.scales, weight.high, weight.factors, picks.order, share, picks.tile_map,
        x.stride(0), out.stride(0), out.shape[1], row_tiles, column_tiles, picks.k,
    )  # fmt: skip
    grid, kernel = (row_tiles, len(picks.tile_map)), moe_kernels.expert_product
    options = _options(weight, gated, picks.block)
    if weight.form.startswith("table") and pair_table.is_worthwhile(x.device):
        paired = options | {"PAIRED": True, "STAGES": 3}
        if pair_table.has_room(kernel, grid, arguments, paired):
            options = paired
    kernel[grid](*arguments, **options)
    return out


def _options(weight: Tiles, gated: bool, block: int) -> dict[str, Any]:
    """How the product is compiled. Measured: two steps in one, with fewer stages, are faster where tiles of tokens are
    small and no table is read; registers are capped so that four or three programs fit on a multiprocessor."""
    few, table = block == _FEWEST, weight.form.startswith("table")
    unroll = 2 if few and weight.codes.shape[2] % 2 == 0 and not table else 1
    stages = 5 - unroll if few or weight.form == "bf16" else 3
    options = {"SCHEME": weight.form, "GATED": gated, "PAIRED": False, "BLOCK_N": block, "STAGES": stages}
    if few and (table or weight.form == "nvfp4"):
        options["maxnreg"] = 128
    elif block == 2 * _FEWEST:
        options["maxnreg"] = 160
    return options | {"UNROLL": unroll, "num_warps": 4}


def _tokens_a_tile(picks: int, experts: int) -> int:
    """Tokens of a tile, the columns of the matrix instruction. With more, a busy expert's weights are decoded less
    often; fewer than 32 only make more tiles, so that the kernel halves the tiles that are half empty."""
    power: int = triton.next_power_of_2(picks // experts)
    return min(128, max(_FEWEST, power))
