"""`dgq publish`: its options, its call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import JSON

if TYPE_CHECKING:
    from dgq.convert.publication.publish import Publication


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
    from dgq.convert.cli.terminal import console
    from dgq.convert.publication.publish import PublishEvents, PublishOptions, publish

    options = PublishOptions(collection, reports, licence, licence_file, private, revision, dry_run, force)
    page = _Page(listing=dry_run and not as_json, published=not as_json)
    events = PublishEvents(console.bar, page.checked, page.published, console.note)
    publication = publish(artifacts, repo, options, events)
    if as_json:
        console.print_json(publication.to_json())
    sys.exit(0 if publication.ok else 1)


class _Page:
    """What is printed while it happens. listing: every file and the card; published: where the artifacts are."""

    def __init__(self, listing: bool, published: bool) -> None:
        self._listing, self._published = listing, published

    def checked(self, publication: Publication) -> None:
        """The checks that fail, on stderr; on a dry run every file with its SHA-256 and size, and the card."""
        from dgq.convert.cli.terminal.console import err, out

        for one in publication.repositories:
            for line in one.problems:
                err.print(f"{one.repo}: {line}", style="yellow" if publication.ok else "red")
        for one in publication.repositories if self._listing else ():
            size = sum(entry["bytes"] for entry in one.files.values()) / 1e9
            out.print(f"{one.repo}: {len(one.files)} files, {size:,.2f} GB")
            for name, entry in sorted(one.files.items()):
                out.print(f"{entry['sha256']} {entry['bytes']:>14,}  {name}")
            out.print()
            for line in one.card.splitlines():
                out.print(line)

    def published(self, name: str, where: str) -> None:
        """A repository's commit, or the collection's address."""
        from dgq.convert.cli.terminal.console import err, out
        from dgq.convert.publication.publish import COLLECTION

        if not self._published:
            return
        is_collection = name == COLLECTION
        out.print(f"{name}: {where}" if is_collection else f"{name}@{where}")
        if not is_collection and err.is_terminal:
            err.print(f"\nnext: dgq verify {name} --revision {where}", style="green")
