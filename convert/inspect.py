"""What an artifact or checkpoint holds, from its headers: format, schemes, sizes, sampler, provenance."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dgq.convert.generate import open_model
from dgq.convert.provenance import FILE
from dgq.quant.hf_dir import read_json
from dgq.runtime.artifact import Artifact, GGUFWeights
from dgq.runtime.names import gguf_name


def inspect_artifact(asked: str) -> dict[str, Any]:
    """Open it as the runtime would (so it is checked against its config) and describe it."""
    artifact = open_model(asked)
    schemes = _schemes(artifact)
    tensors, params, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for _, scheme, numel, size in schemes:
        tensors[scheme] += 1
        params[scheme] += numel
        nbytes[scheme] += size
    total = params.total()
    below = sum(numel for name, numel in params.items() if name not in ("bf16", "f16", "f32"))
    config, generation = artifact.config, artifact.generation
    return {
        "path": asked,
        "kind": artifact.kind,
        "file": artifact.file.name,
        "params": total,
        "bytes": nbytes.total(),
        "quantized_share": round(below / total, 6),
        "by_scheme": {s: {"tensors": tensors[s], "params": params[s], "bytes": n} for s, n in nbytes.most_common()},
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
        "provenance": _provenance(artifact),
        "tensors": {name: scheme for name, scheme, _, _ in schemes},
    }


def _schemes(artifact: Artifact) -> list[tuple[str, str, int, int]]:
    """(name in the file, scheme, elements, bytes) of every text tensor."""
    rows = []
    for name in artifact.weights:
        packed = artifact.weights[name]
        own = (gguf_name(name) or name) if isinstance(artifact.weights, GGUFWeights) else name
        rows.append((own, packed.scheme.name, packed.numel, packed.nbytes))
    return rows


def _provenance(artifact: Artifact) -> dict[str, Any] | None:
    file = (artifact.path if artifact.path.is_dir() else artifact.path.parent) / FILE
    if not file.is_file():
        return None
    document = read_json(file)
    return {key: document.get(key) for key in ("dgq", "recipe", "effort", "source", "imatrix", "dropped")}
