"""How fast ggml's blocks are encoded: its C on one thread, and the torch encoder on a device.

    python tests/bench_encode.py [--device cpu|cuda] [--rows 4096] [--runs 5] [--c-rows 256] [--importance]

Weights are normal bf16 values, [rows, 2816], the 26B's hidden size. C sees the first --c-rows of them, and
those bytes must be the torch encoder's. Prints million weights a second, the median of the runs, and ends in
one JSON line. Needs torch, numpy, libggml-python and dgq.quant, nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from dgq.quant.ggml import Q4_K, Q5_0, Q6_K, Q8_0
from dgq.quant.ggml_encode import encode

COLUMNS = 2816  # 11 * 256
T = TypeVar("T")


def seconds(work: Callable[[], T], runs: int, device: str) -> tuple[float, T]:
    """The median time of `runs` runs after one that warms up, and what the last one gave."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--c-rows", type=int, default=256)
    parser.add_argument("--importance", action="store_true", help="weigh the columns")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(options.rows, COLUMNS, generator=generator) * 0.02).bfloat16().float()
    importance = torch.rand(COLUMNS, generator=generator) ** 4 + 1e-4 if options.importance else None
    there = weight.to(options.device)
    there_importance = None if importance is None else importance.to(options.device)
    few = weight[: options.c_rows]
    figures = {}
    for scheme in (Q4_K, Q5_0, Q6_K, Q8_0):
        c_time, right = seconds(partial(scheme.quantize, few, importance), options.runs, "cpu")
        torch_time, ours = seconds(partial(encode, scheme.name, there, there_importance), options.runs, options.device)
        equal = torch.equal(ours[: len(few)].cpu(), right[""])
        rates = few.numel() / c_time / 1e6, weight.numel() / torch_time / 1e6
        print(
            f"{scheme.name}  C {rates[0]:8.1f}  torch on {options.device} {rates[1]:8.1f}  M weights/s  equal: {equal}"
        )
        figures[scheme.name] = {"c": round(rates[0], 1), "torch": round(rates[1], 1), "equal": equal}
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    run = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **vars(options)}
    print(json.dumps({**run, "columns": COLUMNS, "million_weights_a_second": figures}))


if __name__ == "__main__":
    main()
