"""Quantisers that know what goes through a weight: error feedback, with scales chosen by what they cost.

A weight row w multiplies inputs x; what it loses is (w - q) H (w - q)^T with H = E[x x^T]. Columns are rounded one
after the other, and each one's error is made good in the columns still to come (GPTQ, arXiv 2210.17323):

    H^-1 = U^T U          e_j = (w_j - q_j) / U_jj          w_k -= e_j U_jk   for all k > j          loss = sum e_j^2

Every few columns share a scale. Each candidate scale is tried by rounding those columns with feedback among them, and
the one with the least loss is taken: so the scale is chosen on the weights as the columns before have left them.
Blocks come in the order of their inputs' power, and so do the columns that share a scale: what matters most is rounded
first, while there is still much to make it good with. All experts of a weight are done side by side.

Rows are not alike either. With G = E[g g^T] of the gradients at what comes out, the loss is tr(G (W-Q) H (W-Q)^T), and
what one group of rows lost is made good in the rows still to come, as with columns:

    G^-1 = V^T V          W_rest -= V_own,rest^T V_own,own^-T (W - Q)_own          (two-sided, as in arXiv 2505.22988)

A sweep does every group of rows once more, now that those after it are rounded too: their W_own + G_own,own^-1
G_own,rest (W - Q)_rest is rounded anew, and kept where it loses less.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgq.quant.types import Grid, Scheme

DAMP = 0.02
ROW_GROUPS = 64


def grid_of(scheme: Scheme, weight: Tensor) -> Grid:
    """The grid of `scheme` over a weight (B, rows, in) float32. ValueError for a scheme that leaves no choice."""
    if scheme.grid is None:
        raise ValueError(f"{scheme.name} has no grid: its weights are cast, not chosen")
    return scheme.grid(weight)


def feedback(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    outputs: Tensor | None = None,
    damp: float = DAMP,
    sweeps: int = 0,
) -> dict[str, Tensor]:
    """weight (B, rows, in) float32 and hessian H (B or 1, in, in) float32, of E experts or one matrix -> parts.

    outputs: G (B or 1, rows, rows) float32; None: every row for itself. damp: of the mean power, added to every
    column's and row's. sweeps: of doing each group of rows again, for the others as they have become.
    """
    columns = _Columns(hessian, grid_of(scheme, weight), damp, len(weight))
    if outputs is None:
        return columns.rounded(weight)
    rows = _Rows(columns, hessian, scheme, weight, outputs, damp)
    for _ in range(sweeps):
        rows.sweep()
    return rows.parts()


class _Rows:
    """A weight whose rows make good what other rows lost: groups of rows, rounded one after the other.

    Rows are in an order of their own here, group after group; parts() puts them back.
    """

    def __init__(
        self, columns: _Columns, hessian: Tensor, scheme: Scheme, weight: Tensor, outputs: Tensor, damp: float
    ) -> None:
        self._columns, self._hessian, self._scheme = columns, hessian, scheme
        number = weight.shape[1]
        count = min(ROW_GROUPS, number)
        self._order = torch.cat([torch.arange(first, number, count) for first in range(count)]).to(weight.device)
        sizes = [len(range(first, number, count)) for first in range(count)]
        self._groups = [slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)]
        self._wanted = weight[:, self._order]
        self._curvature = _damped(outputs, self._order.unsqueeze(0), damp)
        self._left = torch.empty_like(self._wanted)  # what was wanted and is not there
        self._done: list[dict[str, Tensor]] = []
        self._round()

    def _round(self) -> None:
        """Round each group, and take what it lost to the rows still to come."""
        factor = _inverse_factor(self._curvature).expand(len(self._wanted), -1, -1)
        target = self._wanted.clone()
        for group in self._groups:
            self._done.append(self._columns.rounded(target[:, group]))
            value = self._scheme.dequantize(self._done[-1]).view_as(target[:, group])
            self._left[:, group] = self._wanted[:, group] - value
            lost = target[:, group] - value
            carried = torch.linalg.solve_triangular(factor[:, group, group].mT, lost, upper=False)
            target[:, group.stop :].baddbmm_(factor[:, group, group.stop :].mT, carried, alpha=-1)

    def sweep(self) -> None:
        """Round each group once more, to what makes good best what all others now lack; keep it if that loses less."""
        for number, group in enumerate(self._groups):
            within, across = self._curvature[:, group, group], self._curvature[:, group].clone()
            across[:, :, group] = 0
            best = torch.linalg.solve(within, across @ self._left)
            parts = self._columns.rounded(self._wanted[:, group] + best)
            new = self._wanted[:, group] - self._scheme.dequantize(parts).view_as(best)
            off = (lack + best for lack in (self._left[:, group], new))
            old, changed = ((within @ lost @ self._hessian).mul_(lost).sum((1, 2)) for lost in off)
            better = (changed < old).view(-1, 1, 1)
            self._left[:, group] = torch.where(better, new, self._left[:, group])
            done = self._done[number]
            self._done[number] = {suffix: torch.where(better, part, done[suffix]) for suffix, part in parts.items()}

    def parts(self) -> dict[str, Tensor]:
        """The parts of all rows, in the weight's order."""
        back = self._order.argsort()
        return {suffix: torch.cat([parts[suffix] for parts in self._done], 1)[:, back] for suffix in self._done[0]}


class _Columns:
    """Rounding of rows column after column: what all rows have in common."""

    def __init__(self, hessian: Tensor, grid: Grid, damp: float, count: int) -> None:
        order = _order(hessian.diagonal(dim1=-2, dim2=-1), grid)
        factor = _inverse_factor(_damped(hessian, order, damp))
        self._order, self._factor = (t.expand(count, *t.shape[1:]) for t in (order, factor))
        self._cost = factor.diagonal(dim1=-2, dim2=-1).pow(-2).unsqueeze(1)
        self._grid = grid
        self._recorded: dict[torch.Size, _Recorded | None] = {}

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (B, rows, in) -> parts. On a GPU the first weight of a shape compiles what there is to compile, the
        second is recorded: these are thousands of small kernels, and starting them takes longer than they do."""
        if not weight.is_cuda or weight.shape not in self._recorded:
            self._recorded[weight.shape] = None
            return self._rounded(weight)
        recorded = self._recorded[weight.shape]
        if recorded is None:
            recorded = self._recorded[weight.shape] = _Recorded(self._rounded, weight)
        return recorded(weight)

    def _rounded(self, weight: Tensor) -> dict[str, Tensor]:
        grid, factor = self._grid, self._factor
        w = weight.gather(-1, self._order.unsqueeze(1).expand_as(weight))
        chosen: list[_Rounded] = []
        for start in range(0, w.shape[-1], grid.block):
            whole = slice(start, start + grid.block)
            state = grid.open(w[..., whole], self._cost[..., whole])
            for number, first in enumerate(range(start, start + grid.block, grid.sub)):
                sub, rest = slice(first, first + grid.sub), slice(first + grid.sub, None)
                rounded = _round(w[..., sub], self._cost[..., sub], grid, state, number, factor[:, sub, sub])
                chosen.append(rounded)
                w[..., rest].baddbmm_(rounded.error, factor[:, sub, rest], alpha=-1)
        codes = torch.cat([rounded.codes for rounded in chosen], -1)
        return _packed(grid, codes, [rounded.notes for rounded in chosen], self._order)


class _Recorded:
    """work, which waits for nothing, as one CUDA graph for weights of a shape."""

    def __init__(self, work: Callable[[Tensor], dict[str, Tensor]], weight: Tensor) -> None:
        self._given, self._graph = torch.empty_like(weight), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._parts = work(self._given)

    def __call__(self, weight: Tensor) -> dict[str, Tensor]:
        self._given.copy_(weight)
        self._graph.replay()
        return {suffix: part.clone() for suffix, part in self._parts.items()}


def search(weight: Tensor, importance: Tensor | None, scheme: Scheme) -> dict[str, Tensor]:
    """Scales with the least weighted squared error, each column rounded for itself. weight (B, rows, in) float32,
    importance (B or 1, in) float32 or None -> parts."""
    grid = grid_of(scheme, weight)
    cost = torch.ones_like(weight[:1, :1]) if importance is None else importance.unsqueeze(1)
    chosen: list[_Rounded] = []
    for start in range(0, weight.shape[-1], grid.block):
        whole = slice(start, start + grid.block)
        state = grid.open(weight[..., whole], cost[..., whole])
        for number, first in enumerate(range(start, start + grid.block, grid.sub)):
            sub = slice(first, first + grid.sub)
            chosen.append(_round(weight[..., sub], cost[..., sub], grid, state, number, None))
    codes = torch.cat([rounded.codes for rounded in chosen], -1)
    notes = zip(*(rounded.notes for rounded in chosen), strict=True)
    return grid.pack(codes, [torch.stack(kind, -1) for kind in notes])


def by_matrix(quantise: Callable[[Tensor], dict[str, Tensor]], weight: Tensor) -> dict[str, Tensor]:
    """quantise, which takes (B, rows, in) float32, over a weight that may be one matrix and of any float dtype."""
    if weight.dim() == 3:
        return quantise(weight.float())
    return {suffix: part[0] for suffix, part in quantise(weight.float().unsqueeze(0)).items()}


def _order(power: Tensor, grid: Grid) -> Tensor:
    """(B, in) power of each column -> the order to go through them: blocks by power; within a block the columns of a
    scale stay where they are, sorted by power among themselves."""
    blocks = power.unflatten(-1, (-1, grid.block))
    first = blocks.sum(-1).argsort(dim=-1, descending=True, stable=True)  # (B, blocks)
    inside = power.unflatten(-1, (-1, grid.sub)).argsort(dim=-1, descending=True, stable=True)
    base = torch.arange(0, power.shape[-1], grid.sub, device=power.device).unsqueeze(-1)
    columns = (inside + base).flatten(1).unflatten(-1, (-1, grid.block))
    order: Tensor = columns.gather(1, first.unsqueeze(-1).expand_as(columns)).flatten(1)
    return order


def _damped(hessian: Tensor, order: Tensor, damp: float) -> Tensor:
    """hessian (B, in, in) in the given order, its power raised."""
    h: Tensor = hessian.gather(1, order.unsqueeze(2).expand_as(hessian)).gather(
        2, order.unsqueeze(1).expand_as(hessian)
    )
    power = h.diagonal(dim1=-2, dim2=-1)
    mean = power.mean(-1, keepdim=True)
    h /= torch.where(mean > 0, mean, 1).unsqueeze(-1)  # gradients are small
    power += damp + (mean == 0)
    return h


def _inverse_factor(h: Tensor) -> Tensor:
    """U, upper, of h^-1 = U^T U."""
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return factor


class _Rounded(NamedTuple):
    """What became of some columns: codes uint8 and errors (B, rows, sub), notes (B, rows)."""

    codes: Tensor
    error: Tensor
    notes: tuple[Tensor, ...]


def _round(x: Tensor, cost: Tensor, grid: Grid, state: Any, number: int, factor: Tensor | None) -> _Rounded:
    """Round columns x (B, rows, sub) with each candidate scale and keep each row's best.

    factor (B, sub, sub): feedback among the columns; None: none, and cost weighs their squared errors."""
    scale, low, notes = grid.scales(x, cost, state, number)
    low = torch.zeros_like(scale) if low is None else low
    if factor is None:
        codes, error, best = _each_alone(x, scale, low, cost, grid.levels)
    elif x.is_cuda:
        from dgq.quant.feedback.round_kernel import round_columns  # Triton is where CUDA is

        codes, error, best = round_columns(x, scale, low, factor, grid.levels)
    else:
        codes, error, best = _one_by_one(x, scale, low, factor, grid.levels)

    return _Rounded(codes, error, tuple(note.gather(0, best.unsqueeze(0))[0] for note in notes))


def _each_alone(x: Tensor, scale: Tensor, low: Tensor, cost: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes (B, rows, sub), errors, and which candidate is each row's best (B, rows)."""
    index = torch.bucketize((x - low.unsqueeze(-1)) * _inverse(scale).unsqueeze(-1), _bounds(levels), out_int32=True)
    error = x - (levels[index] * scale.unsqueeze(-1) + low.unsqueeze(-1))
    return _best(index.to(torch.uint8), error, (error * error * cost).sum(-1))


def _one_by_one(x: Tensor, scale: Tensor, low: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with feedback among the columns."""
    inverse, bounds = _inverse(scale), _bounds(levels)
    left = x.expand(len(scale), *x.shape).clone()
    codes = torch.empty_like(left, dtype=torch.uint8)
    error = torch.empty_like(left)
    for i in range(x.shape[-1]):
        column = left[..., i]
        code = torch.bucketize((column - low) * inverse, bounds)
        codes[..., i] = code
        error[..., i] = (column - (levels[code] * scale + low)) / factor[:, i, i].unsqueeze(-1)
        left[..., i + 1 :] -= error[..., i : i + 1] * factor[:, i, i + 1 :].unsqueeze(1)
    return _best(codes, error, (error * error).sum(-1))


def _best(codes: Tensor, error: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = loss.argmin(0)
    pick = best[None, ..., None].expand(1, *codes.shape[1:])
    return codes.gather(0, pick)[0], error.gather(0, pick)[0], best


def _bounds(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


def _inverse(scale: Tensor) -> Tensor:
    inverse: Tensor = torch.where(scale != 0, 1 / scale, 0.0)
    return inverse


def _packed(grid: Grid, codes: Tensor, notes: list[tuple[Tensor, ...]], order: Tensor) -> dict[str, Tensor]:
    """Back into the row's order, and into parts."""
    natural = torch.empty_like(codes).scatter_(-1, order.unsqueeze(1).expand_as(codes), codes)
    blocks = (order[:, :: grid.block] // grid.block).argsort(-1)  # where each block went

    def back(values: Tensor) -> Tensor:  # (B, rows, in / sub) by block
        by_block = values.unflatten(-1, (blocks.shape[-1], -1))
        natural_order: Tensor = by_block.gather(2, blocks[:, None, :, None].expand_as(by_block)).flatten(2)
        return natural_order

    return grid.pack(natural, [back(torch.stack(kind, -1)) for kind in zip(*notes, strict=True)])
