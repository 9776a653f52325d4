"""What an artifact or checkpoint holds, from its headers: format, schemes, sizes, sampler, provenance."""

from __future__ import annotations

from typing import Any

from dgq.convert.generate import is_artifact
from dgq.convert.plan import tally
from dgq.convert.provenance import FILE
from dgq.convert.source import Source, open_source
from dgq.quant.errors import InputError
from dgq.quant.hf_dir import FLOATS, read_json
from dgq.quant.schemes import SCHEMES
from dgq.runtime.artifact import Artifact, open_artifact
from dgq.runtime.names import gguf_name


def inspect_artifact(asked: str, revision: str | None = None) -> dict[str, Any]:
    """Check it against its config, from headers alone, and describe it. Of a Hub id only headers are fetched."""
    opened: Artifact | Source = (
        open_artifact(asked) if is_artifact(asked) else open_source(asked, revision, weights=False)
    )
    rows = _artifact_rows(opened) if isinstance(opened, Artifact) else _source_rows(opened)
    schemes = tally((scheme, numel, nbytes) for _, scheme, numel, nbytes in rows)
    params = sum(group["params"] for group in schemes.values())
    below = sum(group["params"] for name, group in schemes.items() if SCHEMES[name].bits < 16)
    config, generation = opened.config, opened.generation
    return {
        "path": asked,
        "kind": opened.kind if isinstance(opened, Artifact) else "safetensors",
        "file": opened.file.name if isinstance(opened, Artifact) else opened.where.name,
        "params": params,
        "bytes": sum(group["bytes"] for group in schemes.values()),
        "quantized_share": round(below / params, 6),
        "by_scheme": schemes,
        "model": {
            "layers": len(config.layers),
            "hidden": config.hidden,
            "experts": config.experts,
            "top_k": config.top_k,
            "vocab": config.vocab,
            "canvas": config.canvas,
            "window": config.window,
            "context": config.context,
        },
        "sampler": vars(generation.sampler) | {"eos_ids": list(generation.eos_ids)},
        "provenance": _provenance(opened) if isinstance(opened, Artifact) else None,
        "tensors": {name: scheme for name, scheme, _, _ in rows},
    }


Row = tuple[str, str, int, int]  # name in the file, scheme, elements, bytes


def _artifact_rows(artifact: Artifact) -> list[Row]:
    rows = []
    for name in artifact.weights:
        packed = artifact.weights[name]
        rows.append((gguf_name(name) or name, packed.scheme.name, packed.numel, packed.nbytes))
    return rows


def _source_rows(source: Source) -> list[Row]:
    return [(name, FLOATS[spec.dtype], spec.numel, spec.stop - spec.start) for name, spec in source.text.items()]


def _provenance(artifact: Artifact) -> dict[str, Any] | None:
    """What dgq.json beside the file says of it; None without one, or if it does not list this file."""
    file = artifact.file.parent / FILE
    if not file.is_file():
        return None
    document = read_json(file)
    kept = {key: document.get(key) for key in ("dgq", "recipe", "effort", "source", "imatrix", "dropped", "files")}
    if not all(isinstance(kept[key] or {}, dict) for key in ("source", "imatrix", "dropped", "files")):
        raise InputError(f"{file}: damaged (source, imatrix, dropped and files must be objects)")
    return kept if artifact.file.name in (kept.pop("files") or {}) else None
