"""LoRA adapters merged into the weights as these are read, a slice at a time.

An artifact has one set of weights for encoder and decoder. An adapter whose two sides differ, or that changes one side
alone, cannot be merged into it without loss, so that a side must be chosen:

    decoder, encoder    that side's factors, for both sides
    mean                the mean of what the weights would be on each side

The sum is taken in float64 and rounded to the weight's dtype once, so that neither slices nor threads change a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dgq.convert.source.hashes import describe
from dgq.convert.source.hub import fetch_adapter, is_hub_id
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, HFDir
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.adapters.adapter import CONFIG, SIDES, WEIGHTS, Adapter, open_adapter
from dgq.runtime.adapters.delta import Delta

Side = Literal["decoder", "encoder", "mean"]
PIECE = 1 << 24  # elements of a whole weight merged at once


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that a command is asked for. path: its directory, or a Hub id; side: to merge, None if nobody chose;
    name: to choose it by at run time, None for one that is always applied."""

    path: Path
    side: Side | None = None
    name: str | None = None

    @classmethod
    def of(cls, given: AdapterLike) -> AdapterChoice:
        return given if isinstance(given, AdapterChoice) else cls(Path(given))

    def open(self, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
        """Open it, from the Hub if it is no directory; shapes as open_adapter() takes them. InputError as there."""
        path, name = self.path.expanduser(), self.name
        if not path.exists() and is_hub_id(str(self.path)):
            path, name = fetch_adapter(str(self.path)), name or self.path.name
        return open_adapter(path, shapes, name)


AdapterLike = Path | str | AdapterChoice


@dataclass(frozen=True)
class Merged:
    """An adapter that is merged into a source's weights."""

    adapter: Adapter
    side: Side | None

    @cached_property
    def parts(self) -> dict[str, tuple[Delta | None, ...]]:
        """Canonical weight name -> the deltas whose results' mean the weight becomes; None: the weight as it is."""
        encoder, decoder = (self.adapter.deltas[side] for side in SIDES)
        parts: dict[str, tuple[Delta | None, ...]] = {name: (delta,) for name, delta in self.adapter.vision.items()}
        shared = set(self.adapter.apart)
        for name in {**encoder, **decoder}:
            both = encoder.get(name), decoder.get(name)
            if name not in shared:
                parts[name] = (both[1] or both[0],)
            elif self.side == "mean":
                parts[name] = both
            elif (one := both[SIDES.index(self.side or "decoder")]) is not None:
                parts[name] = (one,)
        return parts

    def merged(self, name: str, values: Tensor, start: int) -> Tensor:
        """values float64, rows of the weight from `start` on, with the change."""
        results = [values if one is None else one.merged(values, start) for one in self.parts[name]]
        return results[0] if len(results) == 1 else (results[0] + results[1]) / 2

    @property
    def about(self) -> dict[str, Any]:
        """What dgq.json holds of it."""
        return about(self.adapter) | ({"side": self.side} if self.side and self.adapter.apart else {})

    @property
    def notice(self) -> str:
        """A line for the user."""
        side = ""
        if self.adapter.apart and self.side:
            which = "the mean of both sides" if self.side == "mean" else f"the {self.side}'s numbers for both sides"
            side = f"; {self.adapter.about_sides}, {which}: `dgq validate … --adapter` measures the KL that this costs"
        return f"adapter {self.adapter.name}: merged into {len(self.parts)} weights{side}"


def about(adapter: Adapter) -> dict[str, Any]:
    """The adapter's name, and size and SHA-256 of its files."""
    return {"name": adapter.name, "files": {name: describe(adapter.path / name) for name in (CONFIG, WEIGHTS)}}


def merge(choice: AdapterChoice, shapes: Mapping[str, tuple[int, ...]]) -> Merged:
    """Open an adapter to be merged. InputError for one whose sides differ while no side is chosen."""
    adapter, side = choice.open(shapes), choice.side
    if side is not None and side not in get_args(Side):
        raise InputError(f"--adapter-side: {side!r}, expected one of {', '.join(get_args(Side))}")
    if adapter.apart and side is None:
        raise InputError(
            f"--adapter {choice.path}: {adapter.about_sides} ({adapter.apart[0]}, {len(adapter.apart)} such), whose"
            " weights an artifact has once. Convert without it and give it to `dgq run ARTIFACT --adapter"
            f" {choice.path}`, which keeps the sides apart; or merge with --adapter-side decoder, encoder or mean, and"
            " see the KL that each costs with `dgq validate ARTIFACT --against SRC --adapter …`"
        )
    return Merged(adapter, side)


class MergedDir(HFDir):
    """The tensors of a checkpoint, with adapters merged in one after the other as they are read."""

    def __init__(self, directory: HFDir, adapters: Sequence[Merged]) -> None:
        super().__init__(directory.path, directory.specs)
        self._adapters = adapters

    def __getitem__(self, name: str) -> Packed:
        stored = super().__getitem__(name)
        return Packed(SCHEMES[FLOATS[self.specs[name].dtype]], stored.shape, {"": self.tensor(name)})

    def tensor(self, name: str) -> Tensor:
        spec = self.specs[name]
        if not any(name in adapter.parts for adapter in self._adapters):
            return super().tensor(name)
        step = max(1, PIECE * spec.shape[0] // spec.numel)
        return torch.cat([self.rows(name, i, min(i + step, spec.shape[0])) for i in range(0, spec.shape[0], step)])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        stored = super().rows(name, start, stop)
        adapters = [adapter for adapter in self._adapters if name in adapter.parts]
        if not adapters:
            return stored
        values = stored.double()
        for adapter in adapters:
            values = adapter.merged(name, values, start)
        return values.to(stored.dtype)

    def row(self, name: str, *at: int) -> Tensor:
        if not any(name in adapter.parts for adapter in self._adapters):
            return super().row(name, *at)
        first, *rest = at
        return self.rows(name, first, first + 1)[(0, *rest)]
