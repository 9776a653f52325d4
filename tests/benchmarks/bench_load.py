"""From files in memory to the first step, and what loading takes of the GPU: BF16 and each format at the real shapes.

    python tests/benchmarks/bench_load.py [--layers 30] [--folder /dev/shm] [--recipes bf16 nvfp4-w4a16 bnb4 q4_k_m]
        [--groups 24 25]       elements repacked at a time, as powers of two, instead of repack.GROUP_ELEMENTS

Makes a random checkpoint (bench_convert.py), converts it on the GPU, and opens each in processes of their own:
the first with an empty cache of kernels, as on a machine where dgq never ran; then again. Times are from a process's
start: its imports, the files opened, the weights loaded, the first of a block's steps done with a prompt of 1,024
tokens. GiB that torch allocated and held at most while loading, and until the block was done, beside what `dgq plan`
counts for that. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_convert import child, write_checkpoint

CONTEXT, STEPS = 1024, 16
FORMATS = {"nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "q4_k_m": "gguf"}


def load_here(path: str, group: str, began: str) -> None:
    """The child: one artifact, as `dgq run` opens it."""
    import dgq.convert.cli.__main__  # which says how CUDA's memory is to grow

    assert dgq.convert.cli.__main__

    import torch

    from dgq.convert.source.models import open_model
    from dgq.runtime.engine.engine import Request, generate
    from dgq.runtime.kernels import repack

    if group != "0":
        repack.GROUP_ELEMENTS = 1 << int(group)
    torch.cuda.init()
    marks = [("imports", time.time())]
    artifact = open_model(path)
    marks.append(("opened", time.time()))
    model = artifact.load("cuda")
    torch.cuda.synchronize()
    marks.append(("loaded", time.time()))
    loading = peaks()
    first: list[float] = []
    prompt = (artifact.tokenizer.encode("In the beginning was the word. ") * CONTEXT)[:CONTEXT]
    sampler = replace(artifact.generation.sampler, steps=STEPS, confidence=0.0)
    request = Request([prompt], replace(artifact.generation, sampler=sampler), artifact.config.canvas, seed=1)
    generate(model, request, on_step=lambda step: first.append(time.time()))
    marks.append(("first step", first[0]))
    seconds = {what: round(at - float(began), 2) for what, at in marks}
    print(json.dumps({"seconds": seconds, "loading_gib": loading, "block_gib": peaks()}))


def peaks() -> dict[str, float]:
    import torch

    found = {"allocated": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    return {what: round(n / 2**30, 2) for what, n in found.items()}


def loaded(path: Path, group: int, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "load", str(path), str(group), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(cache)})
    if done.returncode:
        raise SystemExit(f"{path}: {done.stdout[-500:]}{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def planned(source: Path, recipe: str) -> float:
    """GiB, of torch's: CUDA's own are not among a process's peaks."""
    import torch

    from dgq.convert.bench.shapes import plain_plan
    from dgq.convert.estimate.needs import Runtime
    from dgq.convert.plans.plan import make_plan
    from dgq.convert.plans.recipes import find_recipe
    from dgq.convert.source.checkpoint import open_source
    from dgq.runtime.model.loading import decodes

    opened = open_source(str(source))
    plan = plain_plan(opened) if recipe == "bf16" else make_plan(opened, find_recipe(FORMATS[recipe], recipe))
    found = Runtime.of(plan).vram(CONTEXT + opened.config.canvas)
    decoded = decodes(opened.config, torch.cuda.mem_get_info()[1])
    return round(int(found["decoded" if decoded else "total"]) / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--recipes", nargs="+", default=["bf16", *FORMATS])
    parser.add_argument("--groups", type=int, nargs="*", default=[])
    options = parser.parse_args()
    report: dict[str, Any] = {"layers": options.layers, "recipes": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        began = time.perf_counter()
        write_checkpoint(source, options.layers)
        print(f"checkpoint made in {time.perf_counter() - began:.0f} s", flush=True)
        for recipe in options.recipes:
            path = source if recipe == "bf16" else Path(folder) / recipe
            if recipe != "bf16":
                made = child("convert", str(source), recipe, str(path), "cuda", str(os.cpu_count()))
                print(f"{recipe} made in {made['seconds']} s", flush=True)
            size = sum(file.stat().st_size for file in path.iterdir())
            row: dict[str, Any] = {"bytes": size, "plan_gib": planned(source, recipe)}
            cache = Path(folder) / f"kernels-{recipe}"
            row["first_ever"] = loaded(path, 0, cache)
            row["again"] = [loaded(path, 0, cache) for _ in range(2)]
            row |= {f"groups of 2^{group}": loaded(path, group, cache) for group in options.groups}
            for what, found in row.items():
                print(f"{recipe:12} {what:16} {found}", flush=True)
            report["recipes"][recipe] = row
            if recipe != "bf16":
                shutil.rmtree(path)
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load_here(*sys.argv[2:])
    else:
        main()
