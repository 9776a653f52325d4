"""Input scales for W4A4: how large the activations get that go into the experts, on both sides of the model.

    held texts -> rows of tokens: prompt | true canvas
    encoder   the prompt                                     amax per expert weight ┐ the larger one / (6 * 448)
    decoder   the canvas, a share of it replaced at random,   amax per expert weight ┘ = input_scale
              without and with self-conditioning

The decoder's activations are larger than the encoder's, so scales taken from prompts alone would clip the canvas.
A layer's experts see the same rows and share one scale for each of their two inputs, as modelopt has it. Rows are of
one length: no padding, whose activations belong to no text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch

from dgq.convert.source import Source
from dgq.quant.errors import InputError
from dgq.quant.nvfp4 import global_scale
from dgq.runtime.model import Model
from dgq.runtime.tokenizer import Tokenizer

ROWS, BATCH, PROMPT = 8, 2, 256
NOISE = (0.25, 0.5, 0.75, 1.0)  # share of a canvas replaced, by row


def input_scales(
    source: Source, device: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Expert weight's name -> input_scale, and what to write about it into dgq.json.

    progress is called with batches done and in all. InputError if the source has no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_dir(source.path)
    except InputError as error:
        raise InputError(f"calibrating input scales needs the tokenizer: {error}; or pass --input-scale 1.0") from None
    rows = _rows(source, tokenizer)
    seen: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}
    side = "encoder"

    def observe(name: str, expert: int, x: torch.Tensor) -> None:
        amax = x.abs().amax().float()
        known = seen[side].get(name)
        seen[side][name] = amax if known is None else torch.maximum(known, amax)

    model = Model(source.config, source, device, torch.float32, source=str(source.path), observe=observe)
    generator = torch.Generator().manual_seed(0)
    canvas = source.config.canvas
    for start in range(0, ROWS, BATCH):
        progress(start // BATCH, ROWS // BATCH)
        batch = rows[start : start + BATCH]
        level = torch.tensor([[NOISE[(start + i) % len(NOISE)]] for i in range(len(batch))])
        noisy = torch.rand(len(batch), canvas, generator=generator) < level
        random = torch.randint(0, source.config.vocab, noisy.shape, generator=generator)
        ids = torch.where(noisy, random, batch[:, -canvas:]).to(model.device)
        cache = model.new_cache(len(batch))
        side = "encoder"
        model.encode(batch[:, :-canvas].to(model.device), cache)
        side = "decoder"
        logits = model.decode(ids, cache)
        model.decode(ids, cache, logits)
    progress(ROWS // BATCH, ROWS // BATCH)
    amax = {side: {name: float(value) for name, value in found.items()} for side, found in seen.items()}
    if not all(math.isfinite(value) for found in amax.values() for value in found.values()):
        model.refuse_weights()
    scales = {
        name: float(global_scale(torch.tensor(max(value, amax["encoder"][name]))))
        for name, value in amax["decoder"].items()
    }
    about = {"method": "calibrated", "rows": ROWS, "prompt_tokens": rows.shape[1] - canvas, "canvas_tokens": canvas}
    return scales, about | {"amax": amax}


def _rows(source: Source, tokenizer: Tokenizer) -> torch.Tensor:
    """ROWS windows of the calibration prompts, one after the other with equal gaps: (ROWS, prompt + canvas) ids."""
    canvas = source.config.canvas
    length = min(PROMPT, source.config.context - canvas) + canvas
    lines = files("dgq.recipes").joinpath("prompts", "calibration.jsonl").read_text("utf-8").splitlines()
    stream: list[int] = []
    for line in lines:
        item = json.loads(line)
        stream += tokenizer.encode(item["text"]) if "text" in item else tokenizer.chat(item["messages"])
    ids = torch.tensor(stream * -(-length // len(stream)))
    step = (len(ids) - length) // (ROWS - 1)
    return torch.stack([ids[i * step : i * step + length] for i in range(ROWS)])
