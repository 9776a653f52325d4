"""The command line's `validate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dgq.convert.terminal.options import ADAPTER, DEVICE, JSON, REVISION


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
    activations: str | None,
    device: str,
    dtype: str,
    revision: str | None,
    adapters: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Say what artifacts lost against SRC: numbers, pictures, and exit code 1 where a limit of the gate is broken.

    Goes on where it broke off. Without an ARTIFACT it makes the --reference alone.
    """
    import torch

    from dgq.convert.source.device import chosen_device
    from dgq.convert.terminal import show_validate
    from dgq.convert.terminal.console import count_bar, note, print_json
    from dgq.convert.validation import flow
    from dgq.convert.validation.gate import read_gate
    from dgq.convert.validation.judge import Options

    precision = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    options = Options(prompts, seed, quick, chosen_device(device), precision, activations)
    limits = read_gate(gate)
    with count_bar("validating") as advance:
        report = flow.validate(
            list(artifacts), against, out.expanduser() if out else None, reference, limits, options, advance, note,
            revision, adapters,
        )  # fmt: skip
    if report is None:
        return
    print_json(report) if as_json else show_validate.validated(report, out, reference)
    sys.exit(0 if report["ok"] else 1)
