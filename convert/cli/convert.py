"""`dgq convert`: quantise a source into an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import DEVICE, JSON, RAM, RECIPE, REVISION, SOURCE, TO, VRAM, merged_adapters

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice
    from dgq.convert.write.pipeline import Converted


@click.command()
@SOURCE
@TO
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@RECIPE
@REVISION
@merged_adapters
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="llama.cpp's importance matrix to weigh a GGUF's columns with, of llama-imatrix or `dgq calibrate`.",
)
@click.option(
    "--effort",
    type=click.Choice(["stock", "fast", "standard", "max"]),
    help="stock: exactly the bytes of the format's own quantiser. fast: the best scales without data. standard: error"
    " feedback by --stats; max: gone over twice more. [default: fast; standard with --stats; stock with --imatrix]",
)
@click.option("--stats", type=click.Path(path_type=Path), help="What `dgq calibrate` found out about SRC.")
@click.option(
    "--input-scale",
    default="calibrate",
    show_default=True,
    help="Of W4A4 NVFP4: 'calibrate' on the prompts that ship with dgq, or one number for all experts.",
)
@DEVICE
@click.option("--threads", type=click.IntRange(1, 1024), help="Slices quantised at once. [default: CPU cores]")
@RAM
@VRAM
@JSON
def convert(
    src: str,
    to: str,
    out: Path,
    recipe: str | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    imatrix: Path | None,
    effort: str | None,
    stats: Path | None,
    input_scale: str,
    device: str,
    threads: int | None,
    ram: int | None,
    vram: int | None,
    as_json: bool,
) -> None:
    """Quantise SRC into the directory given with -o."""
    from dgq.convert.cli.terminal import console
    from dgq.convert.write import conversion

    options = conversion.ConvertOptions(
        recipe, revision, adapters, effort, stats, imatrix, input_scale, device, threads, ram, vram
    )
    with console.byte_bar("converting") as show:
        artifact = conversion.convert(src, to, out, options, show, console.note)
    if as_json:
        about = {"output": str(artifact.file), "seconds": artifact.seconds, "resumed_weights": artifact.resumed}
        console.print_json({**about, **artifact.document})
    else:
        _page(artifact)


def _page(artifact: Converted) -> None:
    from dgq.convert.calibration.stats import named
    from dgq.convert.cli.terminal.console import MIB, following_run, input_scales, out

    document = artifact.document
    size = sum(file.stat().st_size for file in artifact.path.iterdir())
    if scales := document.get("input_scales"):
        out.print(f"input scales {scales['method']}: {input_scales(scales)}")
    if calibration := document["calibration"]:
        out.print(f"calibrated on {calibration['data']['name']}: {named(calibration['starved'])}")
    share = document["quantized_params"] / document["params"]
    out.print(f"{artifact.file}  {size / MIB:,.1f} MiB, {share:.2%} of the parameters quantised")
    following_run(str(artifact.path))
