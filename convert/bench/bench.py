"""`dgq bench`: models measured one after the other on this GPU.

    artifacts, schemes of random weights, transformers ── a process each, if they are several ──> BenchResult
                                                                └── measure.py, peer.py

A process of its own gives a model a peak of its own, and its graphs' branches overlap as they do where they are used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dgq.convert.bench.floors import Ceilings, measure_ceilings
from dgq.convert.bench.measure import BenchLoad, bench_artifact, bench_shapes
from dgq.convert.bench.peer import bench_transformers
from dgq.convert.bench.shapes import SCHEMES
from dgq.quant.errors import InputError

PEER = "transformers"
Figures = Mapping[str, Any]  # what measure.measure() returns


@dataclass(frozen=True)
class BenchOptions:
    """What `dgq bench` can be asked for. shapes: "26b" for random weights of the real model's shapes in each of
    `schemes`; zipf: each of these also with experts chosen as unevenly as words; peer: transformers beside them.
    context: tokens of the prompt; batch: rows; steps: of a block; vram: bytes of the GPU, None for all."""

    shapes: str | None = None
    schemes: Sequence[str] = tuple(SCHEMES)
    context: int = 1024
    batch: int = 1
    steps: int = 16
    zipf: bool = False
    peer: bool = False
    vram: int | None = None

    @property
    def names(self) -> list[str]:
        """The models of random weights: SCHEME, SCHEME:zipf, and transformers."""
        names = list(self.schemes) if self.shapes else []
        if self.zipf:
            names = [one for name in names for one in (name, f"{name}:zipf")]
        return names + ([PEER] if self.peer and self.shapes and PEER not in names else [])

    @property
    def arguments(self) -> list[str]:
        """The same on the command line, without the models."""
        given = {"--context": self.context, "--batch": self.batch, "--steps": self.steps}
        limit = ["--vram", f"{self.vram}B"] if self.vram else []
        return [*(str(word) for pair in given.items() for word in pair), *limit]


@dataclass
class BenchResult:
    """about: what is the same for all models, the GPU and the load; models: name -> figures."""

    about: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Figures] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What is printed last."""
        return self.about | {"models": self.models}


def bench(
    artifacts: Sequence[str],
    options: BenchOptions | None = None,
    measured: Callable[[str, BenchResult], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> BenchResult:
    """Measure artifacts, and random weights if options.shapes is given. measured is called with the name of each model
    that is done and the result so far, notice with lines for the user. InputError for bad names and without a GPU;
    subprocess.CalledProcessError if a model's own process fails, which has then said why on stderr."""
    options, result = options or BenchOptions(), BenchResult()
    if not artifacts and options.shapes is None:
        raise InputError("name an artifact, or --shapes 26b for random weights of the real shapes")
    names = options.names
    for name in (*artifacts, *names):
        if len(artifacts) + len(names) == 1:
            about, figures = _here(name, name in artifacts, options, notice)
        else:
            what = [name] if name in artifacts else ["--shapes", str(options.shapes), "--schemes", name]
            about, figures = _in_a_process(name, [*what, *options.arguments])
        result.about, result.models[name] = result.about or about, figures
        if measured is not None:
            measured(name, result)
    return result


def _in_a_process(name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], Figures]:
    command = [sys.executable, "-m", "dgq.convert.cli", "bench", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    about: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return about, about.pop("models")[name]


def _here(
    name: str, is_artifact: bool, options: BenchOptions, notice: Callable[[str], None] | None
) -> tuple[dict[str, Any], Figures]:
    """What is the same for all models, and the figures of this one."""
    scheme, _, routing = name.partition(":")
    if not is_artifact and name != PEER and (scheme not in SCHEMES or routing not in ("", "zipf")):
        raise InputError(f"--schemes: unknown {name!r}; there are {', '.join(SCHEMES)}, each also with :zipf")
    if not torch.cuda.is_available():
        raise InputError("bench measures a GPU, and no CUDA device is visible to torch")
    load, ceilings = BenchLoad(options.context, options.batch, options.steps, options.vram), measure_ceilings()
    torch.cuda.empty_cache()
    about, shapes = _about(options, ceilings), str(options.shapes)
    if is_artifact:
        return about, bench_artifact(name, load, ceilings, notice)
    if scheme == PEER:
        return about, bench_transformers(shapes, options.context, options.batch, options.steps)
    return about, bench_shapes(shapes, scheme, load, ceilings, routing == "zipf")


def _about(options: BenchOptions, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "context": options.context,
        "batch": options.batch, "steps": options.steps, "bandwidth": ceilings.bandwidth, "rate": ceilings.rate,
        "host": ceilings.host,
    }  # fmt: skip
