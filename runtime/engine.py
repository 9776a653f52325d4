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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.cache import Cache
from dgq.runtime.model import Model
from dgq.runtime.rng import CounterRandom, Random, TorchRandom
from dgq.runtime.sampler import Stopper, decide
from dgq.runtime.settings import GenerationConfig, SamplerConfig

# Prompt tokens encoded at once: bounds the attention scores and masks of a long prompt.
PREFILL = 512

Rng = Literal["counter", "torch"]


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


@torch.inference_mode()
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
) -> Result:
    """Answer every prompt of a batch (shorter ones are padded on the left).

    max_new_tokens and steps (a canvas) default to the generation config's; seed None draws one. InputError for
    prompts that are empty, outside the vocabulary, or too long for the context.

    rng "counter": a row's random tokens depend on the seed and the row's number only, not on device or batch. rows
    are those numbers, 0, 1, … unless given: a prompt alone with rows=[3] gets what it gets as the fourth of a batch.
    "torch": transformers' draws from torch's generator, which on a CPU give its tokens; CUDA's stream is another.
    """
    sampler = generation.sampler if steps is None else replace(generation.sampler, steps=steps)
    wanted = generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    _check(model, prompt_ids, wanted, sampler.steps)
    random = _random(model, len(prompt_ids), rng, seed, rows)
    eos = torch.tensor(generation.eos_ids, device=model.device)
    blocks = -(-wanted // model.config.canvas)
    capacity = max(map(len, prompt_ids)) + blocks * model.config.canvas
    if random.independent:
        cache = encode_each(model, prompt_ids, capacity)
    else:
        cache = _prefill(model, prompt_ids, generation.pad_id, capacity)

    here = torch.arange(len(prompt_ids), device=model.device)  # the batch's rows
    finished = torch.zeros_like(here, dtype=torch.bool)
    committed: list[Tensor] = []
    used: list[list[int]] = [[] for _ in prompt_ids]
    for block in range(blocks):
        canvas, took = _denoise(model, cache, sampler, random, here, block, on_step)
        for row, count, over in zip(here.tolist(), took.tolist(), finished.tolist(), strict=True):
            if not over:
                used[row].append(count)
        is_eos = torch.isin(canvas, eos)
        after = is_eos.cumsum(-1) - is_eos.int() > 0
        canvas = canvas.masked_fill(after | finished[:, None], generation.pad_id)
        finished = finished | is_eos.any(-1)
        committed.append(canvas.new_full((len(prompt_ids), canvas.shape[1]), generation.pad_id))
        committed[-1][here] = canvas
        if finished.all() or block == blocks - 1:
            break
        if random.independent and finished.any():
            stay = (~finished).nonzero().flatten()
            cache.keep(stay)
            here, canvas, finished = here[stay], canvas[stay], finished[stay]
        model.encode(canvas, cache)
    return _result(torch.cat(committed, dim=1).cpu(), used, generation.eos_ids, wanted, sampler.steps)


def _denoise(
    model: Model,
    cache: Cache,
    sampler: SamplerConfig,
    random: Random,
    rows: Tensor,
    block: int,
    on_step: Callable[[Step], None] | None,
) -> tuple[Tensor, Tensor]:
    """One canvas from noise to argmax: (rows, canvas) ids and (rows,) steps taken."""
    canvas = random.canvas(rows, block)
    done = torch.zeros_like(rows, dtype=torch.bool)
    took = torch.zeros_like(rows)
    stopper, argmax = Stopper(sampler), canvas
    conditioning: Tensor | None = None
    for step in range(1, sampler.steps + 1):
        took += ~done
        logits = model.decode(canvas, cache, conditioning)
        if logits.sum().isnan():
            model.refuse_weights()
        draw = partial(random.draw, rows=rows, block=block, step=step)
        new = decide(logits, sampler.steps + 1 - step, sampler, draw)
        argmax = torch.where(done[:, None], argmax, new.argmax)
        canvas = torch.where(done[:, None], canvas, new.canvas)
        # cast as transformers does, to the embedding's dtype; a done row's no longer matters
        conditioning = new.logits.to(model.dtype)
        done = done | stopper.done(argmax, new.entropy)
        if on_step is not None:
            entropy = new.entropy.mean(-1)
            on_step(Step(block, step, sampler.steps, argmax, new.accepted, entropy, tuple(rows.tolist())))
        if done.all():
            break
    return argmax, took


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
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        padding[row, longest - len(prompt) :] = False
    ids, padding = ids.to(model.device), padding.to(model.device)
    padded = bool(padding.any())
    cache = model.new_cache(len(prompts), capacity)
    for start in range(0, longest, PREFILL):
        part = slice(start, start + PREFILL)
        model.encode(ids[:, part], cache, padding=padding[:, part] if padded else None)
    return cache


def _check(model: Model, prompts: Sequence[Sequence[int]], wanted: int, steps: int) -> None:
    if wanted < 1:
        raise InputError(f"max_new_tokens is {wanted}, expected 1 or more")
    if steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
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
