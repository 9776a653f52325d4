"""`dgq bench` on the command line: what is measured one after the other, and the page of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click

from dgq.convert.terminal.sizes import Size
from dgq.quant.errors import InputError

PEER = "transformers"


@click.command()
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT|SRC]...")
@click.option("--shapes", type=click.Choice(["26b"]), help="Random weights of the real model's shapes instead.")
@click.option("--schemes", default="bf16,nvfp4,nf4,q4_k_m", show_default=True, help="Of --shapes.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--batch", type=click.IntRange(1, 256), default=1, show_default=True, help="Rows.")
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="A block.")
@click.option("--zipf", is_flag=True, help="Of --shapes: each scheme also with experts chosen as unevenly as words.")
@click.option("--peer", is_flag=True, help="Of --shapes: transformers beside it, where its 50 GB fit.")
@click.option("--vram", type=Size(), help="Of the GPU, as 12GiB: experts beyond wait in host memory. [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last, and nothing for people.")
def bench(
    artifacts: tuple[str, ...],
    shapes: str | None,
    schemes: str,
    context: int,
    batch: int,
    steps: int,
    zipf: bool,
    peer: bool,
    vram: int | None,
    as_json: bool,
) -> None:
    """Measure how fast models denoise on this GPU, by part, beside what bytes and operations allow."""
    if not artifacts and shapes is None:
        raise InputError("name an artifact, or --shapes 26b for random weights of the real shapes")
    names = schemes.split(",") if shapes else []
    if zipf:
        names = [one for name in names for one in (name, f"{name}:zipf")]
    names += [PEER] if peer and shapes and PEER not in names else []
    asked = {"--context": context, "--batch": batch, "--steps": steps} | ({"--vram": f"{vram}B"} if vram else {})
    page = _Page(as_json)
    if len(artifacts) + len(names) == 1:
        about, found = _measured(artifacts[0] if artifacts else None, shapes, names, context, batch, steps, vram)
        page.add((*artifacts, *names)[0], about, found)
    else:
        for name in (*artifacts, *names):
            what = [name] if name in artifacts else ["--shapes", str(shapes), "--schemes", name]
            page.add(name, *_in_a_process(name, [*what, *(str(part) for pair in asked.items() for part in pair)]))
    page.end()


def _in_a_process(name: str, arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One model alone: so its peak is its own, and its graphs' branches overlap as they do where they are used."""
    command = [sys.executable, "-m", "dgq.convert.cli", "bench", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    about: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return about, about.pop("models")[name]


def _measured(
    artifact: str | None, shapes: str | None, names: list[str], context: int, batch: int, steps: int, vram: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is the same for all models, and what was found of this one."""
    import torch

    from dgq.convert.bench import bench as measure
    from dgq.convert.bench.peer import bench_transformers
    from dgq.convert.bench.shapes import SCHEMES
    from dgq.convert.terminal.console import note

    scheme, _, routing = names[0].partition(":") if names else ("", "", "")
    if names and names[0] != PEER and (scheme not in SCHEMES or routing not in ("", "zipf")):
        raise InputError(f"--schemes: unknown {names[0]!r}; there are {', '.join(SCHEMES)}, each also with :zipf")
    if not torch.cuda.is_available():
        raise InputError("bench measures a GPU, and no CUDA device is visible to torch")
    load, ceilings = measure.Load(context, batch, steps, vram), measure.ceilings()
    torch.cuda.empty_cache()
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "context": context, "batch": batch,
        "steps": steps, "bandwidth": ceilings.bandwidth, "rate": ceilings.rate, "host": ceilings.host,
    }  # fmt: skip
    if artifact is not None:
        return about, measure.bench_artifact(artifact, load, ceilings, note)
    if scheme == PEER:
        return about, bench_transformers(str(shapes), context, batch, steps)
    return about, measure.bench_shapes(str(shapes), scheme, load, ceilings, routing == "zipf")


class _Page:
    """Lines as they are measured; the JSON object at the end."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._about: dict[str, Any] = {}
        self._models: dict[str, dict[str, Any]] = {}

    def add(self, name: str, about: dict[str, Any], found: dict[str, Any]) -> None:
        if not self._models:
            self._head(about)
        self._models[name] = found
        gib = found["peak_reserved"] / (1 << 30)
        if "parts_ms" not in found:
            self._print(f"{name:18}{found['step_ms']:9.2f}{'':31}{found['tokens_per_s']:10,.0f}{gib:10.2f}")
            return
        planned = f"{found['planned'] / (1 << 30):9.2f}" if "planned" in found else f"{'':9}"
        self._print(
            f"{name[-18:]:18}{found['step_ms']:9.2f}{found['floor_ms']:8.2f}{found['ratio']:7.2f}"
            f"{found['commit_ms']:8.2f}{found['prompt_ms']:8.1f}{found['tokens_per_s']:10,.0f}{gib:10.2f}{planned}"
        )
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found["parts_ms"].items())
        self._print(f"{'':18}  {parts}", style="dim")

    def end(self) -> None:
        from dgq.convert.terminal.console import print_json

        if (peer := self._models.get(PEER)) is not None:
            for name, found in self._models.items():
                if name != PEER:
                    self._print(f"{name}: {peer['step_ms'] / found['step_ms']:.1f} times as fast as transformers' step")
        print_json(self._about | {"models": self._models})

    def _head(self, about: dict[str, Any]) -> None:
        self._about = about
        self._print(
            f"{about['device']}, torch {about['torch']}; copies {about['bandwidth'] / 1e12:.2f} TB/s, products"
            f" {about['rate'] / 1e12:.0f} TFLOP/s, from the host {about['host'] / 1e9:.0f} GB/s"
        )
        self._print(
            f"context {about['context']}, {about['batch']} rows, {about['steps']} steps a block; milliseconds, medians"
        )
        titles = f"{'step':>9}{'floor':>8}{'ratio':>7}{'commit':>8}{'prompt':>8}{'tokens/s':>10}{'VRAM GiB':>10}"
        self._print(f"{'':18}{titles}{'planned':>9}", style="bold")

    def _print(self, line: str, style: str | None = None) -> None:
        from dgq.convert.terminal.console import out

        if not self._quiet:
            out.print(line, style=style)
