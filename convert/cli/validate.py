"""`dgq validate`: its options, its call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dgq.convert.cli.terminal.options import ADAPTER, DEVICE, JSON, REVISION

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice
    from dgq.convert.validation.report.result import ArtifactResult, FreeResult, ValidationResult


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1)
@click.option("--against", metavar="SRC", help="The BF16 checkpoint they were made of.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Directory to create: the report.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="What SRC did: read from this file if it is there, else kept in it. With it, SRC need not be at hand.",
)
@click.option("--gate", type=click.Path(path_type=Path), help="TOML of limits. [default: dgq's own, for 4 bit]")
@click.option("--prompts", type=click.Path(path_type=Path), help=".jsonl of {prompt, answer}, {messages} or {text}.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of noise and random tokens. [default: 0]")
@click.option("--quick", is_flag=True, help="A first look: fewer questions, wider bounds.")
@click.option(
    "--activations",
    type=click.Choice(["nvfp4"]),
    help="Round the experts' inputs as a W4A4 kernel does, where an artifact has input scales.",
)
@DEVICE
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="Of activations. [auto: bf16 on CUDA]"
)
@REVISION
@ADAPTER
@JSON
def validate(
    artifacts: tuple[str, ...],
    against: str | None,
    out: Path | None,
    reference: Path | None,
    gate: Path | None,
    prompts: Path | None,
    seed: int | None,
    quick: bool,
    activations: Literal["nvfp4"] | None,
    device: Literal["auto", "cpu", "cuda"],
    dtype: Literal["auto", "fp32", "bf16"],
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    as_json: bool,
) -> None:
    """Say what artifacts lost against SRC: numbers, pictures, and exit code 1 where a limit of the gate is broken.

    Goes on where it broke off. Without an ARTIFACT it makes the --reference alone.
    """
    from dgq.convert.cli.terminal.console import count_bar, note, print_json
    from dgq.convert.validation.flow import validate as validate_artifacts
    from dgq.convert.validation.inputs import ValidateOptions

    options = ValidateOptions(
        against=against, output=out, reference=reference, gate=gate, prompts=prompts, seed=seed, quick=quick,
        activations=activations, device=device, dtype=dtype, revision=revision, adapters=adapters,
    )  # fmt: skip
    with count_bar("validating") as advance:
        result = validate_artifacts(artifacts, options, advance, note)
    if result is None:
        return
    print_json(result.to_json()) if as_json else _page(result, options)
    sys.exit(0 if result.ok else 1)


def _page(result: ValidationResult, options: Any) -> None:
    """One row an artifact, the limits that are broken, and where the report is."""
    from dgq.convert.cli.terminal.console import err, out

    if not result.artifacts:
        out.print(f"{options.reference}: what {result.reference.name} does; judge artifacts with --reference")
        return
    out.print(_table(result))
    for one in result.artifacts:
        for check in one.gate:
            if check.ok is False:
                out.print(f"{one.name}: {check.limit}: {check.observed}", style="red")
        if unchecked := [check.limit for check in one.gate if check.ok is None]:
            err.print(f"note: {one.name}: unchecked: {', '.join(unchecked)}", style="yellow")
    if options.output is not None:
        page = options.output.expanduser() / "report.html"
        out.print(f"{page}  numbers in report.json and *.csv beside it")
        if err.is_terminal:
            err.print(f"\nnext: xdg-open {shlex.quote(str(page))}", style="green")


def _table(result: ValidationResult) -> Any:
    """The reference, then the artifacts, those with the smallest KL first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("artifact")
    for heading in ("MB", "KL, nats", "top-1", "steps", "score", "tokens/s", "gate"):
        table.add_column(heading, justify="right")
    reference, base = result.reference, result.reference.free
    assert base is not None
    table.add_row(f"{reference.name} (BF16)", f"{reference.bytes / 1e6:,.1f}", "0", "", *_free(base), "")
    for one in sorted(result.artifacts, key=lambda one: one.fixed.mean.kl.figure):
        table.add_row(*_row(one))
    return table


def _row(one: ArtifactResult) -> list[str]:
    kl, broken = one.fixed.mean.kl, sum(check.ok is False for check in one.gate)
    return [
        one.name + (f" ({one.activations} activations)" if one.activations else ""), f"{one.bytes / 1e6:,.1f}",
        f"{kl.figure:.5f} ±{(kl.high - kl.low) / 2:.5f}", f"{one.fixed.mean.top1.figure:.2%}", *_free(one.free),
        "good" if one.ok else f"{broken} broken",
    ]  # fmt: skip


def _free(free: FreeResult) -> list[str]:
    """Steps, score and tokens a second."""
    score = f"{free.score.figure:.1%}" if free.score else ""
    return [f"{free.steps.figure:.2f}", score, f"{free.tokens_per_second:.0f}"]
