"""`dgq validate` from end to end at the real model's shapes, on a GPU: time and peak memory. Nothing is downloaded.

    python tests/benchmarks/bench_validate.py [--layers 30] [--full] [--scheme nvfp4|nf4|q4_k] [--device cuda]
        [--shapes 26b|tiny] [--out DIR]

Weights are random (a name's are the same at every reading: they are made anew on the device from a seed), so the 52 GB
of BF16 and the artifact take no disk. The artifact's experts are in --scheme, all else is BF16, as in an NVFP4 file.
Norms of q, k and of the sublayers' outputs are damped, or random weights make a chaotic model. Figures of quality mean
nothing here; what is looked at is that everything runs, in bounded memory, and what it costs. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from dgq.convert.cli.__main__ import main as dgq
from dgq.convert.resume.work import Work
from dgq.convert.source.models import open_model
from dgq.convert.validation import inputs
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.weights import Stored, Weights
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import expected_tensors
from dgq.runtime.shape.settings import GenerationConfig

REAL = Path(__file__).parent.parent / "golden" / "real26b"
GIB = 1 << 30


class Random(Weights):
    """Random weights by name; the experts' in `scheme`."""

    def __init__(self, config: ModelConfig, scheme: str, device: str) -> None:
        self._shapes, self._scheme, self._device = expected_tensors(config), scheme, device

    def _scheme_of(self, name: str) -> str:
        return self._scheme if ".experts." in name else "bf16"

    def __getitem__(self, name: str) -> Packed:
        shape = self._shapes[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
        generator = torch.Generator(self._device).manual_seed(seed)
        if len(shape) == 1:
            damped = 0.35 if "q_norm" in name or "k_norm" in name else 0.3 if "post_" in name else 1.0
            return Packed(SCHEMES["bf16"], shape, {"": torch.full(shape, damped, dtype=torch.bfloat16)})
        made, step = [], shape[0] if len(shape) < 3 else 8
        for start in range(0, shape[0], step):
            part = (min(step, shape[0] - start), *shape[1:])
            weight = torch.randn(part, generator=generator, device=self._device, dtype=torch.float32)
            weight = (weight / math.sqrt(shape[-1])).bfloat16()
            parts = SCHEMES[self._scheme_of(name)].quantize(weight)
            made.append({key: value.cpu() for key, value in parts.items()})
        whole = {key: _cat([parts[key] for parts in made]) for key in made[0]}
        return Packed(SCHEMES[self._scheme_of(name)], shape, whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def everything(self) -> dict[str, Stored]:
        schemes = {name: SCHEMES[self._scheme_of(name)] for name in self._shapes}
        return {n: Stored(schemes[n].name, math.prod(s), schemes[n].nbytes(s)) for n, s in self._shapes.items()}

    @property
    def files(self) -> list[Path]:
        return []


def _cat(pieces: list[torch.Tensor]) -> torch.Tensor:
    dtype = pieces[0].dtype  # torch cannot concatenate 8-bit floats
    if dtype.itemsize > 1:
        return torch.cat(pieces)
    return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)


class Bytes:
    """A tokenizer for a vocabulary without one: UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return [2, *(12 + byte for byte in text.encode())]

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        ids = [token for m in messages for token in (*self.encode(m["content"]), 106)]
        return [*ids, 107] if add_generation_prompt else ids

    def decode(self, ids: list[int]) -> str:
        return bytes(max(0, min(255, token - 12)) for token in ids).decode("utf-8", "replace")


def opened(options: argparse.Namespace, scheme: str) -> Artifact:
    if options.shapes == "tiny":
        base = open_model("tiny")
        config, generation = base.config, base.generation
    else:
        config = ModelConfig.from_file(REAL / "config.json")
        generation = GenerationConfig.from_file(REAL / "generation_config.json", config)
        config = replace(config, layers=config.layers[: options.layers])
    generation = replace(generation, sampler=replace(generation.sampler, steps=8))  # none of them ever stops early
    artifact = Artifact(scheme, Path(scheme), Path(scheme), config, generation, Random(config, scheme, options.device))
    artifact.__dict__["tokenizer"] = Bytes()
    return artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--full", action="store_true", help="instead of --quick")
    parser.add_argument("--scheme", default="nvfp4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=("26b", "tiny"), default="26b")
    parser.add_argument("--out", type=Path, help="keep the report here")
    options = parser.parse_args()
    stages: dict[str, float] = {}
    peaks: dict[str, float] = {}
    each = Work.each

    def timed(self: Work, stage: str, count: int, do: Any) -> Any:
        """Time and peak memory by stage; parts put back are one."""
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        found = each(self, stage, count, do)
        name = "parts" if "-part-" in stage else stage
        stages[name] = round(stages.get(name, 0) + time.perf_counter() - began, 1)
        if options.device == "cuda":
            peaks[name] = max(peaks.get(name, 0), round(torch.cuda.max_memory_allocated() / GIB, 2))
        said = f"{stage}: {stages[name]} s, {peaks.get(name, 0)} GiB at the peak"
        print(said, file=sys.__stdout__, flush=True)  # the command's own output is captured
        return found

    Work.each = timed  # type: ignore[method-assign]
    inputs.open_model = lambda name, *more, **named: opened(options, "bf16" if name == "SRC" else options.scheme)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "report"
        arguments = ["validate", "random", "--against", "SRC", "-o", str(out), "--device", options.device, "--json"]
        began = time.perf_counter()
        result = CliRunner().invoke(dgq, arguments + ([] if options.full else ["--quick"]))
        total = time.perf_counter() - began
        assert result.exit_code in (0, 1), (result.output, result.exception)
        report = json.loads(result.stdout.splitlines()[-1])
        size = (out / "report.html").stat().st_size
    one, base = report["artifacts"][0], report["reference"]
    for name, cost in ((base["name"], base["cost"]), (one["name"], one["cost"])):
        print(f"{name}: {cost['weight_bytes'] / GIB:.2f} GiB of weights, {cost['peak_bytes'] / GIB:.2f} at the peak,"
              f" {cost['step_ms']:.1f} ms a step, loaded in {cost['load_s']:.1f} s")  # fmt: skip
    print(f"{total:.0f} s in all, {max(peaks.values(), default=0)} GiB at the highest peak")
    print(json.dumps({
        "device": report["device"], "layers": len(one["config"]["layers"]), "scheme": options.scheme,
        "seconds": round(total, 1), "stages_s": stages, "stages_peak_gib": peaks, "html_bytes": size,
        "cost": {"bf16": base["cost"], options.scheme: one["cost"]}, "kl": one["fixed"]["mean"]["kl"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
