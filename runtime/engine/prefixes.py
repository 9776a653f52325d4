"""The caches of the last conversations, so that the next turn of one encodes only what is new."""

from __future__ import annotations

from collections.abc import Sequence

from dgq.runtime.engine.turns import Turns, common
from dgq.runtime.model.model import Model
from dgq.runtime.shape.pictured import marks_of

KEPT = 4  # conversations on a CPU; a GPU's session holds the last one alone
LEAST = 32  # tokens in common that are worth it


class Prefixes:
    """The last conversations, the latest last. A request that begins like one of them goes on in its cache."""

    def __init__(self, model: Model) -> None:
        self._kept: list[Turns] = []
        self._most = 1 if model.device.type == "cuda" else KEPT

    def turns(self, prompt: Sequence[int], settled: int) -> Turns:
        """The conversation that the prompt continues, or a new one in the place of the oldest."""
        marks = marks_of(prompt)
        shared = [common(turns.ids, marks) for turns in self._kept]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and (shared[best] >= LEAST or self._most == 1):
            turns = self._kept.pop(best)
        else:
            turns = Turns()
            del self._kept[: max(0, len(self._kept) - self._most + 1)]
        self._kept.append(turns)
        turns.settled = settled
        return turns

    def forget(self) -> None:
        """Give the caches up."""
        self._kept.clear()
