"""Canvases of the real sampler, for `dgq calibrate --trajectories`.

    prompt | noise ─ step 1 ─ canvas, soft ─ step 2 ─ canvas, soft ─ … until stable and sure, or the steps are over
                                 └────────── one of these, any as likely as the others ──────────┘
                                                      takes the place of a noised canvas

The sampler is that of a run: temperature, entropy bound, counted random tokens. All prompts take a step together, a
layer at a time, and each is encoded anew, so that a step reads the model once. What a canvas was conditioned on, the
expected embedding of the step before, is kept with it, because nothing that comes later could make it again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor

from dgq.convert.layerwise.chunk import Chunk, States
from dgq.convert.layerwise.samples import BINS, PER_PROMPT
from dgq.convert.layerwise.stream import Stream
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.sampler import Stopper, decide
from dgq.runtime.shape.settings import SamplerConfig


class _Walk:
    """The canvases of one chunk's prompts, one each, on their way through the sampler's steps. number: of the first one
    in the random stream."""

    def __init__(self, stream: Stream, chunk: Chunk, sampler: SamplerConfig, seed: int, number: int) -> None:
        count = len(chunk.prompts)
        numbers = range(number, number + count)
        self._stream, self._sampler = stream, sampler
        self._random = CounterRandom(seed, numbers, stream.config.canvas, stream.config.vocab, stream.device)
        self._pick = random.Random(f"{seed} {number} trajectories")
        self._stopper, self._done = Stopper(sampler), torch.zeros(count, dtype=torch.bool, device=stream.device)
        self._soft: Tensor | None = None
        self._noise = torch.ones(count)
        canvas = self._random.canvas(torch.arange(count, device=stream.device), 0).cpu()
        self.chunk = Chunk(chunk.prompts, canvas, tuple(range(count)), torch.ones(count, dtype=torch.int64))
        self.kept: dict[int, tuple[Tensor, Tensor, float]] = {}  # prompt -> canvas, soft, share of it that is noise

    @property
    def done(self) -> bool:
        return bool(self._done.all())

    def enter(self, step: int) -> Tensor:
        """What goes into the first layer at this step; steps are counted from 1."""
        if self._soft is not None:
            for row in (~self._done).nonzero().flatten().tolist():
                if self._pick.random() * (step - 1) < 1:  # the k-th is kept by chance 1/k: all are as likely
                    self.kept[row] = self.chunk.canvases[row], self._soft[row], float(self._noise[row])
        return self._stream.enter(self.chunk, self._soft)

    def leave(self, x: Tensor, step: int) -> None:
        """Take the sampler's step with what came out of the last layer."""
        left, pieces, soft = self._sampler.steps + 1 - step, [], []
        for part, logits in self._stream.leave(self.chunk, x):
            rows = torch.arange(len(self.chunk.canvases), device=logits.device)[part]
            new = decide(logits, left, self._sampler, partial(self._random.draw, rows=rows, block=0, step=step))
            soft.append(self._stream.soften(new.logits).bfloat16().cpu())
            pieces.append((new.canvas, new.argmax, new.accepted, new.entropy))
        canvas, argmax, accepted, entropy = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        self._soft, self._noise = torch.cat(soft), 1 - accepted.float().mean(-1).cpu()
        self.chunk = replace(self.chunk, canvases=canvas.cpu())
        self._done = self._done | self._stopper.done(argmax, entropy)


def walked(
    stream: Stream, chunks: Sequence[Chunk], sampler: SamplerConfig, seed: int, first: int, file: BinaryIO,
    progress: Callable[[], None],
) -> list[Chunk]:  # fmt: skip
    """The chunks, with one canvas of each prompt taken from the sampler. It takes the place of the prompt's first
    canvas and of its last one in turn, so that the canvases that stay cover all noise levels. first: the number of the
    first prompt in the random stream; file: for hidden states; progress: called after each layer."""
    walks = []
    for chunk in chunks:
        walks.append(_Walk(stream, chunk, sampler, seed, first))
        first += len(chunk.prompts)
    states = States(file, [walk.chunk.tokens for walk in walks], stream.config.hidden, stream.dtype)
    for step in range(1, sampler.steps + 1):
        going = [number for number, walk in enumerate(walks) if not walk.done]
        if not going:
            break
        for number in going:
            states.write(number, walks[number].enter(step))
        for index in range(len(stream.config.layers)):
            layer = stream.layer(index)
            for number in going:
                states.write(number, layer(walks[number].chunk, states.read(number)))
            del layer  # before the next is read
            progress()
        for number in going:
            walks[number].leave(states.read(number).to(stream.device), step)
    return [_taken(chunk, walk) for chunk, walk in zip(chunks, walks, strict=True)]


def _taken(chunk: Chunk, walk: _Walk) -> Chunk:
    """The chunk with the canvases that the walk kept."""
    canvases, kind, given = chunk.canvases.clone(), chunk.kind.clone(), {}
    for prompt, (canvas, soft, noise) in sorted(walk.kept.items()):
        place = chunk.owner.index(prompt) + prompt % PER_PROMPT
        canvases[place], given[place] = canvas, soft
        kind[place] = 1 + min(BINS - 1, int(noise * BINS))
    return replace(chunk, canvases=canvases, kind=kind, given=given)
