"""What bytes and operations allow: the measured ceilings of this GPU, and the least time of a denoising step by them.

bytes of a part / rate of a copy, or operations / rate of a large product, whichever is longer  ->  a part's floor
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import expected_tensors


@dataclass(frozen=True)
class Ceilings:
    """What this GPU can do, measured. bandwidth: bytes a second of a copy, those read and those written; rate:
    operations a second of a bfloat16 product; host: bytes a second from pinned host memory."""

    bandwidth: float
    rate: float
    host: float

    def seconds(self, nbytes: float, operations: float = 0.0) -> float:
        """The least time for so many bytes and operations."""
        return max(nbytes / self.bandwidth, operations / self.rate)


def measure_ceilings() -> Ceilings:
    """Measure a copy of 2 GiB, a product of 8192 × 8192 matrices in bfloat16, and a copy of 256 MiB from pinned
    memory."""
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
    """The median of a call's milliseconds on the GPU, after two calls that do not count."""
    times = []
    for _ in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times[2:]))


def floor_of_a_step(model: Model, rows: int, context: int, ceilings: Ceilings) -> dict[str, float]:
    """The least milliseconds of a step by part: each weight is read once, or the products' operations are done. Copies
    of experts from host memory are a part of their own, as far as they take longer than all else. rows: of the batch;
    context: tokens before the canvas."""
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
        "experts": ceilings.seconds(hit * experts, 2 * picks),
        "dense": ceilings.seconds(sum(product.nbytes for product in kernels.products.values()), 2 * tokens * dense),
        "attention": ceilings.seconds(keys, operations),
        "head": ceilings.seconds(model.table.nbytes, 2 * tokens * table),
        "soft embedding": ceilings.seconds(model.table.nbytes, 2 * tokens * table),
        "sampler": ceilings.seconds(4 * tokens * config.vocab),
    }
    if kernels.offload is not None:
        seconds["copies"] = max(0.0, kernels.offload.copied / ceilings.host - sum(seconds.values()))
    return {part: 1e3 * value for part, value in seconds.items()}
