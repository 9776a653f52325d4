"""`dgq verify`: its options, its call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import JSON, merged_adapters

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice
    from dgq.convert.verification.verify import VerifyResult


@click.command()
@click.argument("artifact", metavar="DIR|USER/NAME")
@click.option("--threads", type=click.IntRange(1, 1024), help="Files hashed at once. [default: CPU cores]")
@click.option("--against", metavar="SRC", help="Quantise some of its weights again from SRC, and compare bytes.")
@click.option("--sample", type=click.IntRange(1), default=8, show_default=True, help="Weights that --against draws.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws them; choose one that nobody expects.")
@click.option("--recipe", help="For --against. [default: dgq's own of that name, or the rules in dgq.json]")
@click.option("--imatrix", type=click.Path(path_type=Path), help="That the artifact was made with, for --against.")
@click.option(
    "--revision", help="Branch, tag or commit of an ARTIFACT on the Hub, else of SRC. [SRC beside it: as in dgq.json]"
)
@merged_adapters
@JSON
def verify(
    artifact: str,
    threads: int | None,
    against: str | None,
    sample: int,
    seed: int,
    recipe: str | None,
    imatrix: Path | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    as_json: bool,
) -> None:
    """Check every byte of an artifact against its dgq.json, and of a published one's other files against manifest.json.
    Exit code 1 if anything differs."""
    from dgq.convert.cli.terminal import console
    from dgq.convert.verification.verify import VerifyOptions, verify

    options = VerifyOptions(threads, against, sample, seed, recipe, imatrix, revision, adapters)
    result = verify(artifact, options, console.bar)
    console.print_json(result.to_json()) if as_json else _page(artifact, result)
    sys.exit(0 if result.ok else 1)


def _page(artifact: str, result: VerifyResult) -> None:
    """The problems, or what was checked."""
    from dgq.convert.cli.terminal.console import err, following_run, out, size

    for problem in result.problems:
        err.print(problem, style="red")
    if not result.ok:
        out.print(f"{artifact}: {len(result.problems)} problems")
        return
    out.print(f"{artifact}: {result.files} files, {size(result.bytes)}: every byte is what dgq.json says")
    if result.compared is not None:
        aside = "; input scales were left out" if result.left_out else ""
        out.print(f"{len(result.compared)} weights quantised again from the source are the same bytes{aside}")
    following_run(artifact)
