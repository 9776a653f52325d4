"""`dgq verify`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from dgq.convert.terminal.options import ADAPTER, JSON


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
@ADAPTER
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
    adapters: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check every byte of an artifact against its dgq.json, and of a published one's other files against manifest.json.
    Exit code 1 if anything differs."""
    from dgq.convert.source.hub import fetch_artifact, is_hub_id
    from dgq.convert.terminal import console
    from dgq.convert.verification.verify import total_bytes, verify

    threads = threads or os.cpu_count() or 1
    published = is_hub_id(artifact)
    where = fetch_artifact(artifact, revision) if published else None
    path = where.path if where else Path(artifact)
    with console.bar("verifying", total_bytes(path)) as advance:
        found = verify(path, threads, advance, links=published)
    if where is not None:
        found["revision"] = where.revision
    if against is not None and found["ok"]:
        from dgq.convert.source.checkpoint import open_source
        from dgq.convert.verification.against import source_revision, verify_against

        pinned = source_revision(path, against) if published or revision is None else revision
        source = open_source(against, pinned, adapters=adapters)
        found |= verify_against(path, source, recipe, imatrix, sample, seed, threads)
    console.print_json(found) if as_json else _page(artifact, found)
    sys.exit(0 if found["ok"] else 1)


def _page(artifact: str, result: dict[str, Any]) -> None:
    """result: what verify() found, and verify_against()."""
    from dgq.convert.terminal.console import err, following_run, out, size

    for problem in result["problems"]:
        err.print(problem, style="red")
    if not result["ok"]:
        out.print(f"{artifact}: {len(result['problems'])} problems")
        return
    out.print(f"{artifact}: {result['files']} files, {size(result['bytes'])}: every byte is what dgq.json says")
    if "compared" in result:
        aside = "; input scales were left out" if result["left_out"] else ""
        out.print(f"{len(result['compared'])} weights quantised again from the source are the same bytes{aside}")
    following_run(artifact)
