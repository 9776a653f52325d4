"""Fixed canvases: reference and artifact look at the same prompts, canvases and noise, and are compared there.

    prompt ── encode ──┐
    canvas, noised ────┴─ decode ──> states, plain        2 conditions at each noise level
                 └─ given the reference's own logits ──> states, conditioned

The reference's states before its head are what is kept of it, together with the head's table: its logits come out of
them again to the last bit, at a hundredth of their size.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def states(model: Model, questions: Sequence[Question], rows: range, seed: int) -> UnitResult:
    """The reference's states at a batch: "states" (levels, 2, rows, canvas, hidden) in the model's dtype; of the two,
    the second is conditioned on the first one's logits."""
    cache = _encoded(model, questions, rows)
    found = []
    for canvas in canvases(questions, rows, seed, model.config.vocab).to(model.device):
        plain = model.hidden(canvas, cache)
        found.append(torch.stack((plain, model.hidden(canvas, cache, _given(model.logits, plain)))).cpu())
    return {"states": torch.stack(found)}


def measured(
    model: Model, reference: Head, wanted: Tensor, questions: Sequence[Question], rows: range, seed: int,
    sampler: SamplerConfig, levels: Sequence[int] = range(len(LEVELS)),
) -> UnitResult:  # fmt: skip
    """A model at a batch, beside the reference's states (levels, 2, rows, canvas, hidden): "measures" (levels asked
    for, 2, measures, rows, canvas) float32. levels: which of LEVELS."""
    cache = _encoded(model, questions, rows)
    noised = canvases(questions, rows, seed, model.config.vocab)
    found = []
    for level in levels:
        canvas, theirs = noised[level].to(model.device), wanted[level].to(model.device)
        divisor = temperature(max(1, round(LEVELS[level] * sampler.steps)), sampler, model.device)
        given = _given(reference, theirs[0])
        both = [
            compare(side, model.hidden(canvas, cache, conditions), (reference, model.logits), model.config.vocab,
                    divisor, sampler.entropy_bound)
            for side, conditions in zip(theirs, (None, given), strict=True)
        ]  # fmt: skip
        if not all(bool(side.isfinite().all()) for side in both):
            model.refuse_weights()
        found.append(torch.stack(both).cpu())
    return {"measures": torch.stack(found)}


def _encoded(model: Model, questions: Sequence[Question], rows: range) -> Cache:
    prompts = [questions[row].prompt for row in rows]
    return encode_each(model, prompts, max(map(len, prompts)) + model.config.canvas)


def _given(logits: Head, plain: Tensor) -> Tensor:
    """What a step is conditioned on: (rows, canvas, vocab) in the states' dtype."""
    return torch.stack([logits(row).to(plain.dtype) for row in plain])
