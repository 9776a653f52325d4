"""The command `dgq calibrate`: its options, its one call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import DEVICE, JSON, RAM, REVISION, SOURCE, VRAM, merged_adapters

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice


@click.command()
@SOURCE
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="File to create.")
@click.option("--prompts", type=click.Path(path_type=Path), help=".jsonl of {text} or {messages}, or .txt.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Through the documents; up to four times as many while an expert has seen too few tokens. No more than the"
    " 262,144 tokens that a conversion uses.",
)
@click.option(
    "--trajectories",
    is_flag=True,
    help="Half of the canvases from the sampler's own steps; each of up to 48 steps reads the model once.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Write an importance matrix for llama-quantize, too (GGUF). llama-imatrix's counts clean text that the encoder"
    " reads; this one adds the decoder's noised canvases, self-conditioning and embedding.",
)
@REVISION
@merged_adapters
@DEVICE
@RAM
@VRAM
@JSON
def calibrate(
    src: str,
    out: Path,
    prompts: Path | None,
    seed: int,
    rounds: int,
    trajectories: bool,
    imatrix: Path | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    device: str,
    ram: int | None,
    vram: int | None,
    as_json: bool,
) -> None:
    """Find out what goes through each weight of SRC, for `convert --stats`. Goes on where it broke off."""
    import dgq.convert.calibration.calibrate as calibration
    from dgq.convert.cli import statistics_page
    from dgq.convert.cli.terminal import console

    options = calibration.CalibrateOptions(
        prompts=prompts, seed=seed, rounds=rounds, trajectories=trajectories, imatrix=imatrix, revision=revision,
        adapters=adapters, device=device, ram=ram, vram=vram,
    )  # fmt: skip
    with console.count_bar("calibrating") as advance:
        about = calibration.calibrate(src, out, options, advance, console.note)
    if about is not None:
        console.print_json(about) if as_json else statistics_page.calibrated(src, out, about)
