"""The rows of one batch on their way through their canvases, in two ways that give the same tokens in float32.

OnSlots   a session's fixed memory (session.py), by CUDA graphs where there are any; what a GPU uses
OnCache   the reference's operations on a growing cache (cache.py); a CPU uses it; tests hold OnSlots against it
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.engine.plain import Plain
from dgq.runtime.model.cache import Cache
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, Random
from dgq.runtime.model.sampler import Stopper, decide
from dgq.runtime.model.session import Backend, Session
from dgq.runtime.shape.pictured import pictures, pieces
from dgq.runtime.shape.settings import SamplerConfig

# Prompt tokens that the reference encodes at once (an image is never split): bounds the scores and masks of attention.
PREFILL = 512


@dataclass(frozen=True)
class Step:
    """The canvases after one denoising step, for whoever shows them taking shape."""

    block: int  # counted from 0
    step: int  # counted from 1
    steps: int  # at most
    canvas: Tensor  # (rows, canvas) int64: the argmax, which is what would be committed now
    accepted: Tensor  # (rows, canvas) bool: positions that the sampler keeps for the next step
    entropy: Tensor  # (rows,) mean over the canvas, in nats
    rows: tuple[int, ...] = (0,)  # the number of the prompt that each row belongs to; finished ones may have left


Denoised = Generator[Step, None, tuple[Tensor, Tensor]]


class Batch(Protocol):
    """Rows whose prompts are encoded and whose canvases can be denoised one after another."""

    def denoise(self, rows: Tensor, block: int, every_step: bool) -> Denoised:
        """Denoise one canvas of every row. Yields each Step if every_step, and returns the argmax (rows, canvas) and
        the steps that each row took (rows,). rows: the numbers of the prompts that are left."""
        ...

    def commit(self, canvas: Tensor) -> None:
        """Encode a finished canvas (rows, canvas) behind what each row has."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop the rows of the batch whose places are not in `rows`, int64 and rising."""
        ...


class OnSlots:
    """A batch in the model's session, which stays with the model for the next batch."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        sampler: SamplerConfig,
        random: CounterRandom,
    ) -> None:
        self._model, self._sampler, self._random = model, sampler, random
        self._session, self._tenant = session_for(model, len(prompts), capacity, sampler), object()
        self._session.start(prompts)
        self._session.tenant = self._tenant

    def commit(self, canvas: Tensor) -> None:
        self._checked_session().commit(canvas)

    def keep(self, rows: Tensor) -> None:
        self._checked_session().keep(rows)
        if self._model.choice is not None:
            self._model.choice.keep(rows)

    def _checked_session(self) -> Session:
        """The session. InputError if another batch has taken it, so that these rows' keys are gone."""
        if self._session.tenant is not self._tenant:
            raise InputError("another answer was begun on this model meanwhile: this one cannot go on")
        return self._session

    def denoise(self, rows: Tensor, block: int, every_step: bool) -> Denoised:
        state, numbers, count = self._checked_session().state, tuple(rows.tolist()), len(rows)
        state.begin(self._random, rows, block)
        for step in range(1, self._sampler.steps + 1):
            done = self._checked_session().step(last=step == self._sampler.steps)
            if every_step:
                argmax, accepted = state.argmax[:count].clone(), state.accepted[:count].clone()
                entropy = state.mean_entropy()[:count]
                yield Step(block, step, self._sampler.steps, argmax, accepted, entropy, numbers)
            if done is None:  # the logits are not a number: neither is what the session's memory holds from here on
                self._model.drop_session()
                self._model.refuse_weights()
            if done:
                break
        return state.argmax[:count].clone(), state.took[:count].clone()


def session_for(model: Model, rows: int, capacity: int, sampler: SamplerConfig) -> Session:
    """The model's session if it fits such a batch, else a new one in its place."""
    session = model.session
    if session is None or not session.fits(rows, capacity, sampler):
        del session
        model.drop_session()  # its memory must be free before the new session takes some
        session = model.keep_session(Session(backend_of(model), rows, capacity, sampler))
    return session


def backend_of(model: Model) -> Backend:
    """The kernels, if the model's weights were repacked for them, else the reference's operations."""
    if model.kernels is None:
        return Plain(model)
    from dgq.runtime.engine.fast import Fast  # needs Triton

    return Fast(model)


class OnCache:
    """A batch on a growing cache, operation by operation: what everything faster is held against."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        sampler: SamplerConfig,
        random: Random,
        pad_id: int,
    ) -> None:
        self._model, self._sampler, self._random = model, sampler, random
        if random.independent:
            self._cache = encode_each(model, prompts, capacity)
        else:
            self._cache = _prefill(model, prompts, pad_id, capacity)

    def commit(self, canvas: Tensor) -> None:
        self._model.encode(canvas, self._cache)

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        if self._model.choice is not None:
            self._model.choice.keep(rows)

    def denoise(self, rows: Tensor, block: int, every_step: bool) -> Denoised:
        sampler = self._sampler
        canvas = self._random.canvas(rows, block)
        done = torch.zeros_like(rows, dtype=torch.bool)
        took = torch.zeros_like(rows)
        stopper, argmax = Stopper(sampler), canvas
        conditioning: Tensor | None = None
        for step in range(1, sampler.steps + 1):
            took += ~done
            logits = self._model.decode(canvas, self._cache, conditioning)
            if logits.sum().isnan():
                self._model.refuse_weights()
            draw = partial(self._random.draw, rows=rows, block=block, step=step)
            new = decide(logits, sampler.steps + 1 - step, sampler, draw)
            argmax = torch.where(done[:, None], argmax, new.argmax)
            canvas = torch.where(done[:, None], canvas, new.canvas)
            # The logits are cast to the embedding's dtype, as in transformers. A done row's no longer matter.
            conditioning = new.logits.to(self._model.dtype)
            done = done | stopper.done(argmax, new.entropy)
            if every_step:
                entropy = new.entropy.mean(-1)
                yield Step(block, step, sampler.steps, argmax, new.accepted, entropy, tuple(rows.tolist()))
            if done.all():
                break
        return argmax, took


def encode_each(model: Model, prompts: Sequence[Sequence[int]], capacity: int) -> Cache:
    """Encode every prompt alone and stack the caches into one batch: nothing about a row depends on the others."""
    cache = model.new_cache(len(prompts), capacity)
    cache.stack([_prefilled_row(model, row, prompt) for row, prompt in enumerate(prompts)])
    if model.choice is not None:
        model.choice.look(0, len(prompts))
    return cache


def _prefilled_row(model: Model, row: int, prompt: Sequence[int]) -> Cache:
    """One prompt, encoded with the adapters of its row."""
    if model.choice is not None:
        model.choice.look(row, 1)
    return _prefill(model, [prompt], 0, len(prompt))


def _prefill(model: Model, prompts: Sequence[Sequence[int]], pad_id: int, capacity: int) -> Cache:
    """Encode all prompts together, shorter ones padded on the left, as transformers does."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    padding = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt[:])
        padding[row, longest - len(prompt) :] = False
    ids, padding = ids.to(model.device), padding.to(model.device)
    padded = bool(padding.any())
    cache = model.new_cache(len(prompts), capacity)
    for part in pieces(prompts, PREFILL):
        images = pictures(prompts, part, model.device)
        model.encode(ids[:, part], cache, padding=padding[:, part] if padded else None, images=images)
    return cache
