"""Adapters' products beside the kernels'.

    x ─┬─ packed product (or cuBLAS) ── y ──(+)── y
       └─ A x ── × the rows' choice ── B ───┘          the encoder's A and B in its passes, the decoder's in its own

All of it is plain products of fixed shapes, so that a CUDA graph holds it. The choice lies in memory that the graph
reads; a graph in which no row has chosen any adapter has no such products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dgq.runtime.adapters.adapter import SIDES
from dgq.runtime.adapters.beside import Choice
from dgq.runtime.kernels import dense, moe
from dgq.runtime.kernels.repack import Tiles, in_order


@dataclass(frozen=True)
class Beside:
    """What is added to a product of the kernels on one side. a (R, columns in the product's order), b (rows, R), gain
    (adapters, rows): as in LowRank, of all weights that the product joins."""

    a: Tensor
    b: Tensor
    owners: tuple[int, ...]
    gain: Tensor | None
    choice: Choice

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (n, rows), the product of x (n, columns), with the change of the rows' adapters; y may be overwritten."""
        if self.choice.kind == "none":
            return y
        inner, mask = functional.linear(x, self.a), self.choice.mask(self.owners)
        if mask is not None:
            inner = (inner.view(len(mask), -1, inner.shape[1]) * mask[:, None]).view(inner.shape)
        if self.gain is not None:
            y = (y.view(self.choice.count, -1, y.shape[1]) * self.choice.gain(self.gain)).view(y.shape)
        return y.addmm_(inner, self.b.t())


def beside(choice: Choice | None, side: str, members: Sequence[tuple[str, int]], ordered: bool) -> Beside | None:
    """What adapters add to a product that joins weights: (canonical name, rows) of each. ordered: its input's columns
    are in the order of repack.in_order(). None if they add nothing on this side."""
    if choice is None:
        return None
    factors = [choice.adapters.factors[side].get(name) for name, _ in members]
    there = [one for one in factors if one is not None]
    if not there:
        return None
    a = torch.cat([one.a for one in there])
    nothing = [there[0].b.new_empty(rows, 0) for _, rows in members]
    b = torch.block_diag(*(none if one is None else one.b for one, none in zip(factors, nothing, strict=True)))
    gains = [
        b.new_zeros(len(choice.adapters.names), rows) if one is None or one.gain is None else one.gain
        for one, (_, rows) in zip(factors, members, strict=True)
    ]
    gain = torch.cat(gains, 1) if any(one.gain is not None for one in there) else None
    owners = tuple(owner for one in there for owner in one.owners)
    return Beside(in_order(a) if ordered else a, b, owners, gain, choice)


Sides = dict[bool, "Beside | None"]


def both_sides(choice: Choice | None, members: Sequence[tuple[str, int]], ordered: bool) -> Sides:
    """beside() for the encoder (True: causal) and the decoder (False)."""
    return {side == "encoder": beside(choice, side, members, ordered) for side in SIDES}


def linear(x: Tensor, weight: dense.Linear, change: Beside | None) -> Tensor:
    """dense.linear() of x in the weight's order, with the change."""
    y = dense.linear(x, weight, weight.packed)
    return y if change is None else change.add(y, x)


def gated_mlp(x: Tensor, gate_up: dense.Gated, down: dense.Linear, changes: tuple[Beside | None, ...]) -> Tensor:
    """dense.gated_mlp() of x in the gate's order, with the changes of gate and up, and of down."""
    if not any(changes):
        return dense.gated_mlp(x, gate_up, down, gate_up.packed)
    assert not isinstance(gate_up.both, Tiles)  # products.join() keeps the halves of what is changed side by side
    inner = dense.gated(linear(x, gate_up.both, changes[0]))
    y = dense.linear(inner, down)
    return y if changes[1] is None else changes[1].add(y, inner)


@dataclass(frozen=True)
class ExpertsBeside:
    """What is added to the experts' products of a layer on one side: gate_up's and down's factors, of all experts side
    by side: a (E R, columns), gate_up's in the order of repack.in_order(), and b (rows, E R)."""

    gate_up: Beside | None
    down: Beside | None
    experts: int

    def parts(self, x: Tensor, chosen: Tensor, share: Tensor, tiles: tuple[Tiles, Tiles]) -> Tensor:
        """moe.parts() with the changes; x as there. tiles: of gate_up, whose rows do not alternate, and of down."""
        gate_up, down = tiles
        picks, k = moe.sort(chosen, self.experts), chosen.shape[1]
        order = picks.order.long()
        expert, token = chosen.flatten()[order].long(), order // k
        both = moe.by_token(x, picks, gate_up)
        if self.gate_up is not None and self.gate_up.choice.kind != "none":
            inner = functional.linear(x, self.gate_up.a)[token]
            both.addmm_(self._only(self.gate_up, inner, expert, token, len(x)), self.gate_up.b.t())
        inner = dense.gated(both)
        out = moe.weighted(in_order(inner), picks, share, down)
        if self.down is not None and self.down.choice.kind != "none":
            low = functional.linear(inner, self.down.a)
            low = self._only(self.down, low, expert, token, len(x)) * share.flatten()[order, None].to(x.dtype)
            unsorted = torch.empty_like(low)
            unsorted[order] = low
            out.view(len(order), -1).addmm_(unsorted, self.down.b.t())
        return out

    def _only(self, change: Beside, inner: Tensor, expert: Tensor, token: Tensor, tokens: int) -> Tensor:
        """inner (picks, E R) where it belongs to the pick's expert and to an adapter of the pick's row, else 0."""
        inner = inner.view(len(inner), self.experts, -1)
        number = torch.arange(self.experts, device=inner.device)
        inner = inner * (number == expert[:, None])[..., None]
        mask = change.choice.mask(change.owners)
        if mask is not None:
            inner = inner * mask[token // (tokens // len(mask))][:, None]
        return inner.flatten(1)


def experts_beside(choice: Choice | None, side: str, prefix: str, experts: int) -> ExpertsBeside | None:
    """What adapters add to a layer's experts. prefix: of their weights' canonical names. None if they add nothing."""
    if choice is None:
        return None
    changes: list[Beside | None] = []
    for name, ordered in (("gate_up_proj", True), ("down_proj", False)):
        one = choice.adapters.factors[side].get(prefix + name)
        if one is None:
            changes.append(None)
            continue
        a, b = one.a.flatten(0, 1), one.b.transpose(0, 1).flatten(1)
        changes.append(Beside(in_order(a) if ordered else a, b.contiguous(), one.owners, None, choice))
    return ExpertsBeside(changes[0], changes[1], experts) if any(changes) else None
