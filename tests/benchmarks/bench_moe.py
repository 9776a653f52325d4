"""How fast one layer of the 26B's routed experts is in each scheme: 128 experts, top 8, hidden 2816, inner 704.

    python tests/benchmarks/bench_moe.py [--tokens 256] [--schemes nvfp4 …] [--runs 20]

Random weights, repacked as at loading; routing uniform, or Zipf (expert i is drawn with weight 1 / i). A CUDA graph
holds 8 calls on 8 inputs, each with its own routing; figures are medians over its replays, a call. "floor" is the time
in which a device-to-device copy moves (reads or writes) as many bytes as the hit experts' weights have. Beside it the
same with torch._grouped_mm and BF16 weights. Needs a GPU. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu

from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.kernels import moe
from dgq.runtime.kernels.repack import Tiles, tile

EXPERTS, K, HIDDEN, INNER = 128, 8, 2816, 704
CALLS = 8
SCHEMES_OF = {
    "bf16": ("bf16", "bf16"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nf4": ("nf4", "nf4"),
    "q4_k+q5_0": ("q4_k", "q5_0"),
    "q4_k+q8_0": ("q4_k", "q8_0"),
    "q8_0": ("q8_0", "q8_0"),
    "q6_k+q8_0": ("q6_k", "q8_0"),
}
Inputs = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def weight(scheme: str, *shape: int) -> Packed:
    return Packed(SCHEMES[scheme], shape, SCHEMES[scheme].quantize(torch.randn(shape, device="cuda").bfloat16() * 0.02))


def inputs(tokens: int, zipf: bool) -> Inputs:
    made = []
    for _ in range(CALLS):
        likely = 1 / torch.arange(1, EXPERTS + 1, device="cuda") ** (1.0 if zipf else 0.0)
        likely = likely[torch.randperm(EXPERTS, device="cuda")].expand(tokens, -1)
        share = torch.rand(tokens, K, device="cuda")
        made.append((torch.randn(tokens, HIDDEN, device="cuda").bfloat16(), likely.multinomial(K), share))
    return made


def milliseconds(calls: list[Callable[[], object]], runs: int) -> float:
    """The median of a call, of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    del kept
    return statistics.median(times[2:])


def copy_bandwidth(runs: int) -> float:
    """Bytes read and written a second, by a kernel."""
    source = torch.randn(1 << 29, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([partial(torch.abs, source, out=to)], runs) * 1e3


def grouped_mm(
    x: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    order = chosen.flatten().argsort()
    ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).int()
    gate, up = torch._grouped_mm(x[order // K], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(gelu(gate, approximate="tanh") * up, down.transpose(1, 2), offs=ends)
    parts = torch.empty_like(out)
    parts[order] = out * share.flatten()[order, None].to(out.dtype)
    return parts.view(len(x), K, -1).sum(1)


def nbytes_hit(tiles: tuple[Tiles, Tiles], made: Inputs) -> float:
    hit = statistics.mean(len(chosen.unique()) for _, chosen, _ in made)
    return sum(weight.nbytes for weight in tiles) * hit / EXPERTS


def parts_of(made: Inputs, up: Tiles, down: Tiles, runs: int) -> dict[str, float]:
    """Milliseconds of sorting, the first product, the second with the sum over k."""
    sort = [partial(moe.sort, chosen, EXPERTS) for _, chosen, _ in made]
    picks = [call() for call in sort]
    first = [partial(moe.first_product, x, p, up) for (x, _, _), p in zip(made, picks, strict=True)]
    second = [
        partial(moe.second_product, call(), p, share, down)
        for call, p, (_, _, share) in zip(first, picks, made, strict=True)
    ]
    named = {"sort": sort, "first": first, "second": second}
    return {name: milliseconds(calls, runs) for name, calls in named.items()}


def measure(name: str, routings: dict[str, Inputs], bandwidth: float, runs: int) -> dict[str, dict[str, float]]:
    up = tile(weight(SCHEMES_OF[name][0], EXPERTS, 2 * INNER, HIDDEN), gated=True)
    down = tile(weight(SCHEMES_OF[name][1], EXPERTS, HIDDEN, INNER), gated=False)
    figures = {}
    for kind, made in routings.items():
        nbytes = nbytes_hit((up, down), made)
        ms, floor = milliseconds([partial(moe.experts, *m, up, down) for m in made], runs), nbytes / bandwidth * 1e3
        parts = parts_of(made, up, down, runs)
        figures[f"{name} {kind}"] = {"ms": ms, "floor": floor, "ratio": ms / floor, "TB/s": nbytes / ms / 1e9, **parts}
        shown = ", ".join(f"{value:.3f}" for value in parts.values())
        print(f"{name:12}{kind:>9}{ms:8.3f}{floor:8.3f}{ms / floor:7.2f}{nbytes / ms / 1e9:7.2f}   {shown}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES_OF), choices=SCHEMES_OF)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    device, bandwidth = torch.cuda.get_device_name(), copy_bandwidth(options.runs)
    routings = {kind: inputs(options.tokens, kind == "zipf") for kind in ("uniform", "zipf")}
    print(f"{device}, torch {torch.__version__}, copies {bandwidth / 1e12:.2f} TB/s, {options.tokens} tokens")
    print(f"{'':12}{'routing':>9}{'ms':>8}{'floor':>8}{'ratio':>7}{'TB/s':>7}   sort, first, second with sum over k")
    figures: dict[str, dict[str, float]] = {}
    for name in options.schemes:
        figures |= measure(name, routings, bandwidth, options.runs)
    up, down = (
        torch.randn(EXPERTS, *shape, device="cuda").bfloat16() for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    for kind, made in routings.items():
        ms = milliseconds([partial(grouped_mm, *m, up, down) for m in made], options.runs)
        figures[f"torch._grouped_mm bf16 {kind}"] = {"ms": ms}
        print(f"{'_grouped_mm':12}{kind:>9}{ms:8.3f}")
    print(json.dumps({"device": device, "tokens": options.tokens, "bandwidth": bandwidth, **figures}))


if __name__ == "__main__":
    main()
