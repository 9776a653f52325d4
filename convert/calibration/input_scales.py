"""Input scales for W4A4 without STATS: how large the experts' inputs get, on both sides of the model.

    texts   prompt | true canvas, a share of it replaced at random    encoder; decoder, once conditioned on itself
    chats   prompt | noise, then what the model itself makes of it    encoder; decoder over the first drafts

    amax of every expert weight's input, over both sides  ->  input_scale = HEADROOM * amax / (6 * 448)

Either side can have the larger inputs, so both are run: scales taken from prompts alone would clip the canvas, or the
reverse. The drafts matter because the canvas of a chat is mostly padding behind a short answer, and no text looks like
that. A layer's experts see the same rows and share one scale for each of their two inputs. Texts are of one length and
chats are encoded one by one, so that there is no padding, whose activations belong to nobody.

The headroom is for what a short calibration has not seen (on `tiny`, held-out tasks reach 1.6 times its amax). It
costs nothing: block scales are floats, so that a power of two moves them within their range and changes no rounding.
What exceeds the scale would be cut off. modelopt has no headroom by default.

An amax is rounded up to eight bits of mantissa, so that sums in another order (on a GPU) hardly ever change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dgq.convert.layerwise.samples import default_prompts
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


class _LargestInputs:
    """A hook (an Observer, runtime/model/layers.py) that keeps the largest |x| of each expert weight's input, on the
    side that is being run: self.side, "encoder" or "decoder"."""

    def __init__(self) -> None:
        self.side = "encoder"
        self.largest: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}

    def __call__(
        self, name: str, x: torch.Tensor, y: torch.Tensor, expert: int | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        if expert is not None:
            amax, known = x.abs().amax().float(), self.largest[self.side].get(name)
            self.largest[self.side][name] = amax if known is None else torch.maximum(known, amax)
        return y


def input_scales(
    source: Source, device: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Expert weight's name -> input_scale, and what dgq.json says about it.

    progress: called with batches done and in all. InputError if the source has no usable tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_dir(source.path)
        texts, chats = _texts(source, tokenizer), _chats(source, tokenizer)
    except InputError as error:
        raise InputError(f"input scales cannot be calibrated: {error}; pass a number as --input-scale") from None
    hook = _LargestInputs()
    model = Model(source.config, source, device, torch.float32, source=str(source.path), observe=hook)
    generator = torch.Generator().manual_seed(0)
    total = (TEXTS + CHATS) // BATCH
    for i, start in enumerate(range(0, TEXTS, BATCH)):
        progress(i, total)
        _run_texts(model, hook, texts[start : start + BATCH], start, generator)
    for i, start in enumerate(range(0, CHATS, BATCH)):
        progress(TEXTS // BATCH + i, total)
        _run_chats(model, hook, chats[start : start + BATCH], generator)
    progress(total, total)
    amax = {side: {name: float(x) for name, x in largest.items()} for side, largest in hook.largest.items()}
    if not all(math.isfinite(value) for side in amax.values() for value in side.values()):
        model.refuse_weights()
    scales, amax = scales_from(amax)
    about = {"texts": TEXTS, "chats": CHATS, "prompt_tokens": texts.shape[1] - source.config.canvas, "drafts": DRAFTS}
    return scales, {"method": "calibrated", "headroom": HEADROOM, **about, "amax": amax}


def _run_texts(model: Model, hook: _LargestInputs, rows: torch.Tensor, first: int, generator: torch.Generator) -> None:
    canvas = model.config.canvas
    level = torch.tensor([[NOISE[(first + i) % len(NOISE)]] for i in range(len(rows))])
    noisy = torch.rand(len(rows), canvas, generator=generator) < level
    random = torch.randint(0, model.config.vocab, noisy.shape, generator=generator)
    ids = torch.where(noisy, random, rows[:, -canvas:]).to(model.device)
    cache = model.new_cache(len(rows))
    hook.side = "encoder"
    model.encode(rows[:, :-canvas].to(model.device), cache)
    hook.side = "decoder"
    logits = model.decode(ids, cache)
    model.decode(ids, cache, logits)


def _run_chats(model: Model, hook: _LargestInputs, prompts: list[list[int]], generator: torch.Generator) -> None:
    hook.side = "encoder"
    caches = [model.new_cache(1) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.encode(torch.tensor([prompt], device=model.device), cache)
    stacked = model.new_cache(len(prompts), max(map(len, prompts)) + model.config.canvas)
    stacked.stack(caches)
    hook.side = "decoder"
    shape = (len(prompts), model.config.canvas)
    canvas = torch.randint(0, model.config.vocab, shape, generator=generator).to(model.device)
    logits: torch.Tensor | None = None
    for _ in range(DRAFTS):
        logits = model.decode(canvas, stacked, logits)
        canvas = logits.argmax(-1)


def _texts(source: Source, tokenizer: Tokenizer) -> torch.Tensor:
    """(TEXTS, prompt + canvas) ids. Each row begins where a text begins, and goes on into the next ones if the text is
    short."""
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
    """CHATS prompts through the chat template; as plain text if the model has no template."""
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
    return [entry for _, entry in default_prompts(source).json_lines()]


def scales_from(amax: dict[str, dict[str, float]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Both sides' amax of each weight's input -> its input scale, and the amax, rounded up, of which it was made."""
    amax = {side: {name: _rounded_up(value) for name, value in largest.items()} for side, largest in amax.items()}
    scales = {
        name: float(global_scale(torch.tensor(HEADROOM * max(value, amax["encoder"][name]))))
        for name, value in amax["decoder"].items()
    }
    return scales, amax


def _rounded_up(value: float) -> float:
    """The next bfloat16 that is not below a positive float32."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32)
    return float(((bits + 0xFFFF) & ~0xFFFF).view(torch.float32))
