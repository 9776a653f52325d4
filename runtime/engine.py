"""Block denoising: encode what is known, denoise one canvas, commit it, go on.

    prompt ──encode──> cache       canvas 1 = noise ─ decode · decide · decode · decide … ─> argmax, committed
                         ^                                                                       │
                         └──────────────────────────── encode ───────────────────────────────────┘ then canvas 2 …

A batch's rows share every pass. A row whose canvas is done keeps it while the others go on; a row that met an
end-of-sequence token is finished, its tail becomes padding tokens, and it stays in the batch so that the random
stream of the others does not depend on it in another way than in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.cache import Cache
from dgq.runtime.model import Model
from dgq.runtime.sampler import Stopper, decide, random_tokens
from dgq.runtime.settings import GenerationConfig, SamplerConfig

# Prompt tokens encoded at once: bounds the attention scores and masks of a long prompt.
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
) -> Result:
    """Answer every prompt of a batch (shorter ones are padded on the left).

    max_new_tokens and steps (a canvas) default to the generation config's; seed None draws one. The same seed gives
    the same tokens on the same device; CPU and CUDA have different streams. InputError for prompts that are empty,
    outside the vocabulary, or too long for the context.
    """
    sampler = generation.sampler if steps is None else replace(generation.sampler, steps=steps)
    wanted = generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    length = model.config.canvas
    _check(model, prompt_ids, wanted, sampler.steps)
    blocks = -(-wanted // length)
    generator = torch.Generator(model.device)
    generator.manual_seed(generator.seed() if seed is None else seed)
    cache = _prefill(model, prompt_ids, generation.pad_id, blocks)
    eos = torch.tensor(generation.eos_ids, device=model.device)

    finished = torch.zeros(len(prompt_ids), dtype=torch.bool, device=model.device)
    committed: list[Tensor] = []
    used: list[list[int]] = [[] for _ in prompt_ids]
    for block in range(blocks):
        if committed:
            model.encode(committed[-1], cache)
        canvas, took = _denoise(model, cache, sampler, generator, block, on_step)
        for counts, count, over in zip(used, took.tolist(), finished.tolist(), strict=True):
            if not over:
                counts.append(count)
        is_eos = torch.isin(canvas, eos)
        after = is_eos.cumsum(-1) - is_eos.int() > 0
        committed.append(canvas.masked_fill(after | finished[:, None], generation.pad_id))
        finished = finished | is_eos.any(-1)
        if finished.all():
            break
    return _result(torch.cat(committed, dim=1).cpu(), used, generation.eos_ids, wanted, sampler.steps)


def _denoise(
    model: Model,
    cache: Cache,
    sampler: SamplerConfig,
    generator: torch.Generator,
    block: int,
    on_step: Callable[[Step], None] | None,
) -> tuple[Tensor, Tensor]:
    """One canvas from noise to argmax: (rows, canvas) ids and (rows,) steps taken."""
    canvas = random_tokens(cache.rows, model.config.canvas, model.config.vocab, generator)
    done = torch.zeros(cache.rows, dtype=torch.bool, device=model.device)
    took = torch.zeros(cache.rows, dtype=torch.long, device=model.device)
    stopper, argmax = Stopper(sampler), canvas
    conditioning: Tensor | None = None
    for left in range(sampler.steps, 0, -1):
        took += ~done
        logits = model.decode(canvas, cache, conditioning)
        if logits.sum().isnan():
            model.refuse_weights()
        new = decide(canvas, logits, left, sampler, generator)
        argmax = torch.where(done[:, None], argmax, new.argmax)
        canvas = torch.where(done[:, None], canvas, new.canvas)
        # cast as transformers does, to the embedding's dtype; a done row's no longer matters
        conditioning = new.logits.to(model.dtype)
        done = done | stopper.done(argmax, new.entropy)
        if on_step is not None:
            step = sampler.steps - left + 1
            on_step(Step(block, step, sampler.steps, argmax, new.accepted, new.entropy.mean(-1)))
        if done.all():
            break
    return argmax, took


def _prefill(model: Model, prompts: Sequence[Sequence[int]], pad_id: int, blocks: int) -> Cache:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    padding = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        padding[row, longest - len(prompt) :] = False
    ids, padding = ids.to(model.device), padding.to(model.device)
    padded = bool(padding.any())
    cache = model.new_cache(len(prompts), longest + blocks * model.config.canvas)
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
