"""What an artifact must be before it is published: quantised, with the source's own template and sampler, with a
licence, and judged by a report that names its very bytes.

    artifact, dgq.json, report  ->  a line for each check that fails

Everything here is read from the artifact; what only the Hub can say of the source is in convert/publication/upload.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from dgq.convert.plans.formats import written_format
from dgq.convert.publication.judgement import Judgement
from dgq.convert.source import release
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.gguf_weights import GGUFWeights
from dgq.runtime.shape.names import VISION

Json = dict[str, Any]
LICENSE = "LICENSE"


def problems(
    artifact: Artifact, document: Json, judgement: Judgement | None, licence: str | None, licence_file: str | None
) -> list[str]:
    """A line for each check that fails. The artifact's files have passed check_files(); document: its dgq.json."""
    lines = [*_share(artifact, document), *_upstream(document), *_local_paths(artifact)]
    if licence is None:
        lines.append("licence: none is known for the source; give --license")
    if licence_file is None:
        lines.append(
            "licence: its text is not here; put it beside the source before converting, or give --license-file"
        )
    if judgement is None:
        lines.append("validation: no report; give --report, made by dgq validate")
    elif judgement.artifact.ok is not True:
        broken = [check.limit for check in judgement.artifact.gate if check.ok is False]
        lines.append(f"validation: the gate is broken: {', '.join(broken)}")
    return lines


def _share(artifact: Artifact, document: Json) -> Iterator[str]:
    """Routed experts that are not quantised, and more parameters in 16 bits than the recipe allows."""
    stored = artifact.weights.everything()
    plain = [name for name, weight in stored.items() if ".experts." in name and stored_bits(weight.scheme) >= 16]
    if plain:
        yield f"share quantised: {len(plain)} weights of routed experts are in 16 bits ({plain[0]}, …)"
    apart = written_format(document).one_file  # its tower is a file of its own, which no recipe decides on
    asked = [weight for name, weight in stored.items() if not (apart and name.startswith(VISION))]
    share = sum(w.numel for w in asked if stored_bits(w.scheme) < 16) / sum(w.numel for w in asked)
    rules = document.get("recipe_rules")
    if rules is None:
        yield "recipe: dgq.json does not hold its rules; convert again with this dgq"
    elif share < 1 - rules["max_16bit_share"]:
        yield f"share quantised: {share:.2%}, and the recipe promises {1 - rules['max_16bit_share']:.2%}"


def _upstream(document: Json) -> Iterator[str]:
    """The files that exporters lose or let grow stale; where the release is the source, they must be the release's."""
    files, source = document["files"], document["source"]
    is_release = (source["repository"], source["revision"]) == (release.REPOSITORY, release.REVISION)
    for name in (release.SAMPLER, release.TEMPLATE):
        if name not in files:
            yield f"{name}: is not in the artifact; the source had none"
    for name, wanted in release.FILES.items() if is_release else ():
        entry = files.get(name)
        if entry is None or (name == release.CONFIG and not written_format(document).one_file):
            continue  # a directory of safetensors says in config.json what is quantised
        if wanted.bytes not in (None, entry["bytes"]) or entry["sha256"] != wanted.sha256:
            where = f"{release.REPOSITORY} at {release.REVISION[:12]}"
            yield f"{name}: is not that of {where}, which the artifact names as its source"


def _local_paths(artifact: Artifact) -> Iterator[str]:
    """Absolute paths in a .gguf's metadata, which say how the machine is laid out that made it."""
    if isinstance(artifact.weights, GGUFWeights):
        for key, value in artifact.weights.reader.metadata.items():
            if (
                isinstance(value, str)
                and key.startswith(("general.", "quantize.", "dgq."))
                and PurePath(value).is_absolute()
            ):
                yield f"{artifact.file.name}: {key} tells a path of your machine; convert again with a relative one"


def licence_of(document: Json, given: str | None) -> str | None:
    """The source's licence by the Hub's name for it: the one given, or the released model's."""
    return given or (release.LICENSE if document["source"]["repository"] == release.REPOSITORY else None)
