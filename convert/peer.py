"""transformers' own DiffusionGemma beside ours: eager, dynamic cache, BF16, the grouped product for its experts."""

from __future__ import annotations

import json
import statistics
import time
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch

BLOCKS = 2


def bench_transformers(shapes: str, context: int, rows: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step inside its generate(), random weights: from one forward pass of the decoder to the next; and
    tokens a second, the encoding of a block included."""
    import transformers

    raw = json.loads(files("dgq.recipes").joinpath(f"{shapes}.json").read_text())
    raw.pop("architectures", None)
    config = transformers.DiffusionGemmaConfig(**raw)
    with torch.device("cuda"):
        model = transformers.DiffusionGemmaForBlockDiffusion._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
    steps_begin: list[torch.cuda.Event] = []

    def begins(*_: Any) -> None:
        steps_begin.append(torch.cuda.Event(enable_timing=True))
        steps_begin[-1].record()

    model.model.decoder.register_forward_pre_hook(begins)
    length = config.canvas_length
    ids = torch.randint(0, config.text_config.vocab_size, (rows, context), device="cuda")
    settings = {
        "max_denoising_steps": steps, "confidence_threshold": 1e-30, "stability_threshold": 1, "eos_token_id": None,
        "disable_compile": True, "pad_token_id": 0,
    }  # fmt: skip
    model.generate(ids, max_new_tokens=length, **settings)
    steps_begin.clear()
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=BLOCKS * length, **settings)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    gaps = [a.elapsed_time(b) for a, b in pairwise(steps_begin)]
    within = [gap for number, gap in enumerate(gaps, 1) if number % steps]
    return {
        "step_ms": statistics.median(within),
        "tokens_per_s": rows * BLOCKS * length / seconds,  # its prompt's encoding included, too
        "transformers": transformers.__version__,
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }
