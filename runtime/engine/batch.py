"""Rows through their canvases: on fixed memory, by graphs where there are any; or as the reference does it."""

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
from dgq.runtime.model.session import Passes, Session
from dgq.runtime.shape.pictured import pictures, pieces
from dgq.runtime.shape.settings import SamplerConfig

# Prompt tokens encoded at once, if no image is longer: bounds the attention scores and masks of a long prompt.
PREFILL = 512


@dataclass(frozen=True)
class Step:
    """A look at one denoising step, for whoever draws the canvas taking shape."""

    block: int  # from 0
    step: int  # from 1
    steps: int  # at most
    canvas: Tensor  # (rows, canvas) the argmax, which is what would be committed now
    accepted: Tensor  # (rows, canvas) bool: positions the sampler keeps for the next step
    entropy: Tensor  # (rows,) mean over the canvas, nats
    rows: tuple[int, ...] = (0,)  # which prompts these are; finished ones may have left


Denoised = Generator[Step, None, tuple[Tensor, Tensor]]


class Batch(Protocol):
    """Rows being denoised."""

    def denoise(self, rows: Tensor, block: int, every_step: bool) -> Denoised:
        """One canvas from noise to argmax: (rows, canvas) ids and (rows,) steps taken. rows: which prompts are left."""
        ...

    def commit(self, canvas: Tensor) -> None: ...
    def keep(self, rows: Tensor) -> None: ...


class OnSlots:
    """By a session, which the model keeps for the next batch."""

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
        self._own().commit(canvas)

    def keep(self, rows: Tensor) -> None:
        self._own().keep(rows)

    def _own(self) -> Session:
        """The session, in which these rows still are."""
        if self._session.tenant is not self._tenant:
            raise InputError("another answer was begun on this model meanwhile: this one cannot go on")
        return self._session

    def denoise(self, rows: Tensor, block: int, every_step: bool) -> Denoised:
        state, numbers, count = self._own().state, tuple(rows.tolist()), len(rows)
        state.begin(self._random, rows, block)
        for step in range(1, self._sampler.steps + 1):
            over = self._own().step(last=step == self._sampler.steps)
            if every_step:
                argmax, accepted = state.argmax[:count].clone(), state.accepted[:count].clone()
                entropy = state.mean_entropy()[:count]
                yield Step(block, step, self._sampler.steps, argmax, accepted, entropy, numbers)
            if over is None:
                self._model.session = None  # which holds what is no number, from here on
                self._model.refuse_weights()
            if over:
                break
        return state.argmax[:count].clone(), state.took[:count].clone()


def session_for(model: Model, rows: int, capacity: int, sampler: SamplerConfig) -> Session:
    session = model.session
    if session is None or not session.fits(rows, capacity, sampler):
        model.session = session = None  # the old one's memory is free before the new one's is taken
        model.session = session = Session(passes_of(model), rows, capacity, sampler)
    return session


def passes_of(model: Model) -> Passes:
    if model.kernels is None:
        return Plain(model)
    from dgq.runtime.engine.fast import Fast  # needs Triton

    return Fast(model)


class Reference:
    """Operation by operation on a growing cache: what everything faster is held against."""

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
        self.keep = self._cache.keep

    def commit(self, canvas: Tensor) -> None:
        self._model.encode(canvas, self._cache)

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
            # cast as transformers does, to the embedding's dtype; a done row's no longer matters
            conditioning = new.logits.to(self._model.dtype)
            done = done | stopper.done(argmax, new.entropy)
            if every_step:
                entropy = new.entropy.mean(-1)
                yield Step(block, step, sampler.steps, argmax, new.accepted, entropy, tuple(rows.tolist()))
            if done.all():
                break
        return argmax, took


def encode_each(model: Model, prompts: Sequence[Sequence[int]], capacity: int) -> Cache:
    """Every prompt encoded alone, then put into one batch: nothing about a row depends on the others."""
    cache = model.new_cache(len(prompts), capacity)
    cache.stack([_prefill(model, [prompt], 0, len(prompt)) for prompt in prompts])
    return cache


def _prefill(model: Model, prompts: Sequence[Sequence[int]], pad_id: int, capacity: int) -> Cache:
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
