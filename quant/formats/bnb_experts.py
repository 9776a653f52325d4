"""bitsandbytes 4-bit with experts apart, as a model whose experts were made Linears is saved. Read, never written.

    …experts.gate_up_proj (E, 2I, H)  ->  …experts.E.gate_proj.weight and …experts.E.up_proj.weight, or
                                          …experts.E.gate_up_proj.weight, or …experts.gate_up_projs.E.weight
    …experts.down_proj    (E, H, I)   ->  …experts.E.down_proj.weight, or …experts.down_projs.E.weight

Each is a Linear of bnb.py, with a quant_state of its own. With double quantisation each has its own offset too,
which a fused weight has no place for: its absmax become float32 when it is read, as bitsandbytes decodes them, and take
.37 bits more for each of the experts' parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from dgq.quant.formats.bnb import BitsAndBytes
from dgq.quant.schemes.fp4 import FP4
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.types import Entry, Packed, Scheme, Stored

WAYS = {
    "gate_up_proj": (
        ("{}.{}.gate_proj.weight", "{}.{}.up_proj.weight"),
        ("{}.{}.gate_up_proj.weight",),
        ("{}.gate_up_projs.{}.weight",),
    ),
    "down_proj": (("{}.{}.down_proj.weight",), ("{}.down_projs.{}.weight",)),
}


def experts_apart(base: BitsAndBytes, names: Collection[str]) -> BitsAndBytes | ExpertsApart:
    """The layout of a directory with tensors of these names."""
    return ExpertsApart(base, names) if any(map(re.compile(r".*\.experts\.\w*\.?0\.").match, names)) else base


@dataclass(frozen=True)
class ExpertsApart:
    """The layout. base: that of each Linear; names: of the directory's tensors."""

    base: BitsAndBytes
    names: Collection[str]

    @property
    def slices(self) -> Scheme:
        return self.base.slices

    def scheme_of(self, name: str) -> Scheme:
        return self._single if self._way(name) else self.base.scheme_of(name)

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.base.holds(name, shape)

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        parts = self._linears(name, shape).items()
        return {key: entry for linear, size in parts for key, entry in self.base.entries(linear, size).items()}

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError(f"{name}: dgq writes experts fused")

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight, copied together. InputError as for each Linear."""
        if not self._way(name):
            return self.base.join(name, shape, stored)
        linears = [self.base.join(linear, size, stored) for linear, size in self._linears(name, shape).items()]
        parts = [one.parts for one in linears]
        absmax = torch.cat([NF4_DQ.absmax(part) if "nested_absmax" in part else part["absmax"] for part in parts])
        codes = torch.cat([one.parts[""] for one in linears])
        return Packed(self._single, shape, {"": codes.view(*shape[:-1], -1), "absmax": absmax.view(*shape[:-1], -1)})

    @property
    def _single(self) -> Scheme:
        """Of weights whose absmax are float32."""
        return FP4 if self.base.kind == FP4.name else NF4

    def _way(self, name: str) -> tuple[str, ...]:
        """How the experts of a fused weight are called; () if it is stored as one."""
        owner, _, last = name.rpartition(".")
        ways = WAYS.get(last, ()) if owner.endswith(".experts") else ()
        return next((way for way in ways if way[0].format(owner, 0) in self.names), ())

    def _linears(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        way, owner = self._way(name), name.rpartition(".")[0]
        if not way:
            return {name: shape}
        size = (shape[1] // len(way), shape[2])
        return {linear.format(owner, expert): size for expert in range(shape[0]) for linear in way}
