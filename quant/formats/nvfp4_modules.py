"""What modelopt's and compressed-tensors' layouts share: a set of tensors for each module, a fused expert weight apart.

    …layers.L.experts.gate_up_proj (E, 2I, H)  ->  …layers.L.experts.E.gate_proj.  rows 0 to I
                                                   …layers.L.experts.E.up_proj.    rows I to 2I
    …layers.L.experts.down_proj    (E, H, I)   ->  …layers.L.experts.E.down_proj.
    …layers.L.mlp.up_proj.weight   (I, H)      ->  …layers.L.mlp.up_proj.          and other Linears

Below a module's name lie its codes, its blocks' scales, one scale for the whole and, W4A4 only, one for its inputs. The
gate and up of an expert share theirs. Each layout says what it calls them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import BLOCK, NVFP4
from dgq.quant.types import Entry, Packed, Scheme, Spec, Stored

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Suffixes:
    """What a layout calls a module's tensors. scalar: the shape of its single numbers; inverted: whether it stores
    1 / scale_2 and 1 / input_scale instead."""

    codes: str
    scale: str
    scale_2: str
    input_scale: str
    scalar: tuple[int, ...] = ()
    inverted: bool = False


@dataclass(frozen=True)
class NVFP4Modules(ABC):
    """A layout of NVFP4. activations: whether modules carry a scale for their inputs (W4A4); unscaled: those that do
    not all the same, by their names up to the last point."""

    activations: bool
    unscaled: frozenset[str] = frozenset()
    suffixes: ClassVar[Suffixes]

    @property
    def slices(self) -> Scheme:
        return NVFP4

    def scheme_of(self, name: str) -> Scheme:
        return NVFP4

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        owner, _, last = name.rpartition(".")
        if owner.endswith(".experts"):
            return last in PROJECTIONS
        return len(shape) == 2 and name.endswith("_proj.weight")

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        groups, called = modules(name, shape), self.suffixes
        rows, columns = shape[-2] // len(groups[0]), shape[-1]
        tensors: dict[str, Entry] = {}
        for base in (base for group in groups for base in group):
            tensors[base + called.codes] = ("U8", (rows, columns // 2))
            tensors[base + called.scale] = ("F8_E4M3", (rows, columns // BLOCK))
            tensors[base + called.scale_2] = ("F32", called.scalar)
            if self.activations and base not in self.unscaled:
                tensors[base + called.input_scale] = ("F32", called.scalar)
        return tensors

    @abstractmethod
    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The next bytes of those tensors; NotImplementedError for a layout that is only read."""

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight, copied together. InputError for scales no quantiser writes, or gate's unlike up's."""
        groups, called = modules(name, shape), self.suffixes
        bases = [base for group in groups for base in group]
        codes = joined_bytes([stored.tensor(base + called.codes) for base in bases])
        scales = joined_bytes([checked_scales(stored, base + called.scale) for base in bases])
        parts = {"": codes.view(*shape[:-1], -1), "weight_scale": scales.view(*shape[:-1], -1)}
        scalars = {"weight_scale_2": called.scale_2} | ({"input_scale": called.input_scale} if self.activations else {})
        for part, suffix in scalars.items():
            lacking = self.unscaled if part == "input_scale" else frozenset()
            values = [_scalar(stored, [base + suffix for base in group if base not in lacking]) for group in groups]
            each = torch.stack(values)
            each = each.reciprocal() if called.inverted else each
            if lacking:
                each[[not lacking.isdisjoint(group) for group in groups]] = float("inf")
            parts[part] = each.view(-1, *(1 for _ in shape[1:])).expand(*shape[:-1], 1)
        return Packed(NVFP4, shape, parts)


def fitted(layout: NVFP4Modules, specs: Mapping[str, Spec]) -> NVFP4Modules:
    """The layout of a directory with these tensors: without input scales if it holds none, or with the modules that
    lack theirs."""
    called = layout.suffixes
    if not layout.activations:
        return layout
    if not any(name.endswith("." + called.input_scale) for name in specs):
        return replace(layout, activations=False)
    codes = [name.removesuffix(called.codes) for name, spec in specs.items() if spec.dtype == "U8"]
    packed = [base for base in codes if base + called.scale in specs and base.endswith(".")]
    return replace(layout, unscaled=frozenset(base for base in packed if base + called.input_scale not in specs))


def _scalar(stored: Stored, names: list[str]) -> torch.Tensor:
    return shared_scalar(stored, names).flatten()[0] if names else torch.ones(())


def modules(name: str, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """An expert's modules, which share their scale_2, or the one Linear: their names up to the last point."""
    owner, _, last = name.rpartition(".")
    if last not in PROJECTIONS:
        return [(owner + ".",)]
    return [tuple(f"{owner}.{expert}.{part}." for part in PROJECTIONS[last]) for expert in range(shape[0])]


def split_modules(name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, Packed]]:
    """The modules of a weight's slice from matrix `start`, in order: name up to the last point, and its rows."""
    if len(shape) == 2:
        assert piece.shape == shape, f"{name}: a matrix has one scale, and comes whole"
    matrices = [piece] if len(shape) == 2 else [piece[i] for i in range(piece.shape[0])]
    for matrix, group in zip(matrices, modules(name, shape)[start:], strict=False):
        rows = shape[-2] // len(group)
        for number, base in enumerate(group):
            yield base, matrix[number * rows : (number + 1) * rows]


def joined_bytes(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The pieces below each other, of any 8-bit dtype: torch cannot concatenate 8-bit floats."""
    return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)


def checked_scales(stored: Stored, name: str) -> torch.Tensor:
    """Block scales. InputError for one that is negative or no number."""
    scales = stored.tensor(name)
    codes = scales.view(torch.uint8)
    if bool((codes >= 0x7F).any()):
        where = (codes >= 0x7F).nonzero()[0].tolist()
        code = int(codes[tuple(where)])
        kind = "not a number" if code & 0x7F == 0x7F else "negative"
        raise InputError(f"{stored.file(name)}: {name} holds scale code 0x{code:02X} ({kind}) at {where}; damaged")
    return scales


def shared_scalar(stored: Stored, names: list[str]) -> torch.Tensor:
    """One positive number that all the tensors hold. InputError for another, or where they differ."""
    values = [stored.tensor(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 0 < float(value) < float("inf"):
            raise InputError(f"{stored.file(name)}: {name} is {float(value)}, expected a positive number; damaged")
    if any(float(value) != float(values[0]) for value in values):
        each = ", ".join(f"{name} is {float(value):.9g}" for name, value in zip(names, values, strict=True))
        raise InputError(f"{stored.file(names[0])}: {each}; gate and up must share it, loaders keep only one")
    return values[0].clone()
