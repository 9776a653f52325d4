"""A model of the real widths and few layers: every format converted on the CPU and on the GPU, then run.

    python tests/bench_convert.py [--layers 4] [--device cuda|cpu] [--folder DIR] [--threads N] [--recipes R …]

Makes a random checkpoint (hidden 2816, 128 experts of 704, vocabulary 262,144; tiny's tokenizer), converts it to each
recipe in a process of its own on the CPU and on --device, compares every file of the two, and writes one canvas with
the second. Prints, and ends in one JSON line: seconds, parameters a second, peak resident memory (mapped pages of the
source count), peak GPU memory; for running, milliseconds a step and peak GPU memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
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

HERE = Path(__file__).parent
FORMATS = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4", "q4_k_m": "gguf"}


def write_checkpoint(path: Path, layers: int, device: str) -> None:
    """Random weights, damped so that activations stay finite and attention soft; one full layer, the last."""
    from safetensors.torch import save_file

    from dgq.runtime.config import ModelConfig
    from dgq.runtime.names import expected_tensors

    config = json.loads((HERE / "golden" / "real26b" / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": layers, "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
    }  # fmt: skip
    del config["vision_config"]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(HERE / "golden" / "real26b" / "generation_config.json", path / "generation_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (path / name).write_bytes(files("dgq.recipes").joinpath("tiny", name).read_bytes())
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in expected_tensors(ModelConfig.from_json(config, "config.json")).items():
        parts = name.split(".")
        file = f"model-{parts[parts.index('layers') + 1] if 'layers' in parts else 'rest'}.safetensors"
        if len(shape) == 1:
            value = 0.3 if "post_" in name or "q_norm" in name or "k_norm" in name else 1.0
            tensor = torch.full(shape, value, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            for piece in tensor:  # a row or an expert at a time: no large temporary
                piece.copy_(torch.randn(piece.shape, generator=generator, device=device) * 0.02)
        shards.setdefault(file, {})[name] = tensor.cpu()
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def convert_here(source: str, recipe: str, out: str, device: str, threads: str) -> None:
    """The child: one conversion, its cost as JSON on the last line."""
    from click.testing import CliRunner

    from dgq.convert.cli import main

    arguments = ["convert", source, "--to", FORMATS[recipe], "--recipe", recipe, "-o", out]
    arguments += ["--device", device, "--threads", threads, "--json"]
    arguments += ["--input-scale", "0.02"] if recipe == "nvfp4" else []
    began = time.perf_counter()
    result = CliRunner().invoke(main, arguments)
    seconds = time.perf_counter() - began
    if result.exit_code:
        raise SystemExit(result.output)
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(json.dumps({
        "seconds": round(seconds, 2), "params": json.loads(result.stdout)["params"],
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gpu_gib": round(gpu / 2**30, 2),
    }))  # fmt: skip


def run_here(artifact: str, device: str) -> None:
    """The child: load, one canvas of six steps, milliseconds of the median step."""
    from dgq.runtime.artifact import open_artifact
    from dgq.runtime.engine import generate

    opened = open_artifact(artifact)
    began = time.perf_counter()
    model = opened.load(device)
    loaded = time.perf_counter() - began
    marks: list[float] = []
    prompt = [opened.tokenizer.encode("In the beginning was the word") * 20]
    endless = replace(opened.generation, sampler=replace(opened.generation.sampler, confidence=0.0))
    result = generate(
        model, prompt, endless, opened.config.canvas, seed=1, steps=6,
        on_step=lambda step: marks.append(time.perf_counter()),
    )  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", default=str(os.cpu_count() or 1))
    parser.add_argument("--folder", default=None)
    parser.add_argument("--recipes", nargs="*", default=list(FORMATS))
    options = parser.parse_args()
    report: dict[str, Any] = {"layers": options.layers, "threads": int(options.threads), "recipes": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        began = time.perf_counter()
        write_checkpoint(source, options.layers, options.device)
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"checkpoint: {size / 1e9:.2f} GB, made in {time.perf_counter() - began:.0f} s", flush=True)
        for recipe in options.recipes:
            row: dict[str, Any] = {}
            made = {}
            for device in dict.fromkeys(("cpu", options.device)):
                out = Path(folder) / f"{recipe}-{device}"
                row[device] = child("convert", str(source), recipe, str(out), device, options.threads)
                made[device] = digests(out)
                print(f"{recipe:12} {device:5} {row[device]}", flush=True)
            row["bytes"] = sum(file.stat().st_size for file in out.iterdir())
            row["same_bytes"] = len({json.dumps(found) for found in made.values()}) == 1
            row["run"] = child("run", str(out), options.device)
            print(
                f"{recipe:12} {row['bytes'] / 1e9:.2f} GB  same bytes: {row['same_bytes']}  run {row['run']}",
                flush=True,
            )
            report["recipes"][recipe] = row
            for device in made:
                shutil.rmtree(Path(folder) / f"{recipe}-{device}")
    print(json.dumps(report))


if __name__ == "__main__":
    commands = {"convert": convert_here, "run": run_here}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        main()
