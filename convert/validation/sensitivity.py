"""What each part of an artifact costs: its weights go back to BF16, one part at a time, and KL is measured anew.

part = attention │ dense MLP │ … │ experts of one layer       KL recovered / MB more = the argument for a recipe
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgq.quant.schemes.registry import stored_bits
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import VISION, layer_of, part_of


@dataclass(frozen=True)
class ModelPart:
    """Quantised weights, by canonical name, that go back together. extra: bytes that BF16 takes more than they do."""

    name: str
    weights: tuple[str, ...]
    extra: int


def parts(artifact: Artifact) -> list[ModelPart]:
    """The artifact's parts with quantised weights: those outside of the experts by name, then the experts by layer."""
    stored = {n: s for n, s in artifact.weights.everything().items() if not n.startswith(VISION)}
    grouped: dict[tuple[int, str], list[str]] = {}
    for name, weight in stored.items():
        if stored_bits(weight.scheme) < 16:
            grouped.setdefault(_place(name), []).append(name)
    return [
        ModelPart(part, tuple(names), sum(2 * stored[n].numel - stored[n].nbytes for n in names))
        for (_, part), names in sorted(grouped.items())
    ]


def _place(name: str) -> tuple[int, str]:
    """The layer of an expert's weight, -1 of any other, and the part's name."""
    part = part_of(name)
    if part == "routed experts":
        layer = layer_of(name) or 0
        return layer, f"experts {layer}"
    return -1, "embedding" if part == "embedding and head" else part


def restored(part: ModelPart, source: Mapping[str, Packed]) -> dict[str, Packed]:
    """The part's weights as the source has them."""
    return {name: source[name] for name in part.weights}
