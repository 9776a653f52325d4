"""One artifact made ready for publication: checked, and with everything that goes to the Hub beside its own files.

    DIR, report.json  ->  checks  ->  validation.json, plot-*.png, LICENSE, README.md, manifest.json
                             |                                |
                  Ready.problems, a line each         Ready.contents

    manifest.json     {"dgq", "problems", "card": every number of README.md, "files": SHA-256 of all others, "sha256"}

The artifact's directory is only read. Of several artifacts every card has the table of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.convert.publication.card import PLOTS, CardFacts, card, card_data, licence_text, sibling
from dgq.convert.publication.checks import LICENSE, licence_of, problems
from dgq.convert.publication.judgement import Judgement, find_judgement
from dgq.convert.source.hashes import describe, dgq_version, digest
from dgq.convert.verification.files import MANIFEST, Progress, check_files
from dgq.convert.write import provenance
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json, read_whole
from dgq.runtime.files.artifact import open_artifact

Json = dict[str, Any]
VALIDATION = "validation.json"
MAX_LICENSE = 1 << 20  # bytes


@dataclass
class Ready:
    """One artifact on its way to the Hub.

    problems: a line for each check that fails; damaged: it is not what its dgq.json says, which nothing overrules;
    document: its dgq.json; data: what the card says; contents: name in the repository -> file, or bytes; files: the
    size and SHA-256 of each.
    """

    path: Path
    repo: str
    problems: list[str]
    damaged: bool
    document: Json
    data: Json
    contents: dict[str, Path | bytes]
    files: Json

    @property
    def card(self) -> str:
        """The text of README.md."""
        text = self.contents.get("README.md", b"")
        assert isinstance(text, bytes)
        return text.decode()


@dataclass(frozen=True)
class CardOptions:
    """What is given for the cards of all artifacts. reports: report.json files of dgq validate; licence: of the source,
    by the Hub's name, None for what is known of it; licence_file: its text; threads: files hashed at once."""

    reports: Sequence[Path] = ()
    licence: str | None = None
    licence_file: Path | None = None
    threads: int = 1


def prepare(path: Path, repo: str, options: CardOptions, progress: Progress) -> Ready:
    """Check one artifact and write its card and its manifest. repo: USER/NAME on the Hub. InputError for a bad name,
    and for a report that judges something else."""
    check_repo(repo)
    checked = check_files(path, options.threads, progress)
    if not checked.ok:
        return Ready(path, repo, list(checked.problems), True, {}, {}, {}, {})
    document = read_json(path / provenance.FILE)
    with _one_line(path / provenance.FILE):
        judgement = find_judgement(options.reports, path, document)
        contents: dict[str, Path | bytes] = {name: path / name for name in (*document["files"], provenance.FILE)}
        licence = licence_of(document, options.licence)
        contents |= _licence(document, options, licence)
        if judgement is not None:
            contents |= _validation(judgement)
        artifact = open_artifact(path)
        licence_file = LICENSE if LICENSE in contents else None
        lines = [printable(line) for line in problems(artifact, document, judgement, licence, licence_file)]
        facts = CardFacts(artifact, document, judgement, repo, licence, licence_file)
        data = card_data(facts, lines)
    files = document["files"] | {provenance.FILE: describe(path / provenance.FILE)}
    ready = Ready(path, repo, lines, False, document, data, contents, files)
    finish([ready])
    return ready


def finish(several: Sequence[Ready]) -> None:
    """Write the cards and manifests anew, with the problems that are known now and the table of all."""
    rows = [sibling(one.data) for one in several] if len(several) > 1 else []
    for one in several:
        one.data |= {"problems": one.problems, "siblings": rows}
        one.contents["README.md"] = card(one.data).encode()
        written = {name: data for name, data in one.contents.items() if isinstance(data, bytes) and name != MANIFEST}
        one.files |= {name: {"bytes": len(data), "sha256": digest(data)} for name, data in written.items()}
        others = {name: entry for name, entry in sorted(one.files.items()) if name != MANIFEST}
        manifest = {"dgq": dgq_version(), "problems": one.problems, "card": one.data, "files": others}
        text = provenance.text(provenance.sealed(manifest)).encode()
        one.contents[MANIFEST] = text
        one.files[MANIFEST] = {"bytes": len(text), "sha256": digest(text)}


def check_repo(repo: str) -> None:
    """InputError if it is no USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = repo.replace("/", "")
    if repo.count("/") != 1:
        raise InputError(f"--repo {printable(repo)}: is no USER/NAME")


def collection_names(paths: Sequence[Path], repo: str) -> list[str]:
    """The repositories of a collection: USER/NAME and the label of each artifact's recipe."""
    names = []
    for path in paths:
        rules = read_json(path / provenance.FILE).get("recipe_rules")
        if not (isinstance(rules, dict) and isinstance(rules.get("label"), str)):
            raise InputError(f"{path / provenance.FILE}: does not hold its recipe's rules; convert again with this dgq")
        names.append(f"{repo}-{rules['label']}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--all: two artifacts would be {twice}; publish one of them alone")
    return names


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """InputError for whatever a dgq.json lacks that somebody else wrote and sealed."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{file}: is not as this dgq writes it ({error!r}); convert again") from None


def _licence(document: Json, options: CardOptions, licence: str | None) -> dict[str, Path | bytes]:
    """The licence's text, if the artifact has none of its own: the one given, or dgq's copy."""
    if options.licence_file is not None:
        if LICENSE in document["files"]:
            raise InputError(
                f"--license-file {options.licence_file}: the artifact has a {LICENSE} from its source; keep that"
            )
        try:
            return {LICENSE: read_whole(options.licence_file, MAX_LICENSE)}
        except (OSError, ValueError) as error:
            raise InputError(f"--license-file {options.licence_file}: not readable ({error})") from None
    text = None if LICENSE in document["files"] else licence_text(licence)
    return {} if text is None else {LICENSE: text.encode()}


def _validation(judgement: Judgement) -> dict[str, Path | bytes]:
    """validation.json and the card's pictures, which it lists."""
    from dgq.convert.validation.report.plots import pictures  # brings matplotlib

    drawn = pictures(judgement.result, PLOTS)
    judgement.document["plots"] = [{"title": title, "file": f"plot-{key}.png"} for key, (title, _) in drawn.items()]
    text = json.dumps(judgement.document, indent=1, ensure_ascii=False) + "\n"
    return {VALIDATION: text.encode(), **{f"plot-{key}.png": image for key, (_, image) in drawn.items()}}
