"""Calibrating and quantising with Hessians at the real widths: seconds and memory a layer, projected to the 26B.

    python tests/benchmarks/bench_calibrate.py [--layers 2] [--device cuda] [--folder DIR] [--rounds 1] [--recipes R …]
        [--vram 24GiB] [--ram 16GiB]

Makes a random checkpoint of a few layers (bench_convert.py), runs `dgq calibrate` on it with the prompts that
ship for `tiny` (their tokenizer, the real canvas of 256), and then the refined conversion of each recipe, weights
dropped instead of written. Also effort fast for the recipes that have it. Projection: the last layer's passes times 30
(it is a full one, and the first has what comes once); way back and quantising of the first layer, a sliding one, times
25, and of the last times 5; and what comes once. Not in it: the artifact's bytes written and hashed, and a disk slower
than DIR, where hidden states of all layers lie. Beside each peak of memory what layerwise/estimate.py counts at each
moment, with as many Hessians as the budget has room for. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_convert import peak_rss, write_checkpoint

from dgq.convert.calibration.calibrate import CalibrateOptions, calibrate
from dgq.convert.calibration.stats import read_stats
from dgq.convert.cli.terminal.sizes import Size
from dgq.convert.layerwise.budget import Budget
from dgq.convert.layerwise.estimate import Needs, Sizes
from dgq.convert.layerwise.samples import used
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.convert.write.refine import refinable, refined
from dgq.convert.write.settings import ConversionSettings
from dgq.convert.write.slices import slices

LAYERS, FULL = 30, 5
FORMATS = {"nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "q4_k_m": "gguf"}


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> dict[str, float]:
    """GiB so far."""
    found = {"rss": peak_rss()}
    if device == "cuda":
        found |= {"gpu_allocated": torch.cuda.max_memory_allocated() / 2**30,
                  "gpu_reserved": torch.cuda.max_memory_reserved() / 2**30}  # fmt: skip
    return {what: round(n, 2) for what, n in found.items()}


def counted(needs: Needs, room: int) -> dict[str, float]:
    """GiB of each moment, with `room` for Hessians if there are as many."""
    sums = {}
    for moment, parts in needs.moments().items():
        more = min(room, needs.hessians) - parts["Hessians"] if "Hessians" in parts else 0
        sums[moment] = round((sum(parts.values()) + more) / 2**30, 2)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=list(FORMATS))
    parser.add_argument("--vram", type=lambda text: Size().convert(text, None, None))
    parser.add_argument("--ram", type=lambda text: Size().convert(text, None, None))
    options = parser.parse_args()
    budget = Budget(options.ram, options.vram)
    budget.enforce()
    report: dict[str, Any] = {"layers": options.layers, "device": options.device}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "source"
        write_checkpoint(path, options.layers)
        source = open_source(str(path))
        marks: list[float] = []
        began = clock(options.device)
        asked = CalibrateOptions(rounds=options.rounds, device=options.device, ram=options.ram, vram=options.vram)
        about = calibrate(
            str(path), Path(folder) / "stats", asked, lambda done, total: marks.append(clock(options.device)), print
        )
        assert about is not None
        took = [round(b - a, 2) for a, b in zip([began, *marks], marks, strict=False)]
        layer = sum(took[options.layers - 1 :: options.layers])  # the last layer's: the first compiles kernels
        report["calibrate"] = {
            "tokens": about["tokens"], "rounds": about["rounds"], "seconds": round(clock(options.device) - began, 1),
            "steps": took, "layer_s": round(layer, 2), "projected_26b_s": round(LAYERS * layer),
            "peak_gib": peak(options.device),
            "counted_gib": counted(Needs(source, options.device, Sizes.most(source.config)), 0),
            "least": min(min(n) for n in about["coverage"].values()),
        }  # fmt: skip
        print(report["calibrate"], flush=True)
        stats = read_stats(Path(folder) / "stats", source)
        for recipe in options.recipes:
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            plan = make_plan(source, find_recipe(FORMATS[recipe], recipe))
            todo = [tensor for tensor in plan.tensors if refinable(tensor)]
            steps: list[tuple[str, float]] = []
            how = ConversionSettings("standard", None, 1, options.device, stats, budget=budget)
            needs = Needs(source, options.device, Sizes.of(used(stats.chunks)), todo)
            room = budget.room(needs, options.device, "refining")
            began = clock(options.device)
            spent: dict[str, float] = {}
            last = began

            def mark(what: str, steps: list[tuple[str, float]] = steps) -> None:
                steps.append((what, clock(options.device)))

            for job, _ in refined(plan, todo, how, Path(folder), None, mark):
                now = clock(options.device)
                spent[job.tensor.name] = spent.get(job.tensor.name, 0) + now - max(last, steps[-1][1])
                last = now
            ends = [*(at for _, at in steps[1:]), clock(options.device)]
            stages = [(what, round(end - at, 2)) for (what, at), end in zip(steps, ends, strict=True)]
            count = options.layers
            passes = stages[count - 1][1] + stages[2 * count][1]  # the last layer's: the first has what comes once
            sliding, full = (
                sum(s for what, s in stages if re.match(f"samples, back to {number}($|,)", what))
                for number in (0, count - 1)
            )
            layers = LAYERS * passes + (LAYERS - FULL) * sliding + FULL * full
            once = sum(s for what, s in stages if what in ("samples, back to enter", "samples, back to leave"))
            once += max(0.0, sum(s for what, s in stages if what.endswith("pass")) - count * passes)
            row: dict[str, Any] = {
                "stages": stages, "passes_layer_s": round(passes, 2), "sliding_s": sliding, "full_s": full,
                "once_s": round(once, 2),
                "peak_gib": peak(options.device), "counted_gib": counted(needs, room),
                "projected_26b_s": round(layers + once),
                "slowest": sorted(((round(s, 2), n) for n, s in spent.items()), reverse=True)[:4],
            }  # fmt: skip
            if any(tensor.scheme.searched for tensor in todo):
                began = clock(options.device)
                count = 0
                for tensor in [t for t in todo if f"layers.{options.layers - 1}." in t.name]:
                    for piece in slices(plan, tensor, ConversionSettings("fast", None, 1, options.device), None):
                        count += piece.run().numel
                seconds = clock(options.device) - began
                row["fast"] = {"layer_s": round(seconds, 2), "projected_26b_s": round(LAYERS * seconds)}
            report[recipe] = row
            print(recipe, row, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
