"""`dgq verify`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from dgq.convert.options import JSON, REVISION


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1, 1024), help="Files hashed at once. [default: CPU cores]")
@click.option("--against", metavar="SRC", help="Quantise some of its weights again from SRC, and compare bytes.")
@click.option("--sample", type=click.IntRange(1), default=8, show_default=True, help="Weights that --against draws.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws them; choose one that nobody expects.")
@click.option("--recipe", help="For --against. [default: dgq's own of that name, or the rules in dgq.json]")
@click.option("--imatrix", type=click.Path(path_type=Path), help="That the artifact was made with, for --against.")
@REVISION
@JSON
def verify(
    artifact: Path,
    threads: int | None,
    against: str | None,
    sample: int,
    seed: int,
    recipe: str | None,
    imatrix: Path | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Check every byte of an artifact directory against its dgq.json. Exit code 1 if anything differs."""
    from dgq.convert import show
    from dgq.convert.verify import total_bytes, verify

    threads = threads or os.cpu_count() or 1
    with show.bar("verifying", total_bytes(artifact)) as advance:
        found = verify(artifact, threads, advance)
    if against is not None and found["ok"]:
        from dgq.convert.against import verify_against
        from dgq.convert.source import open_source

        found |= verify_against(artifact, open_source(against, revision), recipe, imatrix, sample, seed, threads)
    show.print_json(found) if as_json else show.verified(str(artifact), found)
    sys.exit(0 if found["ok"] else 1)
