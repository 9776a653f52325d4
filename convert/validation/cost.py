"""What a model costs to run, measured on one prompt alone, as a user sees it: seconds, memory, milliseconds of a step.

memory now ── load ── STEPS + 2 denoising steps, the last STEPS of them timed ── memory at the peak
"""

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
from dgq.runtime.engine.engine import Request, Step, generate
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import GenerationConfig

STEPS = 8  # timed, after two that are not
STATUS = Path("/proc/self/status")


def cost(
    load: Callable[[], Model], prompt: Sequence[int], generation: GenerationConfig, device: str
) -> tuple[Model, UnitResult]:
    """Load a model and time it: the model, and the fields of result.Cost as float64 scalars. On a GPU the peak is what
    torch allocated, elsewhere by how much the process grew."""
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

    generate(model, Request([prompt], replace(generation, sampler=endless), model.config.canvas, 0), on_step=on_step)
    gaps = [1000 * (b - a) for a, b in pairwise(at[1:])]
    peak = _peak(device) - before
    return model, numbers(
        load_s=load_s, step_ms=statistics.median(gaps), weight_bytes=model.nbytes, peak_bytes=max(peak, model.nbytes)
    )


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _watermark(device: str) -> int:
    """Bytes of memory in use now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes, from Linux's account of this process; 0 on other systems."""
    if not STATUS.is_file():
        return 0
    lines = (line.split() for line in STATUS.read_text("utf-8").splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == key + ":"), 0)
