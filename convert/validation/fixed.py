"""Fixed canvases: reference and artifact see the same prompts, canvases and noise, and are compared there.

    prompt ── encode ──┐
    canvas, noised ────┴─ decode ──> states, plain        2 conditions at each noise level
                 └─ given the reference's own logits ──> states, conditioned

What is kept of the reference is its states before the head, with the head's table: its logits come out of them again to
the last bit, at a hundredth of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgq.convert.layerwise.measure import Head, compare
from dgq.convert.resume.work import UnitResult
from dgq.convert.validation.questions import LEVELS, Question, canvases
from dgq.runtime.engine.batch import encode_each
from dgq.runtime.model.cache import Cache
from dgq.runtime.model.model import Model
from dgq.runtime.model.sampler import temperature
from dgq.runtime.shape.settings import SamplerConfig


@dataclass(frozen=True)
class FixedBatch:
    """Questions whose canvases go through a model together. rows: their numbers; seed: of the noise."""

    questions: Sequence[Question]
    rows: range
    seed: int

    def canvases(self, vocab: int) -> Tensor:
        """The noised canvases int64 (levels, rows, canvas)."""
        return canvases(self.questions, self.rows, self.seed, vocab)

    def encoded(self, model: Model) -> Cache:
        """The keys and values of the prompts."""
        prompts = [self.questions[row].prompt for row in self.rows]
        return encode_each(model, prompts, max(map(len, prompts)) + model.config.canvas)


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference made of a batch. states (levels, 2, rows, canvas, hidden); head: its logits from its states;
    sampler: its settings."""

    states: Tensor
    head: Head
    sampler: SamplerConfig


def states(model: Model, batch: FixedBatch) -> UnitResult:
    """The reference's states at a batch: "states" (levels, 2, rows, canvas, hidden) in the model's dtype. The second of
    the two conditions is given the first one's logits."""
    cache = batch.encoded(model)
    at_levels = []
    for canvas in batch.canvases(model.config.vocab).to(model.device):
        plain = model.hidden(canvas, cache)
        conditioned = model.hidden(canvas, cache, _condition(model.logits, plain))
        at_levels.append(torch.stack((plain, conditioned)).cpu())
    return {"states": torch.stack(at_levels)}


def measures(model: Model, batch: FixedBatch, base: ReferenceStates, levels: Sequence[int]) -> UnitResult:
    """Compare a model with the reference at a batch: "measures" float32 (levels asked for, 2, measures, rows, canvas).

    levels: positions in LEVELS. InputError if the model's states are not finite, which names the weights.
    """
    cache, sampler = batch.encoded(model), base.sampler
    noised = batch.canvases(model.config.vocab)
    at_levels = []
    for level in levels:
        canvas, theirs = noised[level].to(model.device), base.states[level].to(model.device)
        divisor = temperature(max(1, round(LEVELS[level] * sampler.steps)), sampler, model.device)
        both = [
            compare(side, model.hidden(canvas, cache, condition), (base.head, model.logits), model.config.vocab,
                    divisor, sampler.entropy_bound)
            for side, condition in zip(theirs, (None, _condition(base.head, theirs[0])), strict=True)
        ]  # fmt: skip
        if not all(bool(side.isfinite().all()) for side in both):
            model.refuse_weights()
        at_levels.append(torch.stack(both).cpu())
    return {"measures": torch.stack(at_levels)}


def _condition(head: Head, plain: Tensor) -> Tensor:
    """What a step is conditioned on: logits (rows, canvas, vocab) in the states' dtype."""
    return torch.stack([head(row).to(plain.dtype) for row in plain])
