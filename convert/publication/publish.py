"""`dgq publish`: artifacts on the Hub that anyone can check.

DIR, …  ── prepare.py: checks, card, manifest ── the Hub's word on the source ──> problems: stop, unless forced
                                                                      └──> upload.py: one commit each, a collection
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgq.convert.publication.prepare import CardOptions, Ready, check_repo, collection_names, finish, prepare
from dgq.convert.publication.upload import collect, upload, upstream
from dgq.convert.verification.files import total_bytes
from dgq.convert.verification.verify import Bar, no_bar
from dgq.quant.errors import InputError

COLLECTION = "collection"


@dataclass(frozen=True)
class PublishOptions:
    """What `dgq publish` can be asked for.

    collection: several artifacts become USER/NAME-FORMAT each, in a collection, with one table. reports: report.json
    files of dgq validate. licence: of the source, by the Hub's name, None for what is known of it; licence_file: its
    text. private: make the repositories private. revision: the branch to commit to, None for main. dry_run: nothing
    goes to the network. force: publish although a check fails, which the card then says; what is damaged is never
    published.
    """

    collection: bool = False
    reports: Sequence[Path] = ()
    licence: str | None = None
    licence_file: Path | None = None
    private: bool = False
    revision: str | None = None
    dry_run: bool = False
    force: bool = False


@dataclass
class Publication:
    """What came of it. ok: no check stopped it; repositories: each with its problems, files and card; published:
    repository -> commit, and "collection" -> its address on the Hub."""

    ok: bool
    repositories: Sequence[Ready]
    published: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        repositories = [
            {"repo": one.repo, "problems": one.problems, "files": one.files, "card": one.card}
            for one in self.repositories
        ]
        return {"ok": self.ok, "published": self.published, "repositories": repositories}


@dataclass(frozen=True)
class PublishEvents:
    """Whom to tell while it happens. bar: of the bytes that are checked; checked: everything is, and nothing was sent
    yet; published: name and commit of a repository, or "collection" and its address; notice: a line for the user."""

    bar: Bar = no_bar
    checked: Callable[[Publication], None] = lambda publication: None
    published: Callable[[str, str], None] = lambda name, where: None
    notice: Callable[[str], None] = lambda line: None


def publish(
    artifacts: Sequence[Path], repo: str, options: PublishOptions | None = None, events: PublishEvents | None = None
) -> Publication:
    """Check artifacts, write their cards, and put them on the Hub as `repo`, USER/NAME.

    Nothing is sent where a check fails, unless forced, nor in a dry run. Called again after an interruption, it does
    not send again what arrived. InputError, one line, for bad names and reports and for what the Hub or the network
    says.
    """
    options, events = options or PublishOptions(), events or PublishEvents()
    if len(artifacts) > 1 and not options.collection:
        raise InputError(f"{len(artifacts)} artifacts: give --all to publish them as a collection")
    check_repo(repo)
    publication = _checked(artifacts, repo, options, events.bar)
    events.checked(publication)
    if options.dry_run or not publication.ok:
        return publication
    for one in publication.repositories:
        commit = upload(one, options.private, options.revision, options.force, events.notice)
        publication.published[one.repo] = commit
        events.published(one.repo, commit)
    if options.collection:
        address = collect(publication.repositories, repo, options.private)
        publication.published[COLLECTION] = address
        events.published(COLLECTION, address)
    return publication


def _checked(artifacts: Sequence[Path], repo: str, options: PublishOptions, bar: Bar) -> Publication:
    """Everything ready to be sent, and whether it may be. The Hub is asked about the source, but not in a dry run."""
    cards = CardOptions(options.reports, options.licence, options.licence_file, os.cpu_count() or 1)
    names = collection_names(artifacts, repo) if options.collection else [repo]
    with bar("verifying", sum(map(total_bytes, artifacts))) as progress:
        several = [prepare(path, name, cards, progress) for path, name in zip(artifacts, names, strict=True)]
    if any(one.damaged for one in several):
        return Publication(False, several)
    if not options.dry_run:
        for one in several:
            one.problems += upstream(one)
    finish(several)
    return Publication(options.force or not any(one.problems for one in several), several)
