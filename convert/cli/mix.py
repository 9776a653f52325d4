"""The command `dgq mix`: its options, its one call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dgq.convert.cli.terminal.options import DEVICE, JSON, RAM, REVISION, SOURCE, VRAM, merged_adapters
from dgq.convert.cli.terminal.sizes import Size

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice


@click.command()
@SOURCE
@click.option("--to", "to", type=click.Choice(["nvfp4", "bnb4", "gguf"]), required=True, help="Format of the artifact.")
@click.option("--bytes", "nbytes", type=Size(), required=True, help="Of all tensors, as `dgq plan` says it: 16.5GB.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Recipe (.toml) to create.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="To measure on: .jsonl of {text} or {messages}, or .txt."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--groups", type=click.IntRange(1, 1000), help="Of layers that are decided on together. [default: each up to 8; 5]"
)
@click.option(
    "--chunks", type=click.IntRange(1, 1000), default=2, show_default=True, help="Of 8,192 tokens, to measure on."
)
@REVISION
@merged_adapters
@DEVICE
@click.option("--threads", type=click.IntRange(1, 1024), help="Slices quantised at once. [default: CPU cores]")
@RAM
@VRAM
@JSON
def mix(
    src: str,
    to: Literal["nvfp4", "bnb4", "gguf"],
    nbytes: int,
    out: Path,
    prompts: Path | None,
    seed: int,
    groups: int | None,
    chunks: int,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    device: str,
    threads: int | None,
    ram: int | None,
    vram: int | None,
    as_json: bool,
) -> None:
    """Measure what each part of SRC loses in each scheme, and write the recipe that loses least in --bytes. Goes on
    where it broke off.

    Every part and scheme is a trial, in which the samples go through the model anew from the part's first layer on. The
    26B in 5 groups: 168 trials to gguf, 108 passes of --chunks times 8,192 tokens in float32; to nvfp4 93 and 61, to
    bnb4 46 and 32. To gguf in 3 groups 76, in 2 groups 60, in one 44, each layer for itself 499; one chunk takes half
    the time. Hidden states take disk beside -o: 4.3 GiB a chunk.
    """
    import dgq.convert.mixture.mix as mixture
    from dgq.convert.cli.terminal import console

    options = mixture.MixOptions(
        nbytes=nbytes, prompts=prompts, seed=seed, groups=groups, chunks=chunks, revision=revision, adapters=adapters,
        device=device, threads=threads, ram=ram, vram=vram,
    )  # fmt: skip
    with console.count_bar("measuring") as advance:
        about = mixture.mix(src, to, out, options, advance, console.note)
    console.print_json(about) if as_json else _show(src, to, out, about)


def _show(src: str, to: str, out: Path, about: dict[str, Any]) -> None:
    """Print what was chosen part by part, what that loses, and the next command."""
    from rich.table import Table

    from dgq.convert.cli.terminal import console

    table = Table("part", "chosen", "bytes", "KL, thousandths of a nat", box=None, pad_edge=False)
    for part in about["parts"]:
        option = next(one for one in part["options"] if one["scheme"] == part["chosen"])
        table.add_row(part["part"], part["chosen"], f"{option['bytes']:,}", f"{1000 * option['kl']:.4f}")
    console.out.print(table)
    kl, default = about["kl"], about["default"]
    console.out.print(
        f"{out}: {about['bytes']:,} bytes, {about['bits_per_weight']:.2f} bits a weight; KL {kl['measured']:.5f} nats a"
        f" position on the canvases it was chosen by ({kl['predicted']:.5f} as the sum of its parts')"
    )
    if default:
        console.out.print(f"{default['recipe']}: {default['bytes']:,} bytes, KL {default['kl']:.5f} on the same")
    if console.err.is_terminal:
        command = f"dgq convert {shlex.quote(src)} --to {to} --recipe {shlex.quote(str(out))} -o OUT"
        console.err.print(f"\nnext: {command}", style="green")
