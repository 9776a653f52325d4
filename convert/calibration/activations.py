"""Input scales for W4A4: how large the activations get that go into the experts, on both sides of the model.

    texts   prompt | true canvas, a share of it replaced at random    encoder; decoder, once conditioned on itself
    chats   prompt | noise, then what the model itself makes of it    encoder; decoder over the first drafts

    amax of every expert weight's input, over both sides  ->  input_scale = HEADROOM * amax / (6 * 448)

Either side can be the louder one, so both are run: scales taken from prompts alone would clip the canvas, or the
reverse. The drafts matter because a chat's canvas is mostly padding behind a short answer, which no text looks like.
A layer's experts see the same rows and share one scale for each of their two inputs. Texts are of one length and
chats are encoded one by one: there is no padding, whose activations belong to nobody.

The headroom is for what a short calibration has not seen (on `tiny`, held-out tasks reach 1.6 times its amax). It
costs nothing: block scales are floats, a power of two moves them within their range and changes no rounding, and what
exceeds the scale would be cut off. modelopt has none by default.

An amax is rounded up to eight bits of mantissa: sums in another order (a GPU) then hardly ever show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from dgq.convert.layerwise.samples import shipped
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import global_scale
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model.model import Model

TEXTS, CHATS, BATCH = 4, 4, 2
HEADROOM = 2.0
PROMPT = 256  # tokens of a text before its canvas
DRAFTS = 4
NOISE = (0.25, 0.5, 0.75, 1.0)  # share of a text's canvas replaced, by row


class _Watch:
    """Keeps the largest activation of each weight, on each side."""

    def __init__(self) -> None:
        self.side = "encoder"
        self.seen: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}

    def __call__(
        self, name: str, x: torch.Tensor, y: torch.Tensor, expert: int | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        if expert is not None:
            amax, known = x.abs().amax().float(), self.seen[self.side].get(name)
            self.seen[self.side][name] = amax if known is None else torch.maximum(known, amax)
        return y


def input_scales(
    source: Source, device: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Expert weight's name -> input_scale, and what to write about it into dgq.json.

    progress is called with batches done and in all. InputError if the source has no usable tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_dir(source.path)
        texts, chats = _texts(source, tokenizer), _chats(source, tokenizer)
    except InputError as error:
        raise InputError(f"input scales cannot be calibrated: {error}; pass a number as --input-scale") from None
    watch = _Watch()
    model = Model(source.config, source, device, torch.float32, source=str(source.path), observe=watch)
    generator = torch.Generator().manual_seed(0)
    total = (TEXTS + CHATS) // BATCH
    for i, start in enumerate(range(0, TEXTS, BATCH)):
        progress(i, total)
        _run_texts(model, watch, texts[start : start + BATCH], start, generator)
    for i, start in enumerate(range(0, CHATS, BATCH)):
        progress(TEXTS // BATCH + i, total)
        _run_chats(model, watch, chats[start : start + BATCH], generator)
    progress(total, total)
    amax = {side: {name: float(value) for name, value in found.items()} for side, found in watch.seen.items()}
    if not all(math.isfinite(value) for found in amax.values() for value in found.values()):
        model.refuse_weights()
    scales, amax = scales_from(amax)
    about = {"texts": TEXTS, "chats": CHATS, "prompt_tokens": texts.shape[1] - source.config.canvas, "drafts": DRAFTS}
    return scales, {"method": "calibrated", "headroom": HEADROOM, **about, "amax": amax}


def _run_texts(model: Model, watch: _Watch, rows: torch.Tensor, first: int, generator: torch.Generator) -> None:
    canvas = model.config.canvas
    level = torch.tensor([[NOISE[(first + i) % len(NOISE)]] for i in range(len(rows))])
    noisy = torch.rand(len(rows), canvas, generator=generator) < level
    random = torch.randint(0, model.config.vocab, noisy.shape, generator=generator)
    ids = torch.where(noisy, random, rows[:, -canvas:]).to(model.device)
    cache = model.new_cache(len(rows))
    watch.side = "encoder"
    model.encode(rows[:, :-canvas].to(model.device), cache)
    watch.side = "decoder"
    logits = model.decode(ids, cache)
    model.decode(ids, cache, logits)


def _run_chats(model: Model, watch: _Watch, prompts: list[list[int]], generator: torch.Generator) -> None:
    watch.side = "encoder"
    caches = [model.new_cache(1) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.encode(torch.tensor([prompt], device=model.device), cache)
    stacked = model.new_cache(len(prompts), max(map(len, prompts)) + model.config.canvas)
    stacked.stack(caches)
    watch.side = "decoder"
    shape = (len(prompts), model.config.canvas)
    canvas = torch.randint(0, model.config.vocab, shape, generator=generator).to(model.device)
    logits: torch.Tensor | None = None
    for _ in range(DRAFTS):
        logits = model.decode(canvas, stacked, logits)
        canvas = logits.argmax(-1)


def _texts(source: Source, tokenizer: Tokenizer) -> torch.Tensor:
    """(TEXTS, prompt + canvas) ids: each begins where a text begins and goes on into the next ones if it is short."""
    canvas = source.config.canvas
    length = min(PROMPT, source.config.context - canvas) + canvas
    if length <= canvas:
        raise InputError(f"the context of {source.config.context} has no room for a prompt and a canvas of {canvas}")
    texts = [tokenizer.encode(item["text"]) for item in _prompts(source) if "text" in item]
    rows = []
    for i in range(TEXTS):
        row: list[int] = []
        start = i * len(texts) // TEXTS
        while len(row) < length:
            row += texts[start % len(texts)]
            start += 1
        rows.append(_known(row[:length], source))
    return torch.tensor(rows)


def _chats(source: Source, tokenizer: Tokenizer) -> list[list[int]]:
    """CHATS prompts through the chat template; through none, as plain text, if the model has none."""
    items = [item["messages"] for item in _prompts(source) if "messages" in item]
    items = [messages[:-1] if messages[-1]["role"] == "assistant" else messages for messages in items]
    chosen = [items[i * len(items) // CHATS] for i in range(CHATS)]
    room = source.config.context - source.config.canvas
    try:
        prompts = [tokenizer.chat(messages) for messages in chosen]
    except InputError:
        prompts = [tokenizer.encode("\n".join(message["content"] for message in messages)) for messages in chosen]
    return [_known(prompt[-room:], source) for prompt in prompts]


def _known(ids: list[int], source: Source) -> list[int]:
    vocab = source.config.vocab
    if not ids or max(ids) >= vocab:
        raise InputError(f"{source.path}: its tokenizer gives {f'token {max(ids)}' if ids else 'no tokens'}, the"
                         f" vocabulary has {vocab}")  # fmt: skip
    return ids


def _prompts(source: Source) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shipped(source)[1].decode().splitlines()]


def scales_from(amax: dict[str, dict[str, float]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Both sides' amax of each weight's input -> its input scale, and the amax rounded up that it was made of."""
    amax = {side: {name: _rounded_up(value) for name, value in found.items()} for side, found in amax.items()}
    scales = {
        name: float(global_scale(torch.tensor(HEADROOM * max(value, amax["encoder"][name]))))
        for name, value in amax["decoder"].items()
    }
    return scales, amax


def _rounded_up(value: float) -> float:
    """The next bfloat16 that is not below a positive float32."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32)
    return float(((bits + 0xFFFF) & ~0xFFFF).view(torch.float32))
