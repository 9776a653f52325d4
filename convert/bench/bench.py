"""`dgq bench`: how fast a model denoises here, where the time goes, what it needs, and how far that is from the floor.

steps       by events, from one step's beginning to the next's, inside generate(): every step sees another canvas
parts       by the profiler, kernels of one replayed step in their order
tokens/s    from a block's commitment to the next one's, the encoding of the block included
floors      bytes over the rate of a copy, or operations over that of a large product, both measured here
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from dgq.convert.bench.shapes import RandomWeights, plan_of_shapes
from dgq.convert.estimate.needs import Runtime
from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Block, Request, stream
from dgq.runtime.model.loading import decodes
from dgq.runtime.model.model import LoadOptions, Model
from dgq.runtime.shape.names import expected_tensors
from dgq.runtime.shape.settings import GenerationConfig

WARM, TIMED = 2, 4  # blocks
GIB = 1 << 30


@dataclass(frozen=True)
class Load:
    """What is asked of a model: so many tokens of prompt, rows, steps a block; bytes of the GPU that it may use."""

    context: int
    rows: int
    steps: int
    vram: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """Of this GPU, measured: bytes a second of a copy, read and written; operations a second of a bfloat16 product."""

    bandwidth: float
    rate: float
    host: float  # bytes a second from pinned memory

    def seconds(self, nbytes: float, operations: float = 0.0) -> float:
        return max(nbytes / self.bandwidth, operations / self.rate)


def ceilings() -> Ceilings:
    source = torch.randn(1 << 29, device="cuda")
    to = torch.empty_like(source)
    copy = milliseconds(lambda: torch.abs(source, out=to))
    nbytes = 2 * source.nbytes
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    there = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    place = torch.empty_like(there, device="cuda")
    moved = milliseconds(lambda: place.copy_(there, non_blocking=True))
    return Ceilings(nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3, there.nbytes / moved * 1e3)


def milliseconds(call: Callable[[], object], runs: int = 10) -> float:
    """The median of a call."""
    times = []
    for _ in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times[2:]))


def bench_shapes(shapes: str, scheme: str, load: Load, found: Ceilings, zipf: bool = False) -> dict[str, Any]:
    """A model of random weights: see measured()."""
    plan = plan_of_shapes(shapes, scheme)
    weights = RandomWeights(plan, "cuda", zipf)
    model, seconds = _loaded(
        lambda: Model(
            plan.source.config, weights, "cuda", source=f"random {shapes}", options=LoadOptions(vram=load.vram)
        )
    )
    context = load.context + (WARM + TIMED) * plan.source.config.canvas
    runtime = Runtime.of(plan)
    planned = runtime.vram(context, load.rows)["decoded" if decodes(plan.source.config, _memory(load)) else "total"]
    if load.vram is not None:
        away = runtime.offloaded(load.vram)
        away_bytes = 0 if away is None else away["on_gpu"]
        planned += away_bytes - runtime.weights(decodes(plan.source.config, _memory(load)))
    return measured(model, plan.source.generation, load, found) | {"made_s": seconds, "planned": planned}


def _memory(load: Load) -> int:
    """Bytes that the model may take."""
    whole = int(torch.cuda.mem_get_info()[1])
    return whole if load.vram is None else min(whole, load.vram)


def bench_artifact(
    asked: str, load: Load, found: Ceilings, notice: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """An artifact or a BF16 source: see measured()."""
    from dgq.convert.source.models import open_model

    artifact = open_model(asked, notice=notice)
    if load.context + (WARM + TIMED) * artifact.config.canvas > artifact.config.context:
        raise InputError(f"--context {load.context}: {asked} holds {artifact.config.context} tokens, answer included")
    model, seconds = _loaded(lambda: artifact.load("cuda", vram=load.vram))
    return measured(model, artifact.generation, load, found) | {"load_s": seconds}


@torch.inference_mode()
def measured(model: Model, generation: GenerationConfig, load: Load, found: Ceilings) -> dict[str, Any]:
    """Times in milliseconds, bytes; medians. model: on a GPU, in bfloat16."""
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
    paces = _paces(clock, load.steps)
    steps = paces["step"]
    block = statistics.median(b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False))
    context = load.context + (WARM + TIMED // 2) * config.canvas
    floors = floor_of_a_step(model, load.rows, context, found)
    step, floor = statistics.median(steps), sum(floors.values())
    return {
        "step_ms": step,
        "floor_ms": floor,
        "ratio": step / floor,
        "spread_ms": [min(steps), max(steps)],
        "parts_ms": parts_of_a_step(model),
        "floors_ms": floors,
        "commit_ms": statistics.median(paces["commit"]),
        "block_ms": block * 1e3,
        "tokens_per_s": load.rows * config.canvas / block,
        "prompt_ms": paces["prompt"][0],
        "prompt_tokens_per_s": load.rows * load.context / paces["prompt"][0] * 1e3,
        "first_block_s": warm[0] - began,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "weights": 0 if model.kernels is None else model.kernels.nbytes,
        "copied": 0 if model.kernels is None or model.kernels.offload is None else model.kernels.offload.copied,
        **asdict(load),
    }


def _paces(clock: list[tuple[str, torch.cuda.Event]], steps: int) -> dict[str, list[float]]:
    """Milliseconds from each pass to the step after it, of the blocks that are timed; of the prompt's."""
    found: dict[str, list[float]] = {"prompt": [], "step": [], "commit": []}
    whole = [(name, event) for name, event in clock if name != "soft"]
    for (name, start), (following, stop) in pairwise(whole):
        if following == "step":
            found[name].append(start.elapsed_time(stop))
    return found | {"step": found["step"][WARM * (steps - 1) :], "commit": found["commit"][WARM - 1 :]}


def parts_of_a_step(model: Model) -> dict[str, float]:
    """Milliseconds of kernels by part, of one step of the last batch, and what lies between them."""
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
    found: dict[str, float] = {}
    for i, (event, named) in enumerate(zip(kernels, parts, strict=True)):
        if named is None and not any(word in event.name() for word in _PRODUCTS):
            part = "others"
        elif i > sampler[-1]:
            part = "soft embedding"
        elif i > layers[-1]:
            part = named or "head"
        else:
            part = named or ("dense" if i > attention else "self-conditioning")
        found[part] = found.get(part, 0.0) + event.duration_ns() / 1e6
    found["gaps"] = (kernels[-1].end_ns() - kernels[0].start_ns()) / 1e6 - sum(found.values())
    return found


_PARTS = {
    "expert_product": "experts", "sort_picks": "experts", "map_tiles": "experts", "combine": "experts",
    "attend": "attention", "join": "attention", "place": "attention", "angles": "attention",
    "mixed": "norms", "fed": "norms", "norm": "norms", "route": "router",
    "slices": "sampler", "pick": "sampler", "rewrite": "sampler", "decide": "sampler",
}  # fmt: skip
_PRODUCTS = ("gemm", "nvjet", "cutlass", "splitK", "linear")


def floor_of_a_step(model: Model, rows: int, context: int, found: Ceilings) -> dict[str, float]:
    """Milliseconds by part: each weight read once, or the products' operations; experts in host memory apart."""
    config, tokens = model.config, rows * model.config.canvas
    kernels = model.kernels
    assert kernels is not None and kernels.table is not None
    hit = 1 - (1 - config.top_k / config.experts) ** tokens
    picks = tokens * config.top_k * 3 * config.hidden * config.expert_intermediate * len(config.layers)
    table = config.vocab * config.hidden
    experts = sum(tiles.nbytes for layer in range(len(config.layers)) for tiles in model.routed(layer) or ())
    dense = sum(math.prod(shape) for name, shape in expected_tensors(config).items() if ".experts." not in name) - table
    keys = operations = 0
    for layer in config.layers:
        seen = min(context, config.window - 1) if layer.is_sliding else context
        keys += 4 * rows * seen * layer.kv_heads * layer.head_dim
        operations += 4 * tokens * (seen + config.canvas) * config.heads * layer.head_dim
    seconds = {
        "experts": found.seconds(hit * experts, 2 * picks),
        "dense": found.seconds(sum(product.nbytes for product in kernels.products.values()), 2 * tokens * dense),
        "attention": found.seconds(keys, operations),
        "head": found.seconds(model.table.nbytes, 2 * tokens * table),
        "soft embedding": found.seconds(model.table.nbytes, 2 * tokens * table),
        "sampler": found.seconds(4 * tokens * config.vocab),
    }
    if kernels.offload is not None:
        seconds["copies"] = max(0.0, kernels.offload.copied / found.host - sum(seconds.values()))
    return {part: 1e3 * value for part, value in seconds.items()}


def _loaded(make: Callable[[], Model]) -> tuple[Model, float]:
    began = time.perf_counter()
    model = make()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return model, time.perf_counter() - began
