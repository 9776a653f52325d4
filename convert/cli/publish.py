"""`dgq publish`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.terminal.options import JSON
from dgq.quant.errors import InputError

if TYPE_CHECKING:
    from dgq.convert.publication.publish import Ready


@click.command()
@click.argument("artifacts", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--repo", required=True, help="USER/NAME on the Hub; made if it is not there.")
@click.option("--all", "collection", is_flag=True, help="Several DIRs: USER/NAME-FORMAT each, a collection, one table.")
@click.option(
    "--report", "reports", multiple=True, type=click.Path(path_type=Path),
    help="report.json of dgq validate; may be repeated.",
)  # fmt: skip
@click.option("--license", "licence", help="Of the source, as the Hub names it. [default: the released model's]")
@click.option("--license-file", "licence_file", type=click.Path(path_type=Path), help="Its text, where dgq has none.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", help="Branch to commit to, made if it is not there. [default: main]")
@click.option("--dry-run", is_flag=True, help="Check, list every file and show the card; nothing goes to the network.")
@click.option("--force", is_flag=True, help="Publish although a check fails; the card says so. Not what is damaged.")
@JSON
def publish(
    artifacts: tuple[Path, ...], repo: str, collection: bool, reports: tuple[Path, ...], licence: str | None,
    licence_file: Path | None, private: bool, revision: str | None, dry_run: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put an artifact on the Hub with a card made of its data. Exit code 1 if a check fails.

    Run again after an interruption, it does not send again what arrived.
    """
    from dgq.convert.publication import publish as flow
    from dgq.convert.publication.upload import collect, upload, upstream
    from dgq.convert.terminal import console, show_publish
    from dgq.convert.verification.verify import total_bytes

    if len(artifacts) > 1 and not collection:
        raise InputError(f"{len(artifacts)} artifacts: give --all to publish them as a collection")
    flow.check_repo(repo)
    asked = flow.Asked(reports, licence, licence_file, os.cpu_count() or 1)
    repos = flow.names(artifacts, repo) if collection else [repo]
    with console.bar("verifying", sum(map(total_bytes, artifacts))) as advance:
        several = [flow.prepare(path, name, asked, advance) for path, name in zip(artifacts, repos, strict=True)]
    whole = not any(one.damaged for one in several)
    if whole:
        for one in several:
            one.problems += [] if dry_run else upstream(one)
        flow.finish(several)
    stopped = not whole or (any(one.problems for one in several) and not force)
    show_publish.problems({one.repo: one.problems for one in several}, forced=not stopped)
    if dry_run and not as_json:
        for one in several:
            show_publish.listing(one.repo, one.files, one.card)
    done = {}
    if not (dry_run or stopped):
        for one in several:
            done[one.repo] = upload(one, private, revision, force, console.note)
            if not as_json:
                show_publish.published(one.repo, done[one.repo], f"dgq verify {one.repo} --revision {done[one.repo]}")
        if collection:
            done["collection"] = collect(several, repo, private)
            if not as_json:
                show_publish.published("collection", done["collection"])
    if as_json:
        console.print_json({"ok": not stopped, "published": done, "repositories": [_said(one) for one in several]})
    sys.exit(1 if stopped else 0)


def _said(ready: Ready) -> dict[str, object]:
    return {"repo": ready.repo, "problems": ready.problems, "files": ready.files, "card": ready.card}
