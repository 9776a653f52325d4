"""Block denoising: encode what is known, denoise one canvas, commit it, go on.

    prompt ──encode──> cache       canvas 1 = noise ─ decode · decide · decode · decide … ─> argmax, committed
                         ^                                                                       │
                         └──────────────────────────── encode ───────────────────────────────────┘ then canvas 2 …

The rows of a batch share every pass. A row whose canvas is done keeps it while the others finish theirs. A row that
met an end-of-sequence token is finished: the rest of its canvas becomes padding, and the row leaves the batch when the
block ends:

    prompt 0   ##### | canvas | canvas <eos>|
    prompt 1      ## | canv<eos>            :
    prompt 2   ### # | canvas | canvas | canvas | …       alone in the batch from here on

With torch's random stream no row leaves, because the other rows would then draw other numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.adapters.beside import Chosen
from dgq.runtime.engine.adapted import choose, choosing
from dgq.runtime.engine.batch import Batch, OnCache, OnSlots, Step
from dgq.runtime.engine.turns import TurnOnCache, TurnOnSlots, Turns
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, Random, TorchRandom
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

__all__ = ["Block", "Request", "Result", "Step", "generate", "stream"]

Rng = Literal["counter", "torch"]


@dataclass(frozen=True)
class Request:
    """What to generate: prompts as token ids, and the settings of one batch.

    max_new_tokens and steps (for each canvas) default to the generation config's; seed None draws one.

    rng "counter": a row's random tokens depend on the seed and on the row's number, not on the device or the batch.
    `rows` gives these numbers, 0, 1, … unless given: a prompt alone with rows=[3] gets what it would get as the fourth
    of a batch. rng "torch": numbers come from torch's generator in transformers' order, which gives transformers'
    tokens on a CPU; a CUDA device has another stream.

    turns: the conversation that the only prompt continues; what its cache already holds of the prompt is not encoded
    again.

    adapter: the adapter to apply, of those that the model was loaded with, or one for each prompt: see
    adapters.beside.Chosen.
    """

    prompts: Sequence[Sequence[int]]
    generation: GenerationConfig
    max_new_tokens: int | None = None
    seed: int | None = None
    steps: int | None = None
    rng: Rng = "counter"
    rows: Sequence[int] | None = None
    turns: Turns | None = None
    adapter: Chosen = None

    @property
    def wanted(self) -> int:
        """The most new tokens for each prompt."""
        return self.generation.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens

    @property
    def sampler(self) -> SamplerConfig:
        """The generation config's sampler, with this request's number of steps."""
        sampler = self.generation.sampler
        return sampler if self.steps is None else replace(sampler, steps=self.steps)


@dataclass(frozen=True)
class Block:
    """A committed block, for whoever streams text. What follows a row's end-of-sequence token is padding."""

    block: int  # counted from 0
    canvas: Tensor  # (rows, canvas) int64
    steps: tuple[int, ...]  # how many each row took
    rows: tuple[int, ...]  # the number of the prompt that each row belongs to
    ended: tuple[bool, ...]  # whether the row met its end-of-sequence token, in this block or before


@dataclass(frozen=True)
class Result:
    """What was generated, one entry for each prompt.

    tokens: the answer, cut before the first end-of-sequence token and at max_new_tokens. ended: whether the answer
    ended with such a token. canvases: (rows, blocks * canvas) int64 as committed, on the CPU. steps, stopped_early:
    for each block until the row finished, how many steps it took and whether that was less than allowed.
    """

    tokens: list[list[int]]
    ended: list[bool]
    canvases: Tensor
    steps: list[list[int]]
    stopped_early: list[list[bool]]


def generate(model: Model, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
    """Answer every prompt of a request; on_step is called after every denoising step.

    InputError for prompts that are empty, hold ids outside the vocabulary, or are too long for the context.
    """
    count = len(request.prompts)
    committed: list[Tensor] = []
    steps: list[list[int]] = [[] for _ in range(count)]
    finished = [False] * count
    for event in stream(model, request, every_step=on_step is not None):
        if isinstance(event, Step):
            assert on_step is not None
            on_step(event)
            continue
        committed.append(event.canvas.new_full((count, event.canvas.shape[1]), request.generation.pad_id))
        committed[-1][list(event.rows)] = event.canvas
        for row, taken, ended in zip(event.rows, event.steps, event.ended, strict=True):
            if not finished[row]:
                steps[row].append(taken)
            finished[row] = ended
    return _result(torch.cat(committed, dim=1).cpu(), steps, request)


@torch.inference_mode()
def stream(model: Model, request: Request, every_step: bool = True) -> Iterator[Step | Block]:
    """Yield what generate() does while it happens: each Step, if every_step, and each Block when it is committed.

    A model works on one stream at a time: on a GPU, a stream that goes on after another one began raises InputError.
    """
    generation, canvas_length = request.generation, model.config.canvas
    _check(model, request)
    random = _random(model, request)
    blocks = -(-request.wanted // canvas_length)
    batch = _batch(model, request, random, max(map(len, request.prompts)) + blocks * canvas_length)
    eos = torch.tensor(generation.eos_ids, device=model.device)
    rows = torch.arange(len(request.prompts), device=model.device)  # the prompts that are still in the batch
    finished = torch.zeros_like(rows, dtype=torch.bool)
    for block in range(blocks):
        canvas, steps = yield from batch.denoise(rows, block, every_step)
        is_eos = torch.isin(canvas, eos)
        after_eos = is_eos.cumsum(-1) - is_eos.int() > 0
        canvas = canvas.masked_fill(after_eos | finished[:, None], generation.pad_id)
        finished = finished | is_eos.any(-1)
        ended = tuple(finished.tolist())
        yield Block(block, canvas, tuple(steps.tolist()), tuple(rows.tolist()), ended)
        if all(ended) or block == blocks - 1:
            return
        if random.independent and any(ended):
            staying = (~finished).nonzero().flatten()
            batch.keep(staying)
            rows, canvas, finished = rows[staying], canvas[staying], finished[staying]
        batch.commit(canvas)


def _batch(model: Model, request: Request, random: Random, capacity: int) -> Batch:
    """Encode the prompts: in a session's fixed memory where there is a GPU, else in a growing cache."""
    prompts, sampler, turns = request.prompts, request.sampler, request.turns
    if turns is not None:
        turns.choose(request.adapter)
    if model.device.type == "cuda" and isinstance(random, CounterRandom):
        choose(model, request.adapter, len(prompts))
        if turns is None:
            return OnSlots(model, prompts, capacity, sampler, random)
        return TurnOnSlots(model, prompts[0], capacity, sampler, random, turns)
    model = choosing(model, request.adapter, len(prompts))
    if turns is None:
        return OnCache(model, prompts, capacity, sampler, random, request.generation.pad_id)
    return TurnOnCache(model, prompts[0], capacity, sampler, random, turns)


def _random(model: Model, request: Request) -> Random:
    """The request's random stream. InputError for a stream, a seed or row numbers that do not exist."""
    if request.rng not in get_args(Rng):
        raise InputError(f"rng is {request.rng!r}, expected one of {', '.join(get_args(Rng))}")
    seed = secrets.randbits(63) if request.seed is None else request.seed
    if not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"seed {seed} does not fit 64 bits")
    length, vocab, count = model.config.canvas, model.config.vocab, len(request.prompts)
    if request.rng == "torch":
        if request.rows is not None:
            raise InputError("rows number the stream of rng=counter; rng=torch has no numbers")
        return TorchRandom(seed, length, vocab, model.device)
    numbers = range(count) if request.rows is None else request.rows
    if len(numbers) != count:
        raise InputError(f"rows has {len(numbers)} numbers for {count} prompts")
    if not all(0 <= number < 1 << 32 for number in numbers):
        raise InputError(f"rows holds a number outside 0 to {(1 << 32) - 1}")
    return CounterRandom(seed, numbers, length, vocab, model.device)


def _check(model: Model, request: Request) -> None:
    """InputError for a request that the model cannot answer."""
    prompts, wanted, steps = request.prompts, request.wanted, request.sampler.steps
    if wanted < 1:
        raise InputError(f"max_new_tokens is {wanted}, expected 1 or more")
    if steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
    if request.turns is not None and len(prompts) != 1:
        raise InputError(f"a conversation has one prompt at a time, not {len(prompts)}")
    if not prompts or not all(prompts):
        raise InputError("the prompt is empty")
    worst = [token for prompt in prompts for token in prompt if not 0 <= token < model.config.vocab]
    if worst:
        raise InputError(f"the prompt holds token {worst[0]}, the vocabulary has {model.config.vocab}")
    longest, canvas = max(map(len, prompts)), model.config.canvas
    need = longest + -(-wanted // canvas) * canvas
    if need > model.config.context:
        raise InputError(
            f"the prompt's {longest} tokens and {need - longest} new ones (whole canvases of {canvas}) exceed the "
            f"context of {model.config.context}"
        )


def _result(canvases: Tensor, steps: list[list[int]], request: Request) -> Result:
    tokens, ended = [], []
    for row in canvases.tolist():
        stop = next((i for i, token in enumerate(row) if token in request.generation.eos_ids), len(row))
        tokens.append(row[: min(stop, request.wanted)])
        ended.append(stop < min(len(row), request.wanted))
    allowed = request.sampler.steps
    return Result(tokens, ended, canvases, steps, [[count < allowed for count in counts] for counts in steps])
