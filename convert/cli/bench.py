"""`dgq bench`: its options, its call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click

from dgq.convert.cli.terminal.sizes import Size

if TYPE_CHECKING:
    from dgq.convert.bench.bench import BenchResult


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
    from dgq.convert.bench import bench as benchmark
    from dgq.convert.cli.terminal.console import note, print_json

    page = _Page(as_json)
    options = benchmark.BenchOptions(shapes, schemes.split(","), context, batch, steps, zipf, peer, vram)
    try:
        result = benchmark.bench(artifacts, options, page.measured, note)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # that process has said why
    page.end(result)
    print_json(result.to_json())


class _Page:
    """Lines for people, as models are measured."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def measured(self, name: str, result: BenchResult) -> None:
        """A line or two of a model; before the first, what is the same for all."""
        if len(result.models) == 1:
            self._head(result.about)
        figures = result.models[name]
        gib = figures["peak_reserved"] / (1 << 30)
        if "parts_ms" not in figures:
            self._print(f"{name:18}{figures['step_ms']:9.2f}{'':31}{figures['tokens_per_s']:10,.0f}{gib:10.2f}")
            return
        planned = f"{figures['planned'] / (1 << 30):9.2f}" if "planned" in figures else f"{'':9}"
        self._print(
            f"{name[-18:]:18}{figures['step_ms']:9.2f}{figures['floor_ms']:8.2f}{figures['ratio']:7.2f}"
            f"{figures['commit_ms']:8.2f}{figures['prompt_ms']:8.1f}{figures['tokens_per_s']:10,.0f}{gib:10.2f}{planned}"
        )
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in figures["parts_ms"].items())
        self._print(f"{'':18}  {parts}", style="dim")

    def end(self, result: BenchResult) -> None:
        """How much faster each model's step is than transformers', if that was measured."""
        from dgq.convert.bench.bench import PEER

        if (peer := result.models.get(PEER)) is not None:
            for name, figures in result.models.items():
                if name != PEER:
                    times = peer["step_ms"] / figures["step_ms"]
                    self._print(f"{name}: {times:.1f} times as fast as transformers' step")

    def _head(self, about: dict[str, Any]) -> None:
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
        from dgq.convert.cli.terminal.console import out

        if not self._quiet:
            out.print(line, style=style)
