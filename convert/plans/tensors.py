"""One weight of an artifact as it is planned: its name there, its source, its scheme and its bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dgq.quant.files.hf_writer import entry_bytes
from dgq.quant.types import Entry, Scheme
from dgq.runtime.shape.names import VISION, part_of


@dataclass(frozen=True)
class PlannedTensor:
    """One weight of the artifact. source: its canonical name; None for what dgq generates (rope_freqs.weight).
    entries: the tensors it becomes in a safetensors directory; empty for a .gguf, where it is one."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    scheme: Scheme
    entries: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(map(entry_bytes, self.entries.values())) if self.entries else self.scheme.nbytes(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether its rows share a scale, so that they are quantised together."""
        return self.scheme.whole and len(self.shape) == 2

    @property
    def vision(self) -> bool:
        """Whether it is the vision part's; in a GGUF, the mmproj file's."""
        return self.source is not None and self.source.startswith(VISION)

    @property
    def part(self) -> str:
        """Which part of the model the tensor belongs to, for tables."""
        return "vision" if self.vision else part_of(self.name)


def tally(rows: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """(group, elements, bytes) of each tensor -> group -> its tensors, params and bytes; most bytes first."""
    tensors, params, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for group, numel, size in rows:
        tensors[group] += 1
        params[group] += numel
        nbytes[group] += size
    return {g: {"tensors": tensors[g], "params": params[g], "bytes": n} for g, n in nbytes.most_common()}
