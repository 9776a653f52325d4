"""`dgq bench` on the command line: what is measured one after the other, and the page of it."""

from __future__ import annotations

import gc
import os
from typing import Any

import click

from dgq.quant.errors import InputError


@click.command()
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT|SRC]...")
@click.option("--shapes", type=click.Choice(["26b"]), help="Random weights of the real model's shapes instead.")
@click.option("--schemes", default="bf16,nvfp4,nf4,q4_k_m", show_default=True, help="Of --shapes.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--batch", type=click.IntRange(1, 256), default=1, show_default=True, help="Rows.")
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="A block.")
@click.option("--zipf", is_flag=True, help="Of --shapes: each scheme also with experts chosen as unevenly as words.")
@click.option("--peer", is_flag=True, help="Of --shapes: transformers beside it, where its 50 GB fit.")
@click.option("--vram", help="Of the GPU to use, as 12GiB: experts beyond that wait in host memory. [default: all]")
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
    vram: str | None,
    as_json: bool,
) -> None:
    """Measure how fast models denoise on this GPU, by part, beside what bytes and operations allow."""
    if not artifacts and shapes is None:
        raise InputError("name an artifact, or --shapes 26b for random weights of the real shapes")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # several models, one after the other
    import torch

    from dgq.convert import bench as measure
    from dgq.convert.device import memory_size
    from dgq.convert.peer import bench_transformers
    from dgq.convert.shapes import SCHEMES

    if not torch.cuda.is_available():
        raise InputError("bench measures a GPU, and no CUDA device is visible to torch")
    asked = schemes.split(",") if shapes else []
    if unknown := [name for name in asked if name not in SCHEMES]:
        raise InputError(f"--schemes: unknown {unknown[0]!r}; there are {', '.join(SCHEMES)}")
    load = measure.Load(context, batch, steps, memory_size(vram))
    found = measure.ceilings()
    page = _Page(quiet=as_json, load=load, ceilings=found)
    for artifact in artifacts:
        page.add(artifact, measure.bench_artifact(artifact, load, found))
    for scheme in asked:
        for skewed in (False, True)[: 1 + zipf]:
            label = f"{scheme} zipf" if skewed else scheme
            page.add(label, measure.bench_shapes(str(shapes), scheme, load, found, skewed))
    if peer and shapes:
        page.add("transformers", bench_transformers(shapes, context, batch, steps))
    page.end()


class _Page:
    """Lines as they are measured; the JSON object at the end."""

    def __init__(self, quiet: bool, load: Any, ceilings: Any) -> None:
        import torch

        self._quiet = quiet
        self._models: dict[str, dict[str, Any]] = {}
        self._about = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "context": load.context,
            "batch": load.rows, "steps": load.steps, "bandwidth": ceilings.bandwidth, "rate": ceilings.rate,
            "host": ceilings.host,
        }  # fmt: skip
        self._print(
            f"{self._about['device']}, torch {torch.__version__}; copies {ceilings.bandwidth / 1e12:.2f} TB/s, products"
            f" {ceilings.rate / 1e12:.0f} TFLOP/s, from the host {ceilings.host / 1e9:.0f} GB/s"
        )
        self._print(f"context {load.context}, {load.rows} rows, {load.steps} steps a block; milliseconds, medians")
        titles = f"{'step':>9}{'floor':>8}{'ratio':>7}{'commit':>8}{'prompt':>8}{'tokens/s':>10}{'VRAM GiB':>10}"
        self._print(f"{'':18}{titles}{'planned':>9}", style="bold")

    def _print(self, line: str, style: str | None = None) -> None:
        from dgq.convert.show import out

        if not self._quiet:
            out.print(line, style=style)

    def add(self, name: str, found: dict[str, Any]) -> None:
        import torch

        self._models[name] = found
        gib = found["peak_reserved"] / (1 << 30)
        if "parts_ms" in found:
            planned = f"{found['planned'] / (1 << 30):9.2f}" if "planned" in found else f"{'':9}"
            self._print(
                f"{name[-18:]:18}{found['step_ms']:9.2f}{found['floor_ms']:8.2f}{found['ratio']:7.2f}"
                f"{found['commit_ms']:8.2f}{found['prompt_ms']:8.1f}{found['tokens_per_s']:10,.0f}{gib:10.2f}{planned}"
            )
            parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found["parts_ms"].items())
            self._print(f"{'':18}  {parts}", style="dim")
        else:
            self._print(f"{name:18}{found['step_ms']:9.2f}{'':31}{found['tokens_per_s']:10,.0f}{gib:10.2f}")
        gc.collect()  # a model and its graphs refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        from dgq.convert.show import print_json

        if (peer := self._models.get("transformers")) is not None:
            for name, found in self._models.items():
                if "parts_ms" in found:
                    self._print(f"{name}: {peer['step_ms'] / found['step_ms']:.1f} times transformers' step")
        print_json(self._about | {"models": self._models})
