"""What a model costs to run: load time, memory, milliseconds a step: of one prompt alone, as a user sees it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from dgq.convert.resume.work import UnitResult, numbers
from dgq.runtime.engine.engine import Step, generate
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import GenerationConfig

STEPS = 8  # timed, after two that are not
STATUS = Path("/proc/self/status")


def cost(
    load: Callable[[], Model], prompt: Sequence[int], generation: GenerationConfig, device: str
) -> tuple[Model, UnitResult]:
    """Load a model and time it: the model, and load_s, step_ms, bytes of its weights in memory, and peak_bytes: on a
    GPU what torch allocated at its peak, elsewhere by how much the process grew at its peak."""
    before = _watermark(device)
    began = time.perf_counter()
    model = load()
    _wait(device)
    load_s = time.perf_counter() - began
    endless = replace(generation.sampler, stability=10_000, steps=STEPS + 2)
    at: list[float] = []

    def on_step(step: Step) -> None:
        _wait(device)
        at.append(time.perf_counter())

    generate(model, [prompt], replace(generation, sampler=endless), model.config.canvas, 0, on_step=on_step)
    gaps = [1000 * (b - a) for a, b in pairwise(at[1:])]
    peak = _peak(device) - before
    return model, numbers(
        load_s=load_s, step_ms=statistics.median(gaps), weight_bytes=model.nbytes, peak_bytes=max(peak, model.nbytes)
    )


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _watermark(device: str) -> int:
    """Memory in use now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes, of Linux's account of this process; 0 elsewhere."""
    if not STATUS.is_file():
        return 0
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == key + ":"), 0)
