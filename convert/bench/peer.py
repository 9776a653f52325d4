"""transformers' own DiffusionGemma beside ours: eager, dynamic cache, BF16, the grouped product for its experts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch

from dgq.convert.bench.shapes import STD

BLOCKS = 2


def bench_transformers(shapes: str, context: int, rows: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step inside its generate(), random weights: from one forward pass of the decoder to the next; and
    tokens a second, the encoding of a block included."""
    import transformers

    raw = json.loads(files("dgq.recipes").joinpath(f"{shapes}.json").read_text("utf-8"))
    raw.pop("architectures", None)
    raw["vision_config"] = {"model_type": "gemma4_vision", "num_hidden_layers": 1}  # which text does not touch
    config = transformers.DiffusionGemmaConfig(**raw)
    with torch.device("cuda"), _no_weights():
        model = transformers.DiffusionGemmaForBlockDiffusion._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
    model.tie_weights()
    _fill(model, "cuda")
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


@contextmanager
def _no_weights() -> Iterator[None]:
    """Modules get their buffers, and parameters without memory: encoder and decoder are two until they are tied."""
    register = torch.nn.Module.register_parameter

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = registered  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(model: torch.nn.Module, device: str) -> None:
    """Random weights, those that are tied once."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    real = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
                    values = real if real.dim() < 2 else real.normal_(0, STD)
                    made[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
