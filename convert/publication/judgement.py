"""What a report of `dgq validate` says of the very files that are to be published.

report.json ── files by their SHA-256 ──> Judgement.result     typed, for pictures and card
                                     └──> Judgement.document   validation.json: without paths and texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from dgq.convert.source.hashes import describe
from dgq.convert.validation.report.reading import read_result
from dgq.convert.validation.report.result import ArtifactResult, ValidationResult
from dgq.convert.write import provenance
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json

Json = dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """A report's part of one artifact. result: the whole with this artifact alone; document: what is published of it,
    as JSON: {…, "artifact", "reference"}, and "plots" as soon as these are drawn."""

    result: ValidationResult
    document: Json

    @property
    def artifact(self) -> ArtifactResult:
        return self.result.artifacts[0]


def find_judgement(reports: Sequence[Path], path: Path, document: Json) -> Judgement | None:
    """What the first report that judges the artifact in `path` says of it; None without reports. document: its
    dgq.json. InputError if no report judges these files, or a file is no report."""
    mine = document["files"] | {provenance.FILE: describe(path / provenance.FILE)}
    for report in reports:
        data = read_json(report)
        artifacts = data.get("artifacts")
        if not isinstance(artifacts, list) or not isinstance(data.get("reference"), dict):
            raise InputError(f"{report}: is no report.json of dgq validate")
        for number, one in enumerate(artifacts):
            judged = one.get("files") if isinstance(one, dict) else None
            if isinstance(judged, dict) and provenance.FILE in judged and all(mine.get(n) == judged[n] for n in judged):
                return _judgement(report, data, number, document)
    if reports:
        raise InputError(
            f"{', '.join(map(str, reports))}: none judges the files in {path}, by their SHA-256; validate this artifact"
        )
    return None


def _judgement(report: Path, data: Json, number: int, document: Json) -> Judgement:
    whole = read_result(report, data)
    return Judgement(replace(whole, artifacts=whole.artifacts[number : number + 1]), _public(data, number, document))


def _public(report: Json, number: int, document: Json) -> Json:
    """The report without what is only the user's: paths, and texts."""
    kept = {key: value for key, value in report.items() if key not in ("artifacts", "texts", "ok")}
    reference = report["reference"]
    name = reference["name"]
    if name != document["source"]["repository"]:
        name = PurePath(name).name
    names = [PurePath(name).name for name in report["questions"]["names"]]
    return kept | {
        "questions": report["questions"] | {"names": names},
        "reference": reference | {"name": name},
        "artifact": {key: value for key, value in report["artifacts"][number].items() if key != "path"},
    }
