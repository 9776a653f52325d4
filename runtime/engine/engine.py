"""Block denoising: encode what is known, denoise one canvas, commit it, go on.

    prompt ──encode──> cache       canvas 1 = noise ─ decode · decide · decode · decide … ─> argmax, committed
                         ^                                                                       │
                         └──────────────────────────── encode ───────────────────────────────────┘ then canvas 2 …

A batch's rows share every pass. A row whose canvas is done keeps it while the others finish theirs. A row that met an
end-of-sequence token is finished: its tail becomes padding tokens, and it leaves at the block's end,

    prompt 0   ##### | canvas | canvas <eos>|
    prompt 1      ## | canv<eos>            :
    prompt 2   ### # | canvas | canvas | canvas | …       alone in the batch from here on

unless the random stream is torch's, whose other rows would draw something else without it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.engine.batch import Batch, OnSlots, Reference, Step
from dgq.runtime.engine.turns import TurnOnCache, TurnOnSlots, Turns
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, Random, TorchRandom
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

__all__ = ["Block", "Result", "Step", "generate", "stream"]

Rng = Literal["counter", "torch"]


@dataclass(frozen=True)
class Block:
    """A committed block, for whoever passes text on. What follows a row's end-of-sequence token is padding."""

    block: int  # from 0
    canvas: Tensor  # (rows, canvas) int64
    steps: tuple[int, ...]  # that each row took
    rows: tuple[int, ...]  # which prompts these are
    ended: tuple[bool, ...]  # whether the row met its end-of-sequence token, here or before


@dataclass(frozen=True)
class Result:
    """What was generated, one entry a row.

    tokens: cut before the first end-of-sequence token and at max_new_tokens. ended: whether such a token was met
    within them. canvases: (rows, blocks * canvas) as committed, on the CPU. steps and stopped_early: for each block
    until the row finished, how many steps it took and whether that was less than allowed.
    """

    tokens: list[list[int]]
    ended: list[bool]
    canvases: Tensor
    steps: list[list[int]]
    stopped_early: list[list[bool]]


def generate(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    generation: GenerationConfig,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    *,
    rng: Rng = "counter",
    rows: Sequence[int] | None = None,
    turns: Turns | None = None,
) -> Result:
    """Answer every prompt of a batch.

    max_new_tokens and steps (a canvas) default to the generation config's; seed None draws one. InputError for
    prompts that are empty, outside the vocabulary, or too long for the context.

    rng "counter": a row's random tokens depend on the seed and the row's number only, not on device or batch. rows
    are those numbers, 0, 1, … unless given: a prompt alone with rows=[3] gets what it gets as the fourth of a batch.
    "torch": transformers' draws from torch's generator, which on a CPU give its tokens; CUDA's stream is another.

    turns: of a conversation, whose next prompt is the only one; what its cache has of that is not encoded again.
    """
    wanted = generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    sampler = _sampler(generation, steps)
    committed: list[Tensor] = []
    used: list[list[int]] = [[] for _ in prompt_ids]
    over = [False] * len(prompt_ids)
    events = stream(
        model, prompt_ids, generation, wanted, seed, steps, rng=rng, rows=rows, every_step=on_step is not None,
        turns=turns,
    )  # fmt: skip
    for event in events:
        if isinstance(event, Step):
            assert on_step is not None
            on_step(event)
            continue
        committed.append(event.canvas.new_full((len(prompt_ids), event.canvas.shape[1]), generation.pad_id))
        committed[-1][list(event.rows)] = event.canvas
        for row, count, ended in zip(event.rows, event.steps, event.ended, strict=True):
            if not over[row]:
                used[row].append(count)
            over[row] = ended
    return _result(torch.cat(committed, dim=1).cpu(), used, generation.eos_ids, wanted, sampler.steps)


@torch.inference_mode()
def stream(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    generation: GenerationConfig,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    *,
    rng: Rng = "counter",
    rows: Sequence[int] | None = None,
    every_step: bool = True,
    turns: Turns | None = None,
) -> Iterator[Step | Block]:
    """What generate() does, as it happens: each Step, if every_step, and each Block when it is committed.

    Arguments as for generate(). A model works on one stream at a time: on a GPU, InputError where one goes on after
    another was begun.
    """
    sampler = _sampler(generation, steps)
    wanted = generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    _check(model, prompt_ids, wanted, sampler.steps, turns)
    random = _random(model, len(prompt_ids), rng, seed, rows)
    blocks = -(-wanted // model.config.canvas)
    capacity = max(map(len, prompt_ids)) + blocks * model.config.canvas
    eos = torch.tensor(generation.eos_ids, device=model.device)
    batch: Batch
    if model.device.type == "cuda" and isinstance(random, CounterRandom):
        if turns is None:
            batch = OnSlots(model, prompt_ids, capacity, sampler, random)
        else:
            batch = TurnOnSlots(model, prompt_ids[0], capacity, sampler, random, turns)
    elif turns is None:
        batch = Reference(model, prompt_ids, capacity, sampler, random, generation.pad_id)
    else:
        batch = TurnOnCache(model, prompt_ids[0], capacity, sampler, random, turns)

    here = torch.arange(len(prompt_ids), device=model.device)  # the batch's rows
    finished = torch.zeros_like(here, dtype=torch.bool)
    for block in range(blocks):
        canvas, took = yield from batch.denoise(here, block, every_step)
        is_eos = torch.isin(canvas, eos)
        after = is_eos.cumsum(-1) - is_eos.int() > 0
        canvas = canvas.masked_fill(after | finished[:, None], generation.pad_id)
        finished = finished | is_eos.any(-1)
        numbers, over = tuple(here.tolist()), tuple(finished.tolist())
        yield Block(block, canvas, tuple(took.tolist()), numbers, over)
        if all(over) or block == blocks - 1:
            return
        if random.independent and any(over):
            stay = (~finished).nonzero().flatten()
            batch.keep(stay)
            here, canvas, finished = here[stay], canvas[stay], finished[stay]
        batch.commit(canvas)


def _sampler(generation: GenerationConfig, steps: int | None) -> SamplerConfig:
    return generation.sampler if steps is None else replace(generation.sampler, steps=steps)


def _random(model: Model, count: int, rng: Rng, seed: int | None, rows: Sequence[int] | None) -> Random:
    if rng not in get_args(Rng):
        raise InputError(f"rng is {rng!r}, expected one of {', '.join(get_args(Rng))}")
    seed = secrets.randbits(63) if seed is None else seed
    if not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"seed {seed} does not fit 64 bits")
    length, vocab = model.config.canvas, model.config.vocab
    if rng == "torch":
        if rows is not None:
            raise InputError("rows number the stream of rng=counter; rng=torch has no numbers")
        return TorchRandom(seed, length, vocab, model.device)
    numbers = range(count) if rows is None else rows
    if len(numbers) != count:
        raise InputError(f"rows has {len(numbers)} numbers for {count} prompts")
    if not all(0 <= number < 1 << 32 for number in numbers):
        raise InputError(f"rows holds a number outside 0 to {(1 << 32) - 1}")
    return CounterRandom(seed, numbers, length, vocab, model.device)


def _check(model: Model, prompts: Sequence[Sequence[int]], wanted: int, steps: int, turns: Turns | None) -> None:
    if wanted < 1:
        raise InputError(f"max_new_tokens is {wanted}, expected 1 or more")
    if steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
    if turns is not None and len(prompts) != 1:
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


def _result(canvases: Tensor, used: list[list[int]], eos: Sequence[int], wanted: int, steps: int) -> Result:
    tokens, ended = [], []
    for row in canvases.tolist():
        stop = next((i for i, token in enumerate(row) if token in eos), len(row))
        tokens.append(row[: min(stop, wanted)])
        ended.append(stop < min(len(row), wanted))
    return Result(tokens, ended, canvases, used, [[count < steps for count in counts] for counts in used])
