"""The parts of a model that are decided on together, and the schemes that are tried for each.

    a kind of matrix in some layers that follow each other     x     the format's LADDERS: "q4_k", "q5_0", "q6_k", …
    the self-conditioning
    the embedding

Rows that a scheme's blocks do not divide take ggml's fallback, of about as many bits; a part of both
kinds of rows has a trial "q4_k/q5_0" of two schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgq.convert.mixture.recipe_file import BF16, Target
from dgq.convert.mixture.trials import Trial
from dgq.convert.plans.formats import FORMATS, Directory, mixed_format
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme
from dgq.runtime.shape.names import EMBEDDING, layer_of

LADDERS = {form.name: form.ladder for form in FORMATS if form.in_mix}


@dataclass(frozen=True)
class MixPart:
    """Weights that are decided on together. trials: scheme, or "a/b" of two -> the scheme of each weight; sizes: the
    same, and BF16 -> bytes."""

    name: str
    weights: tuple[str, ...]
    trials: dict[str, Trial]
    sizes: dict[str, int]


def parts(source: Source, to: Target, groups: int) -> list[MixPart]:
    """The parts of a model that a format can quantise. groups: of layers that are decided on together."""
    layers = len(source.config.layers)
    named: dict[str, list[str]] = {}
    for name, spec in source.text.items():
        if len(spec.shape) < 2 or ".router." in name:
            continue
        index = layer_of(name)
        if index is None:
            part = "embedding" if name == EMBEDDING else "self-conditioning"
        else:
            group = [i for i in range(layers) if i * groups // layers == index * groups // layers]
            part = f"{_kind(name)} {group[0]}" + (f"-{group[-1]}" if len(group) > 1 else "")
        named.setdefault(part, []).append(name)
    made = [_part(part, names, source, to) for part, names in named.items()]
    return [part for part in made if part.trials]


def _part(name: str, weights: list[str], source: Source, to: Target) -> MixPart:
    """A part, with the schemes of the format's ladder that all of its weights can take."""
    trials: dict[str, Trial] = {}
    sizes = {BF16: sum(2 * math.prod(source.text[weight].shape) for weight in weights)}
    for scheme in LADDERS[to]:
        each = [_placed(to, w, source.text[w].shape, s) for w in weights for s in (scheme, _fallback(scheme))]
        placed = {one.name: one for one in reversed(each) if one is not None}  # the scheme itself before the other one
        trial = {weight: placed[weight].scheme for weight in weights if weight in placed}
        if len(trial) == len(weights) and trial not in trials.values():
            label = "/".join(sorted({one.name for one in trial.values()}))
            trials[label] = trial
            sizes[label] = sum(one.nbytes for one in placed.values())
    return MixPart(name, tuple(weights), trials, sizes)


def _placed(to: Target, name: str, shape: tuple[int, ...], scheme: str | None) -> PlannedTensor | None:
    """The weight as the format stores it in a scheme, if it can."""
    if scheme is None or shape[-1] % SCHEMES[scheme].block:
        return None
    form = mixed_format(to)
    if not isinstance(form, Directory):
        return PlannedTensor(name, name, shape, SCHEMES[scheme])
    layout = form.layout({name: SCHEMES[scheme]}, False)
    held = layout.holds(name, shape)
    return PlannedTensor(name, name, shape, SCHEMES[scheme], layout.entries(name, shape)) if held else None


def _fallback(scheme: str) -> str | None:
    """The scheme that ggml takes for rows that this one's blocks do not divide."""
    kind = SCHEMES[scheme].ggml
    return kind.fallback if kind else None


def assigned(several: Sequence[MixPart], schemes: Sequence[str]) -> dict[str, Scheme]:
    """Weight -> scheme, of the parts and the name of the trial, or BF16, that each of them is given."""
    return {
        weight: SCHEMES[BF16] if scheme == BF16 else part.trials[scheme][weight]
        for part, scheme in zip(several, schemes, strict=True)
        for weight in part.weights
    }


def _kind(name: str) -> str:
    """A layer's weight by its name below the layer, like "self_attn.k_proj"."""
    return name.split(".layers.")[1].split(".", 1)[1].removesuffix(".weight")
