"""What an adapter adds to one weight: low-rank factors, by the names of their tensors, read when they are used.

<module>.lora_A.weight  (r, in)        W + s B A, s = alpha / r, or alpha / sqrt(r) (rslora);
         lora_B.weight  (out, r)       DoRA: every row of that to the length of its magnitude
…experts[.base_layer].lora_A.weight    (E r, in)    expert e: A's rows from e r on, B's columns e, e + E, …
                      lora_B.weight    (out, r E)
…experts.E.gate_proj.lora_A.weight     (r, in)      one expert alone; gate and up are the halves of gate_up_proj
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgq.quant.files.hf_dir import HFDir

Named = dict[str, "Delta"]


@dataclass(frozen=True)
class Piece:
    """One pair of factors. a, b: names of its tensors; rank: columns of B for each expert; expert: the one that it
    belongs to, None for a matrix, or for all experts at once; first: the weight's row that B begins with; transposed:
    in and out are the other way round, as peft before 0.18 had them for all experts."""

    a: str
    b: str
    scale: float
    rank: int
    expert: int | None = None
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Delta:
    """What is added to one weight. shape: the weight's, (out, in) or (E, out, in); magnitude: DoRA's tensor."""

    reader: HFDir
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    magnitude: str | None = None

    @property
    def rank(self) -> int:
        """The columns of B that factors() returns."""
        ranks: dict[int | None, int] = {}
        for piece in self.pieces:
            ranks[piece.expert] = ranks.get(piece.expert, 0) + piece.rank
        return max(ranks.values())

    def factors(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), float64, whose product is added to the weight; of an expert weight (n, r, in) and
        (n, out, r). B has the scale in it. start, stop: rows of a matrix, or experts, B's or both factors' part."""
        part = slice(start, stop)
        if len(self.shape) == 2:
            (piece,) = self.pieces
            return self._read(piece.a), self._read(piece.b)[part] * piece.scale
        if self.pieces[0].expert is None:
            return self._fused(self.pieces[0], part)
        experts = range(self.shape[0])[part]
        a = torch.zeros(len(experts), self.rank, self.shape[2], dtype=torch.float64)
        b = torch.zeros(len(experts), self.shape[1], self.rank, dtype=torch.float64)
        taken = dict.fromkeys(experts, 0)
        for piece in self.pieces:
            if piece.expert in taken:
                at, low = piece.expert - experts.start, taken[piece.expert]
                columns = slice(low, low + piece.rank)
                change = self._read(piece.b) * piece.scale
                a[at, columns] = self._read(piece.a)
                b[at, piece.first : piece.first + len(change), columns] = change
                taken[piece.expert] += piece.rank
        return a, b

    def _fused(self, piece: Piece, part: slice) -> tuple[Tensor, Tensor]:
        experts, a, b = self.shape[0], self._read(piece.a), self._read(piece.b)
        a = a.view(experts, -1, a.shape[1])[part]
        b = b.view(len(b), -1, experts)[:, :, part].permute(2, 0, 1) * piece.scale
        return (b.transpose(1, 2), a.transpose(1, 2)) if piece.transposed else (a, b)

    def _read(self, name: str) -> Tensor:
        return self.reader.tensor(name).double()

    def merged(self, values: Tensor, start: int) -> Tensor:
        """values float64 with the change: rows (of experts: whole experts) of the weight from `start` on."""
        a, b = self.factors(start, start + len(values))
        values = values + b @ a
        return values if self.magnitude is None else values * self._longer(values, start)[:, None]

    def gain(self, values: Tensor) -> Tensor:
        """What DoRA multiplies each output with, (out,): the magnitude over the length of the changed row. values: the
        whole weight, float64."""
        a, b = self.factors()
        return self._longer(values + b @ a, 0)

    def _longer(self, changed: Tensor, start: int) -> Tensor:
        assert self.magnitude is not None
        longer: Tensor = self._read(self.magnitude)[start : start + len(changed)] / changed.norm(dim=1)
        return longer

    def same(self, other: Delta) -> bool:
        """Whether the other one adds the same numbers."""
        if len(self.pieces) != len(other.pieces) or (self.magnitude is None) != (other.magnitude is None):
            return False
        names = [(self.magnitude, other.magnitude)] if self.magnitude and other.magnitude else []
        for one, its in zip(self.pieces, other.pieces, strict=True):
            if (one.scale, one.expert, one.first) != (its.scale, its.expert, its.first):
                return False
            names += [(one.a, its.a), (one.b, its.b)]
        return all(torch.equal(self.reader.tensor(x), other.reader.tensor(y)) for x, y in names)

    def joined(self, other: Delta) -> Delta:
        """Both experts' pieces as one delta, by rising expert and row."""
        pieces = sorted(self.pieces + other.pieces, key=lambda one: (one.expert or 0, one.first))
        return Delta(self.reader, self.shape, tuple(pieces))


def twice(pieces: tuple[Piece, ...]) -> Iterator[Piece]:
    """Yield pieces of an expert that another piece changes in the same rows."""
    seen: set[tuple[int | None, int]] = set()
    for piece in pieces:
        if (place := (piece.expert, piece.first)) in seen:
            yield piece
        seen.add(place)
