"""dgq.json: where an artifact comes from and what it is, checkable file by file.

It lists the source (repository, revision, SHA-256 of every file), the recipe and its rules, the versions of the
libraries that took part, each tensor's scheme, the share of parameters quantised, and the SHA-256 of every other file
of the artifact. Its last key is the SHA-256 of its own text without that key. No dates and no local paths: the same
input gives the same bytes. made_on names the device where bytes may depend on it: what was calibrated; "cpu" or "cuda".
Elsewhere null. On a CPU they do not depend on the number of threads; one with other instructions (AVX2, AVX-512) may
add up in another order.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dgq.convert.calibration.stats import FLOOR
from dgq.convert.plans.plan import Plan
from dgq.convert.source.hashes import describe, dgq_version, digest
from dgq.convert.source.hub import PROVENANCE
from dgq.convert.write.settings import ConversionSettings
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact

FILE = PROVENANCE
LIBRARIES = ("torch", "numpy", "safetensors", "gguf", "libggml-python")  # whose code makes or writes the bytes


def document(
    plan: Plan,
    settings: ConversionSettings,
    input_scales: dict[str, Any] | None,
    sources: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    """The content of dgq.json. input_scales: how they were found. sources, files: file name -> {"bytes", "sha256"}, of
    the source and of the artifact."""
    where, stats, imatrix = plan.source.where, settings.stats, settings.imatrix
    calibrated = stats is not None or (input_scales or {}).get("method") == "calibrated"
    content: dict[str, Any] = {
        "dgq": dgq_version(),
        "format": plan.recipe.format,
        "recipe": plan.recipe.name,
        "recipe_rules": plan.recipe.model_dump(mode="json"),
        "effort": settings.effort,
        "source": {"name": where.name, "repository": where.repo, "revision": where.revision, "files": sources},
        "adapters": [adapter.about for adapter in plan.source.adapters],
        "notices": list(plan.notices),
        "params": plan.params,
        "quantized_params": plan.quantized_params,
        "quantized_share": round(plan.quantized_share, 6),
        "imatrix": None,
        "input_scales": input_scales,
        "calibration": stats.describe() if stats else None,
        "made_on": settings.device if calibrated else None,
        "libraries": {name: version(name) for name in LIBRARIES},
        "tensors": {tensor.name: tensor.scheme.name for tensor in plan.tensors},
        "files": files,
    }
    if imatrix is not None:
        path = Path(imatrix.file)
        content["imatrix"] = {"name": path.name, "datasets": list(imatrix.datasets), **describe(path)}
    return sealed(content)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the SHA-256 of itself as its last key."""
    return content | {"sha256": digest(text(content))}


def text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def coverage_of(artifact: Artifact) -> dict[str, Any] | None:
    """The "starved" experts ("layer.expert" -> tokens) that an artifact's calibration saw in fewer than "floor" tokens.
    None without a dgq.json of its files, or if nothing was calibrated. InputError for one that dgq does not write."""
    file = artifact.weights.files[0].parent / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    files, calibration = content.get("files"), content.get("calibration")
    if calibration is None or not isinstance(files, dict) or any(f.name not in files for f in artifact.weights.files):
        return None
    starved = calibration.get("starved") if isinstance(calibration, dict) else None
    if not isinstance(starved, dict) or not all(type(seen) is int for seen in starved.values()):
        raise InputError(f"{file}: its calibration is not what dgq writes there; damaged")
    return {"floor": FLOOR, "starved": starved}
