"""A model of the real widths, of few layers or whole: every format converted on the CPU and on the GPU, then run.

    python tests/benchmarks/bench_convert.py [--layers 4] [--devices cpu cuda] [--folder DIR] [--threads N]
        [--recipes R …]
    python tests/benchmarks/bench_convert.py --layers 30 --devices cuda --folder /dev/shm --no-run
        the whole 26B: 52 GB
    python tests/benchmarks/bench_convert.py --rss [--recipes R …]
        peak resident memory on the CPU, 3 GB and 12.6 GB

Makes a random checkpoint (hidden 2816, 128 experts of 704, vocabulary 262,144, with its vision part; tiny's
tokenizer), converts it to each recipe in a process of its own on each device, compares every file of the two, and
writes one canvas with the last. Prints, and ends in one JSON line: seconds by stage, gigabytes of the source a second,
peak resident memory, peak GPU memory; for running, milliseconds a step and peak GPU memory.

--rss takes one layer and the embedding, then seven layers and the embedding, and holds the peaks against each other
and against what torch alone takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent.parent
RECIPES: dict[str, list[str]] = {
    "nvfp4": ["--to", "nvfp4", "--input-scale", "0.02"],
    "nvfp4-calibrated": ["--to", "nvfp4"],
    "nvfp4-w4a16": ["--to", "nvfp4", "--recipe", "nvfp4-w4a16"],
    "bnb4": ["--to", "bnb4"],
    "bnb4-dq": ["--to", "bnb4", "--recipe", "bnb4-dq"],
    "q4_k_m": ["--to", "gguf"],
}


def write_checkpoint(path: Path, layers: int, vision: bool = True) -> None:
    """Random weights, damped so that activations stay finite and attention soft; shards of up to three layers.

    The first layers of the real model; the last of them is made a full one if none is.
    """
    from dgq.runtime.shape.config import ModelConfig
    from dgq.runtime.shape.names import expected_tensors
    from dgq.runtime.shape.vision import expected_vision

    config = json.loads((HERE / "golden" / "real26b" / "config.json").read_text())
    kinds = [*config["text_config"]["layer_types"][: layers - 1], "full_attention"]
    config["text_config"] |= {"num_hidden_layers": layers, "layer_types": kinds}
    if not vision:
        del config["vision_config"]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(HERE / "golden" / "real26b" / "generation_config.json", path / "generation_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (path / name).write_bytes(files("dgq.recipes").joinpath("tiny", name).read_bytes())
    shapes = expected_tensors(ModelConfig.from_json(config, "config.json"))
    shapes |= expected_vision(config, config["text_config"]["hidden_size"], "config.json")
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = name.split("model.decoder.layers.")[-1].split(".")[0]
        number = 1 + int(layer) // 3 if layer.isdigit() else 0
        shards.setdefault(f"model-{number:05d}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        write_shard(path / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from dgq.quant.files.hf_writer import HFWriter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = path.with_suffix(".part")
    folder.mkdir()
    writer = HFWriter(folder, [{name: ("BF16", shape) for name, shape in shapes.items()}])
    for name, shape in shapes.items():
        if len(shape) < 2:
            value = 0.3 if "post_" in name or "q_norm" in name or "k_norm" in name else 1.0
            writer.places.append(name, torch.full(shape, value, dtype=torch.bfloat16))
            continue
        step = max(1, (1 << 27) * shape[0] // math.prod(shape))
        for start in range(0, shape[0], step):
            rows = (min(step, shape[0] - start), *shape[1:])
            writer.places.append(name, torch.empty(rows, dtype=torch.bfloat16, device=device).normal_(std=0.02))
    writer.close()
    (folder / "model.safetensors").rename(path)
    folder.rmdir()


def peak_rss() -> float:
    """Of this process, in GiB. (ru_maxrss begins with what the parent had when it forked.)"""
    said = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(said["VmHWM"].split()[0]) / 2**20, 3)


def torch_here() -> None:
    """The child: torch and next to nothing."""
    torch.ones(8, dtype=torch.bfloat16).sum()
    print(json.dumps({"peak_rss_gib": peak_rss()}))


def convert_here(source: str, recipe: str, out: str, device: str, threads: str) -> None:
    """The child: one conversion, its cost as JSON on the last line."""
    from click.testing import CliRunner

    from dgq.convert.cli.__main__ import main

    arguments = ["convert", source, *RECIPES[recipe], "--effort", "stock", "-o", out]
    arguments += ["--device", device, "--threads", threads, "--json"]
    began = time.perf_counter()
    result = CliRunner().invoke(main, arguments)
    seconds = time.perf_counter() - began
    if result.exit_code:
        raise SystemExit(result.output)
    gpu = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    print(json.dumps({
        "seconds": round(seconds, 2), "stages": json.loads(result.stdout)["seconds"],
        "gb_per_s": round(size / 1e9 / seconds, 2),
        "peak_rss_gib": peak_rss(),
        "peak_gpu_gib": round(gpu / 2**30, 2),
    }))  # fmt: skip


def run_here(artifact: str, device: str) -> None:
    """The child: load, one canvas of six steps, milliseconds of the median step."""
    from dgq.runtime.engine.engine import Request, generate
    from dgq.runtime.files.artifact import open_artifact

    opened = open_artifact(artifact)
    began = time.perf_counter()
    model = opened.load(device)
    loaded = time.perf_counter() - began
    marks: list[float] = []
    prompt = [opened.tokenizer.encode("In the beginning was the word") * 20]
    endless = replace(opened.generation, sampler=replace(opened.generation.sampler, confidence=0.0))
    request = Request(prompt, endless, opened.config.canvas, seed=1, steps=6)
    result = generate(model, request, on_step=lambda step: marks.append(time.perf_counter()))
    steps = [1000 * (b - a) for a, b in pairwise(marks)]
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({
        "load_s": round(loaded, 2), "ms_a_step": round(statistics.median(steps), 1), "steps": len(marks),
        "peak_gpu_gib": round(gpu / 2**30, 2), "tokens": len(result.tokens[0]),
    }))  # fmt: skip


def child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-500:]}{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def digests(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.iterdir()):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def compare_peaks(options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory by recipe, on one layer and the embedding, and on four times their bytes."""
    alone = child("torch")["peak_rss_gib"]
    sizes: list[float] = []
    peaks: dict[str, list[float]] = {recipe: [] for recipe in options.recipes}
    for layers in (1, 7):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source, out = Path(folder) / "source", Path(folder) / "out"
            write_checkpoint(source, layers, vision=False)
            sizes.append(round(sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9, 2))
            for recipe in options.recipes:
                row = child("convert", str(source), recipe, str(out), "cpu", options.threads)
                peaks[recipe].append(row["peak_rss_gib"])
                print(f"{layers} layers, {sizes[-1]} GB  {recipe:12} {row}", flush=True)
                shutil.rmtree(out)
    rows = {
        recipe: {"gib": [small, large], "ratio": round(large / small, 3), "beyond_torch": round(large - alone, 3)}
        for recipe, (small, large) in peaks.items()
    }
    held = all(0.9 <= row["ratio"] <= 1.1 and row["beyond_torch"] <= 2 for row in rows.values())
    return {"source_gb": sizes, "torch_gib": alone, "threads": int(options.threads), "recipes": rows, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--devices", nargs="*", default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--rss", action="store_true")
    parser.add_argument("--threads", default=str(os.cpu_count() or 1))
    parser.add_argument("--folder", default=None)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    if options.rss:
        print(json.dumps(compare_peaks(options)))
        return
    report: dict[str, Any] = {"layers": options.layers, "threads": int(options.threads), "recipes": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        began = time.perf_counter()
        write_checkpoint(source, options.layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"checkpoint: {size / 1e9:.2f} GB, made in {time.perf_counter() - began:.0f} s", flush=True)
        for recipe in options.recipes:
            row: dict[str, Any] = {}
            made = {}
            for device in options.devices:
                out = Path(folder) / f"{recipe}-{device}"
                row[device] = child("convert", str(source), recipe, str(out), device, options.threads)
                made[device] = digests(out) if len(options.devices) > 1 else {}
                print(f"{recipe:12} {device:5} {row[device]}", flush=True)
            row["bytes"] = sum(file.stat().st_size for file in out.iterdir())
            row["same_bytes"] = len({json.dumps(found) for found in made.values()}) == 1
            row["run"] = None if options.no_run else child("run", str(out), device)
            print(
                f"{recipe:12} {row['bytes'] / 1e9:.2f} GB  same bytes: {row['same_bytes']}  run {row['run']}",
                flush=True,
            )
            report["recipes"][recipe] = row
            for device in made:
                shutil.rmtree(Path(folder) / f"{recipe}-{device}")
    print(json.dumps(report))


if __name__ == "__main__":
    commands = {"convert": convert_here, "run": run_here, "torch": torch_here}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        main()
