"""How fast one model denoises here, where the time goes, and what it needs.

steps       by events, from one step's beginning to the next's, inside generate(): every step sees another canvas
parts       by the profiler: the kernels of one replayed step in their order
tokens/s    from a block's commitment to the next one's, the encoding of the block included
floors      what bytes and operations allow: see floors.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from dgq.convert.bench.floors import Ceilings, floor_of_a_step
from dgq.convert.bench.shapes import RandomWeights, plan_of_shapes
from dgq.convert.estimate.needs import Runtime
from dgq.convert.source.models import open_model
from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Block, Request, stream
from dgq.runtime.model.loading import LoadOptions, decodes
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import GenerationConfig

WARM, TIMED = 2, 4  # blocks


@dataclass(frozen=True)
class BenchLoad:
    """What a model has to do. context: tokens of the prompt; rows: of the batch; steps: of a block; vram: bytes of the
    GPU that it may use, None for all."""

    context: int
    rows: int
    steps: int
    vram: int | None = None


def bench_shapes(shapes: str, scheme: str, load: BenchLoad, ceilings: Ceilings, zipf: bool = False) -> dict[str, Any]:
    """Measure a model of random weights: see measure(). shapes, scheme: of shapes.SHAPES and shapes.SCHEMES; zipf:
    experts are chosen as unevenly as words. Adds made_s, seconds, and planned, the bytes that `dgq plan` gives."""
    plan = plan_of_shapes(shapes, scheme)
    config, weights = plan.source.config, RandomWeights(plan, "cuda", zipf)
    limits = LoadOptions(vram=load.vram)
    model, seconds = _loaded(lambda: Model(config, weights, "cuda", source=f"random {shapes}", options=limits))
    runtime, decoded = Runtime.of(plan), decodes(config, _memory(load))
    needed = runtime.vram(load.context + (WARM + TIMED) * config.canvas, load.rows)
    planned = needed["decoded" if decoded else "total"]
    if load.vram is not None:
        away = runtime.offloaded(load.vram)
        planned += (0 if away is None else away["on_gpu"]) - runtime.weights(decoded)
    return measure(model, plan.source.generation, load, ceilings) | {"made_s": seconds, "planned": planned}


def _memory(load: BenchLoad) -> int:
    """The bytes that the model may take of the GPU."""
    whole = int(torch.cuda.mem_get_info()[1])
    return whole if load.vram is None else min(whole, load.vram)


def bench_artifact(
    model: str, load: BenchLoad, ceilings: Ceilings, notice: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure an artifact or a BF16 source, by path or Hub id: see measure(). Adds load_s, seconds. InputError if its
    context is too short."""
    artifact = open_model(model, notice=notice)
    if load.context + (WARM + TIMED) * artifact.config.canvas > artifact.config.context:
        raise InputError(f"--context {load.context}: {model} holds {artifact.config.context} tokens, answer included")
    loaded, seconds = _loaded(lambda: artifact.load("cuda", vram=load.vram))
    return measure(loaded, artifact.generation, load, ceilings) | {"load_s": seconds}


@torch.inference_mode()
def measure(model: Model, generation: GenerationConfig, load: BenchLoad, ceilings: Ceilings) -> dict[str, Any]:
    """Times in milliseconds if they end in _ms, in seconds if in _s, medians; bytes of memory. model: on a GPU, in
    bfloat16."""
    timed = _timed(model, generation, load)
    steps = timed.paces["step"]
    context = load.context + (WARM + TIMED // 2) * model.config.canvas
    floors = floor_of_a_step(model, load.rows, context, ceilings)
    step, floor, prompt = statistics.median(steps), sum(floors.values()), timed.paces["prompt"][0]
    kernels = model.kernels
    return {
        "step_ms": step,
        "floor_ms": floor,
        "ratio": step / floor,
        "spread_ms": [min(steps), max(steps)],
        "parts_ms": parts_of_a_step(model),
        "floors_ms": floors,
        "commit_ms": statistics.median(timed.paces["commit"]),
        "block_ms": timed.block * 1e3,
        "tokens_per_s": load.rows * model.config.canvas / timed.block,
        "prompt_ms": prompt,
        "prompt_tokens_per_s": load.rows * load.context / prompt * 1e3,
        "first_block_s": timed.first_block,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "weights": 0 if kernels is None else kernels.nbytes,
        "copied": 0 if kernels is None or kernels.offload is None else kernels.offload.copied,
        **asdict(load),
    }


@dataclass(frozen=True)
class _Timed:
    """paces: milliseconds of each pass, see _paces(); block, first_block: seconds."""

    paces: dict[str, list[float]]
    block: float
    first_block: float


def _timed(model: Model, generation: GenerationConfig, load: BenchLoad) -> _Timed:
    """Run WARM blocks, then WARM + TIMED blocks with a clock, from random prompts."""
    config = model.config
    sampler = replace(generation.sampler, steps=load.steps, confidence=0.0)  # no canvas is done before its last step
    generation = replace(generation, sampler=sampler, eos_ids=())
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, config.vocab, (load.rows, load.context), generator=generator).tolist()

    def run(blocks: int) -> Iterator[float]:
        wanted = (WARM + TIMED) * config.canvas
        for event in stream(model, Request(prompts, generation, wanted, seed=1), every_step=False):
            assert isinstance(event, Block)
            yield time.perf_counter()
            if event.block == blocks - 1:
                return

    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    warm = list(run(WARM))
    session = model.session
    assert session is not None
    session.clock = []
    ends = list(run(WARM + TIMED))
    torch.cuda.synchronize()
    clock, session.clock = session.clock, None
    block = statistics.median(b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False))
    return _Timed(_paces(clock, load.steps), block, warm[0] - began)


def _paces(clock: list[tuple[str, torch.cuda.Event]], steps: int) -> dict[str, list[float]]:
    """Milliseconds from each pass of the timed blocks to the step after it: "step", "commit"; and from the prompt's."""
    paces: dict[str, list[float]] = {"prompt": [], "step": [], "commit": []}
    whole = [(name, event) for name, event in clock if name != "soft"]
    for (name, start), (following, stop) in pairwise(whole):
        if following == "step":
            paces[name].append(start.elapsed_time(stop))
    return paces | {"step": paces["step"][WARM * (steps - 1) :], "commit": paces["commit"][WARM - 1 :]}


def parts_of_a_step(model: Model) -> dict[str, float]:
    """Milliseconds of the kernels of one step of the last batch by part, and what lies between them ("gaps")."""
    from torch.profiler import ProfilerActivity, profile

    session = model.session
    assert session is not None
    session.step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        session.step()
    kernels = sorted(
        (event for event in seen.profiler.kineto_results.events() if event.device_type().name == "CUDA"),
        key=lambda event: event.start_ns(),
    )
    parts = [next((part for word, part in _PARTS.items() if word in event.name()), None) for event in kernels]
    layers = [i for i, part in enumerate(parts) if part == "norms"]
    sampler = [i for i, part in enumerate(parts) if part == "sampler"]
    attention = parts.index("attention")
    sums: dict[str, float] = {}
    for i, (event, named) in enumerate(zip(kernels, parts, strict=True)):
        if named is None and not any(word in event.name() for word in _PRODUCTS):
            part = "others"
        elif i > sampler[-1]:
            part = "soft embedding"
        elif i > layers[-1]:
            part = named or "head"
        else:
            part = named or ("dense" if i > attention else "self-conditioning")
        sums[part] = sums.get(part, 0.0) + event.duration_ns() / 1e6
    sums["gaps"] = (kernels[-1].end_ns() - kernels[0].start_ns()) / 1e6 - sum(sums.values())
    return sums


# A word of a kernel's name -> the part of the step that it computes.
_PARTS = {
    "expert_product": "experts", "sort_picks": "experts", "map_tiles": "experts", "combine": "experts",
    "attend": "attention", "join": "attention", "place": "attention", "angles": "attention",
    "mixed": "norms", "fed": "norms", "norm": "norms", "route": "router",
    "slices": "sampler", "pick": "sampler", "rewrite": "sampler", "decide": "sampler",
}  # fmt: skip
# Words in the names of matrix products, whose part follows from their place in the step.
_PRODUCTS = ("gemm", "nvjet", "cutlass", "splitK", "linear")


def _loaded(make: Callable[[], Model]) -> tuple[Model, float]:
    began = time.perf_counter()
    model = make()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return model, time.perf_counter() - began
