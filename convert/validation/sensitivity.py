"""What each part of an artifact costs: the part's weights are put back in BF16, one part at a time, and KL is measured
anew. The KL that this recovers, for each MB that it would add, is the argument for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgq.quant.schemes.registry import stored_bits
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import EMBEDDING, VISION, layer_of


@dataclass(frozen=True)
class Part:
    """Quantised weights that go back together. extra: bytes that BF16 takes more."""

    name: str
    weights: tuple[str, ...]
    extra: int


def parts(artifact: Artifact) -> list[Part]:
    """The artifact's parts with quantised weights; experts by layer."""
    grouped: dict[str, list[str]] = {}
    stored = {n: s for n, s in artifact.weights.everything().items() if not n.startswith(VISION)}
    for name, weight in stored.items():
        if stored_bits(weight.scheme) < 16:
            grouped.setdefault(part_of(name), []).append(name)
    order = sorted(grouped, key=lambda part: (part.startswith("experts"), _number(part), part))
    return [
        Part(part, tuple(grouped[part]), sum(2 * stored[n].numel - stored[n].nbytes for n in grouped[part]))
        for part in order
    ]


def part_of(name: str) -> str:
    """The part that a tensor belongs to, in words."""
    if name == EMBEDDING:
        return "embedding"
    if ".experts." in name:
        return f"experts {layer_of(name)}"
    named = {".self_attn.": "attention", ".mlp.": "dense MLP", ".self_conditioning.": "self-conditioning",
             ".router.": "router"}  # fmt: skip
    return next((words for key, words in named.items() if key in name), "norms and scalars")


def _number(part: str) -> int:
    return int(part.split()[-1]) if part.startswith("experts") else -1


def restored(part: Part, source: Mapping[str, Packed]) -> dict[str, Packed]:
    return {name: source[name] for name in part.weights}
