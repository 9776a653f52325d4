"""What an artifact must be before it is published: whole, quantised, with the source's own template and sampler, with a
licence, and judged: by a report that names its very bytes.

Everything here is read from the artifact; what only the Hub can say of the source is in convert/publication/upload.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from dgq.convert.source.hashes import describe
from dgq.convert.write import provenance
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.weights import GGUFWeights
from dgq.runtime.shape.names import VISION

Json = dict[str, Any]
RELEASE = ("google/diffusiongemma-26B-A4B-it", "f7f5b7f5fa82ffc52addd066915886d497f5517b")
LICENSES = {RELEASE[0]: "apache-2.0"}
TEMPLATE, SAMPLER, LICENSE = "chat_template.jinja", "generation_config.json", "LICENSE"

# Of RELEASE: bytes, and how SHA-256 begins and ends. The template's is known in short only, which is 48 bits of it.
RELEASED = {
    SAMPLER: (None, "99334f763c3dbe8b161aeaca1c150a05344299fda2d2e4a0e1d342c744461200", ""),
    TEMPLATE: (18575, "9aeb7eac", "61bf"),
    "config.json": (None, "13b11d2fe87302cc2332c64eb9eb4ac305d9b8a123ffe9c5cb5b1920fc70c506", ""),
}  # fmt: skip


def problems(
    artifact: Artifact, document: Json, judged: Json | None, licence: str | None, licence_file: str | None
) -> list[str]:
    """A line for each check that fails; the artifact has passed `verify`."""
    found = [*_share(artifact, document), *_upstream(document), *_local_paths(artifact)]
    if licence is None:
        found.append("licence: none is known for the source; give --license")
    if licence_file is None:
        found.append(
            "licence: its text is not here; put it beside the source before converting, or give --license-file"
        )
    if judged is None:
        found.append("validation: no report; give --report, made by dgq validate")
    elif judged["artifact"]["ok"] is not True:
        broken = [line["limit"] for line in judged["artifact"]["gate"] if line["ok"] is False]
        found.append(f"validation: the gate is broken: {', '.join(broken)}")
    return found


def _share(artifact: Artifact, document: Json) -> Iterator[str]:
    """No routed expert left out in silence, and no more in 16 bits than the recipe allows."""
    stored = artifact.weights.everything()
    plain = [name for name, weight in stored.items() if ".experts." in name and stored_bits(weight.scheme) >= 16]
    if plain:
        yield f"share quantised: {len(plain)} weights of routed experts are in 16 bits ({plain[0]}, …)"
    apart = document["format"] == "gguf"  # its tower, which no recipe decides on
    asked = [weight for name, weight in stored.items() if not (apart and name.startswith(VISION))]
    share = sum(w.numel for w in asked if stored_bits(w.scheme) < 16) / sum(w.numel for w in asked)
    rules = document.get("recipe_rules")
    if rules is None:
        yield "recipe: dgq.json does not hold its rules; convert again with this dgq"
    elif share < 1 - rules["max_16bit_share"]:
        yield f"share quantised: {share:.2%}, and the recipe promises {1 - rules['max_16bit_share']:.2%}"


def _upstream(document: Json) -> Iterator[str]:
    """The files that exporters lose or let grow stale, against the release's where it is the source."""
    files, source = document["files"], document["source"]
    known = RELEASED if (source["repository"], source["revision"]) == RELEASE else {}
    for name in (SAMPLER, TEMPLATE):
        if name not in files:
            yield f"{name}: is not in the artifact; the source had none"
    for name, (size, head, tail) in known.items():
        said = files.get(name)
        if said is None or (name == "config.json" and document["format"] != "gguf"):  # others add what is quantised
            continue
        if size not in (None, said["bytes"]) or not (said["sha256"].startswith(head) and said["sha256"].endswith(tail)):
            yield f"{name}: is not that of {RELEASE[0]} at {RELEASE[1][:12]}, which the artifact names as its source"


def _local_paths(artifact: Artifact) -> Iterator[str]:
    if isinstance(artifact.weights, GGUFWeights):
        for key, value in artifact.weights.reader.metadata.items():
            if (
                isinstance(value, str)
                and key.startswith(("general.", "quantize.", "dgq."))
                and PurePath(value).is_absolute()
            ):
                yield f"{artifact.file.name}: {key} tells a path of your machine; convert again with a relative one"


def judgement(reports: Sequence[Path], path: Path, document: Json) -> Json | None:
    """What a report says of these very files, without paths and texts: {…, "artifact", "reference"}; None without
    reports. InputError if none of them judges them."""
    mine = document["files"] | {provenance.FILE: describe(path / provenance.FILE)}
    for report in reports:
        said = read_json(report)
        artifacts = said.get("artifacts")
        if not isinstance(artifacts, list) or not isinstance(said.get("reference"), dict):
            raise InputError(f"{report}: is no report.json of dgq validate")
        for one in artifacts:
            judged = one.get("files") if isinstance(one, dict) else None
            if isinstance(judged, dict) and provenance.FILE in judged and all(mine.get(n) == judged[n] for n in judged):
                try:
                    return _told(said, one, document)
                except (KeyError, TypeError, AttributeError) as error:
                    raise InputError(f"{report}: lacks {error}; it is no report.json of this dgq's validate") from None
    if reports:
        raise InputError(
            f"{', '.join(map(str, reports))}: none judges the files in {path}, by their SHA-256; validate this artifact"
        )
    return None


def _told(report: Json, one: Json, document: Json) -> Json:
    """One artifact's part, with nothing in it that is only the user's: paths, and texts."""
    kept = {key: value for key, value in report.items() if key not in ("artifacts", "texts", "ok")}
    reference = report["reference"]
    name = reference["name"]
    if name != document["source"]["repository"]:
        name = PurePath(name).name
    names = [PurePath(name).name for name in report["questions"]["names"]]
    return kept | {
        "questions": report["questions"] | {"names": names},
        "reference": reference | {"name": name},
        "artifact": {key: value for key, value in one.items() if key != "path"},
    }


def licence_of(document: Json, given: str | None) -> str | None:
    """By the Hub's name for it."""
    return given or LICENSES.get(document["source"]["repository"] or "")
