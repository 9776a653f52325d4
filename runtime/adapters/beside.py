"""Adapters applied beside the weights: y = W x + B (m * (A x)), for whatever form W is packed in.

The factors of all loaded adapters lie side by side, A (R, in) and B (out, R). Each row of a batch has its choice of
adapters; m is 1 for the ranks of those, and 0 for the others, so that nothing depends on values that a CUDA graph would
have to know. Encoder and decoder have factors of their own. DoRA changes W x as well, by a gain for each output; where
several adapters are chosen together, their changes add up, as in peft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from dgq.quant.errors import InputError
from dgq.quant.types import Packed
from dgq.runtime.adapters.adapter import SIDES, Adapter
from dgq.runtime.adapters.delta import Delta
from dgq.runtime.shape.names import part_of

Observer = Callable[[str, Tensor, Tensor, int | None, Tensor | None], Tensor]

TOGETHER = "+"  # between the names of adapters that are applied together
Chosen = str | Sequence[str | None] | None
"""Names of adapters: for all rows or row by row. "a+b" are applied together, "" is none, None the model's default."""


@dataclass(frozen=True)
class LowRank:
    """The factors of one product on one side. a (R, in), b (out, R), or (E, R, in) and (E, out, R) for experts; owners:
    the number of the adapter that each of the R ranks belongs to; gain (adapters, out): what W x grows by, or None."""

    a: Tensor
    b: Tensor
    owners: tuple[int, ...]
    gain: Tensor | None = None


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of a loaded model. factors: of each side, by the weight's canonical name; default: those that are
    applied where a request chooses none."""

    names: tuple[str, ...]
    default: frozenset[int]
    factors: Mapping[str, Mapping[str, LowRank]]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(
        cls, adapters: Sequence[Adapter], default: Sequence[str], weights: Mapping[str, Packed], device: torch.device,
        dtype: torch.dtype,
    ) -> AdapterSet:  # fmt: skip
        """Read all factors. weights: the model's, whose rows DoRA measures. InputError for two adapters of one name."""
        names = tuple(adapter.name for adapter in adapters)
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two adapters are called {twice[0]}; name them, as in --adapter NAME=PATH")
        if odd := [name for name in names if not name or TOGETHER in name]:
            raise InputError(f"an adapter is called {odd[0]!r}; name it without {TOGETHER}, as in --adapter NAME=PATH")
        factors = {}
        for side in SIDES:
            both = [adapter.deltas[side] for adapter in adapters]
            changed = dict.fromkeys(name for named in both for name in named)
            factors[side] = {
                name: _side_by_side([named.get(name) for named in both], weights[name], device, dtype)
                for name in changed
            }
        chosen = frozenset(names.index(name) for name in default)
        return cls(names, chosen, factors, device, dtype)

    @property
    def changed(self) -> frozenset[str]:
        """The canonical names of the weights that an adapter changes on any side."""
        return frozenset(name for named in self.factors.values() for name in named)

    @property
    def changes_experts(self) -> bool:
        return any(part_of(name) == "routed experts" for name in self.changed)

    @property
    def nbytes(self) -> int:
        return sum(one.a.nbytes + one.b.nbytes for named in self.factors.values() for one in named.values())

    def numbers(self, chosen: Chosen, rows: int) -> list[frozenset[int]]:
        """The adapters of each row. InputError for a name that is not there, or another number of rows."""
        each = [chosen] * rows if chosen is None or isinstance(chosen, str) else list(chosen)
        if len(each) != rows:
            raise InputError(f"adapter has {len(each)} names for {rows} prompts")
        return [self.default if one is None else self._numbers_of(one) for one in each]

    def _numbers_of(self, names: str) -> frozenset[int]:
        wanted = [name for name in names.split(TOGETHER) if name]
        if missing := [name for name in wanted if name not in self.names]:
            raise InputError(f"adapter {missing[0]!r} is not loaded; there are {', '.join(self.names)}")
        return frozenset(map(self.names.index, wanted))


def load_choice(
    adapters: Sequence[Adapter],
    active: Sequence[str] | None,
    weights: Mapping[str, Packed],
    place: tuple[torch.device, torch.dtype],
) -> Choice | None:
    """The adapters loaded, for one row; None without any. active: the names of those that are applied where a request
    chooses none, all of them if None; place: the model's device and dtype. InputError as AdapterSet.load()."""
    if not adapters:
        return None
    names = tuple(adapter.name for adapter in adapters) if active is None else active
    return Choice(AdapterSet.load(adapters, names, weights, *place), 1)


def changing(choice: Choice | None, side: str, observe: Observer | None, prefix: str = "") -> Observer | None:
    """An observer (model/layers.py) that changes each product as the rows' adapters do on this side, and then hands it
    to `observe`. prefix: what stands before the names that it is called with. Without a choice, `observe` itself."""
    if choice is None:
        return observe

    def change(name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        if expert is None or tokens is None:
            y = choice.changed(side, prefix + name, x, y)
        else:
            y = choice.changed_expert(side, prefix + name, x, y, (expert, tokens))
        return y if observe is None else observe(prefix + name, x, y, expert, tokens)

    return change


def check_choice(adapters: AdapterSet | None, chosen: Chosen) -> None:
    """InputError for a choice where no adapters are loaded."""
    names = [chosen] if isinstance(chosen, str) else chosen or ()
    if adapters is None and any(names):
        raise InputError(f"adapter {next(filter(None, names))!r} is not loaded; load it with --adapter, or adapters=")


def _side_by_side(deltas: Sequence[Delta | None], weight: Packed, device: torch.device, dtype: torch.dtype) -> LowRank:
    a, b, owners, gains = [], [], [], []
    for number, delta in enumerate(deltas):
        gains.append(torch.zeros(weight.shape[-2]))
        if delta is not None:
            down, up = delta.factors()
            if delta.magnitude is not None:
                factor = delta.gain(weight.dequantize(torch.float32).cpu().double())
                gains[-1], up = factor - 1, up * factor[:, None]
            a.append(down)
            b.append(up)
            owners += [number] * down.shape[-2]
    gain = torch.stack(gains).to(device, dtype) if any(bool(one.any()) for one in gains) else None
    return LowRank(
        torch.cat(a, -2).to(device, dtype).contiguous(), torch.cat(b, -1).to(device, dtype).contiguous(),
        tuple(owners), gain,
    )  # fmt: skip


@dataclass
class Choice:
    """Which adapters each row of a batch has chosen, in memory that moves only when it grows.

    selected (rows, adapters): 1 for a chosen one. kind: "none" or "all" if every row has chosen so, else "some"; what
    is captured for one kind is of no use for another. first, count: the rows that are computed now; tokens: of each.
    """

    adapters: AdapterSet
    rows: int
    kind: str = "none"
    first: int = 0
    count: int = 0
    tokens: int = 1
    selected: Tensor = field(init=False)
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one = self.adapters
        self.selected = torch.zeros(self.rows, len(one.names), device=one.device, dtype=one.dtype)
        self.set([one.default] * self.rows)

    @torch.inference_mode()
    def grow(self, rows: int) -> None:
        """Make room for so many rows. What was captured before reads the smaller memory."""
        if rows > self.rows:
            more = self.selected.new_zeros(rows - self.rows, self.selected.shape[1])
            self.selected, self.rows = torch.cat((self.selected, more)), rows
            self._masks.clear()

    @torch.inference_mode()
    def set(self, chosen: Sequence[Iterable[int]]) -> None:
        """Choose anew for the first len(chosen) rows; the rows behind choose none."""
        values = torch.zeros(self.selected.shape)
        for row, numbers in enumerate(chosen):
            values[row, list(numbers)] = 1
        self.selected.copy_(values)
        used = values[: len(chosen)]
        self.kind = "all" if bool(used.all()) else "some" if bool(used.any()) else "none"
        self.look(0, len(chosen))
        self._renew()

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Move the rows `rows`, int64 and rising, to the front."""
        self.selected[: len(rows)] = self.selected[rows]
        self.look(0, len(rows))
        self._renew()

    def look(self, first: int, count: int) -> None:
        """Compute so many rows from `first` on."""
        self.first, self.count = first, count

    def _renew(self) -> None:
        for owners, mask in self._masks.items():
            mask.copy_(self.selected[:, list(owners)])

    def mask(self, owners: tuple[int, ...]) -> Tensor | None:
        """For each row that is computed, 1 for the ranks of its adapters: (count, R); None if that is all of them."""
        if self.kind == "all":
            return None
        if owners not in self._masks:
            self._masks[owners] = self.selected[:, list(owners)].contiguous()
        return self._masks[owners][self.first : self.first + self.count]

    def gain(self, gain: Tensor) -> Tensor:
        """1 + each row's gain: (count, 1, out)."""
        return 1 + (self.selected[self.first : self.first + self.count] @ gain)[:, None]

    def changed(self, side: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The product y (…, out) of x (…, in) with the weight `name`, with the change of the rows' adapters."""
        factors = None if self.kind == "none" else self.adapters.factors[side].get(name)
        if factors is None:
            return y
        by_row = (self.count, -1)
        inner, mask = functional.linear(x, factors.a), self.mask(factors.owners)
        if mask is not None:
            inner = (inner.view(*by_row, inner.shape[-1]) * mask[:, None]).view(inner.shape)
        if factors.gain is not None:
            y = (y.reshape(*by_row, y.shape[-1]) * self.gain(factors.gain)).view(y.shape)
        return y + functional.linear(inner, factors.b)

    def changed_expert(self, side: str, name: str, x: Tensor, y: Tensor, picks: tuple[int, Tensor]) -> Tensor:
        """The same of one expert. picks: its number, and the tokens of all rows that x's rows belong to."""
        factors = None if self.kind == "none" else self.adapters.factors[side].get(name)
        if factors is None:
            return y
        expert, tokens = picks
        inner, mask = functional.linear(x, factors.a[expert]), self.mask(factors.owners)
        if mask is not None:
            inner = inner * mask[tokens // self.tokens]
        return y + functional.linear(inner, factors.b[expert])
