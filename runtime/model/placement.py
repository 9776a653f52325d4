"""Which layers' routed experts stay on the GPU, and which wait in host memory: plain numbers, no tensors.

    budget for experts    | layer 0 | layer 2 | layer 4 | … |  place A  |  place B  |
                            experts that stay                 where offload.py copies the waiting ones, one at a time

Loading decides with place() while it reads the layers one after another, and `dgq plan` counts with it beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLACES = 2  # a layer's experts are copied into one place while the layer before is computed from the other


@dataclass(frozen=True)
class Placement:
    """Layers 0, 1, … with the bytes of each one's experts, and whether they stay on the GPU."""

    sizes: tuple[int, ...]
    stays: tuple[bool, ...]

    @property
    def waiting(self) -> list[int]:
        """Bytes of each layer that waits in host memory."""
        return [size for size, stays in zip(self.sizes, self.stays, strict=True) if not stays]

    @property
    def on_gpu(self) -> int:
        """Bytes of experts on the GPU: the layers that stay, and the places that the others are copied into."""
        staying = sum(self.sizes) - sum(self.waiting)
        return staying + min(PLACES, len(self.waiting)) * max(self.sizes)

    @property
    def copied(self) -> int:
        """Bytes that every pass copies from host memory."""
        return copied(self.waiting)


def place(sizes: Sequence[int], layers: int, budget: int | None) -> Placement:
    """Decide for the first layers of a model with `layers` layers, `sizes` being the bytes of their experts.

    budget: bytes on the GPU for all experts, the two places included; None keeps every layer. A layer stays if those
    that stay so far, itself included, take no more than their share of the budget: so the layers that wait lie evenly
    between the others. The decision for a layer depends on the layers before it only, so that it can be asked for
    while later layers are still unread.
    """
    stays: list[bool] = []
    kept = largest = 0
    for layer, size in enumerate(sizes):
        largest = max(largest, size)
        share = 0.0 if budget is None else (budget - PLACES * largest) * (layer + 1) / layers
        stays.append(budget is None or kept + size <= share)
        kept += size if stays[-1] else 0
    return Placement(tuple(sizes), tuple(stays))


def copied(waiting: Sequence[int]) -> int:
    """Bytes that a pass copies: all that waits, or nothing where the places hold every waiting layer for good."""
    return sum(waiting) if len(waiting) > PLACES else 0
