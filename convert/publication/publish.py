"""`dgq publish`: artifacts on the Hub that anyone can check.

    DIR, report.json  ->  checks  ->  validation.json, plot-*.png, LICENSE, README.md, manifest.json
                             |                                |
                  a line each, or --force                  Ready.contents  ->  convert/publication/upload.py: one commit

    manifest.json     {"dgq", "problems", "card": every number of README.md, "files": SHA-256 of all others, "sha256"}

DIR is only read. Several artifacts become a collection: every card then has the table of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.convert.publication.card import PLOTS, card, card_data, licence_text, sibling
from dgq.convert.publication.checks import LICENSE, judgement, licence_of, problems
from dgq.convert.source.hashes import describe, dgq_version, digest
from dgq.convert.verification.verify import MANIFEST, Progress, verify
from dgq.convert.write import provenance
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json, read_whole
from dgq.runtime.files.artifact import open_artifact

Json = dict[str, Any]
VALIDATION = "validation.json"
MAX_LICENSE = 1 << 20  # bytes


@dataclass
class Ready:
    """One artifact on its way. contents: name in the repository -> file, or bytes; files: of each its size and SHA-256;
    data: what the card says; problems: checks that fail; damaged: it is not what its dgq.json says, which nothing
    overrules."""

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
        found = self.contents.get("README.md", b"")
        assert isinstance(found, bytes)
        return found.decode()


@dataclass(frozen=True)
class Asked:
    """What the command line says of all artifacts: reports of dgq validate, the licence's name and text, threads."""

    reports: Sequence[Path] = ()
    licence: str | None = None
    licence_file: Path | None = None
    threads: int = 1


def prepare(path: Path, repo: str, asked: Asked, progress: Progress) -> Ready:
    """Check one artifact and write its card. InputError for a bad --repo, a report of something else."""
    check_repo(repo)
    checked = verify(path, asked.threads, progress)
    if not checked["ok"]:
        return Ready(path, repo, checked["problems"], True, {}, {}, {}, {})
    document = read_json(path / provenance.FILE)
    with _told(path / provenance.FILE):
        judged = judgement(asked.reports, path, document)
        contents: dict[str, Path | bytes] = {name: path / name for name in (*document["files"], provenance.FILE)}
        licence = licence_of(document, asked.licence)
        contents |= _licence(document, asked, licence)
        if judged is not None:
            contents |= _validation(judged)
        artifact = open_artifact(path)
        file = LICENSE if LICENSE in contents else None
        found = [printable(line) for line in problems(artifact, document, judged, licence, file)]
        data = card_data(artifact, document, judged, repo, licence, file, found)
    files = document["files"] | {provenance.FILE: describe(path / provenance.FILE)}
    ready = Ready(path, repo, found, False, document, data, contents, files)
    finish([ready])
    return ready


def finish(several: Sequence[Ready]) -> None:
    """Write cards and manifests anew, with the problems that are known now and the table of all."""
    rows = [sibling(one.data) for one in several] if len(several) > 1 else []
    for one in several:
        one.data |= {"problems": one.problems, "siblings": rows}
        one.contents["README.md"] = card(one.data).encode()
        written = {name: data for name, data in one.contents.items() if isinstance(data, bytes) and name != MANIFEST}
        one.files |= {name: {"bytes": len(data), "sha256": digest(data)} for name, data in written.items()}
        others = {name: said for name, said in sorted(one.files.items()) if name != MANIFEST}
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


def names(paths: Sequence[Path], repo: str) -> list[str]:
    """Repositories of a collection: USER/NAME and each recipe's label."""
    found = []
    for path in paths:
        rules = read_json(path / provenance.FILE).get("recipe_rules")
        if not (isinstance(rules, dict) and isinstance(rules.get("label"), str)):
            raise InputError(f"{path / provenance.FILE}: does not hold its recipe's rules; convert again with this dgq")
        found.append(f"{repo}-{rules['label']}")
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise InputError(f"--all: two artifacts would be {twice}; publish one of them alone")
    return found


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """A dgq.json that somebody else wrote, and sealed, may lack anything."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{file}: is not as this dgq writes it ({error!r}); convert again") from None


def _licence(document: Json, asked: Asked, licence: str | None) -> dict[str, Path | bytes]:
    """Its text: the artifact's own, the one given, or dgq's copy."""
    if asked.licence_file is not None:
        if LICENSE in document["files"]:
            raise InputError(
                f"--license-file {asked.licence_file}: the artifact has a {LICENSE} from its source; keep that"
            )
        try:
            return {LICENSE: read_whole(asked.licence_file, MAX_LICENSE)}
        except (OSError, ValueError) as error:
            raise InputError(f"--license-file {asked.licence_file}: not readable ({error})") from None
    text = None if LICENSE in document["files"] else licence_text(licence)
    return {} if text is None else {LICENSE: text.encode()}


def _validation(judged: Json) -> dict[str, Path | bytes]:
    """validation.json and the card's pictures; `judged` is told of these."""
    from dgq.convert.validation.plots import pictures  # brings matplotlib

    drawn = pictures(judged | {"artifacts": [judged["artifact"]]}, PLOTS)
    judged["plots"] = [{"title": title, "file": f"plot-{key}.png"} for key, (title, _) in drawn.items()]
    text = json.dumps(judged, indent=1, ensure_ascii=False) + "\n"
    return {VALIDATION: text.encode(), **{f"plot-{key}.png": image for key, (_, image) in drawn.items()}}
