"""`dgq inspect`: what an artifact, a checkpoint or STATS hold, from headers alone.

headers + config.json + dgq.json  ->  format, schemes, sizes, shape, sampler, origin, remarks, each tensor's scheme
STATS                             ->  what they were made of, and how many tokens each expert saw
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgq.convert.calibration.stats import counted
from dgq.convert.plans.tensors import tally
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.difference import Show, difference
from dgq.convert.source.hub import fetch_artifact, is_hub_id
from dgq.convert.source.models import is_artifact, published
from dgq.convert.verification.template import template_remarks
from dgq.convert.write.provenance import FILE, coverage_of
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.quant.formats.own_layout import ONLY_DGQ
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.weights import DirWeights, Weights
from dgq.runtime.shape.names import VISION
from dgq.runtime.shape.settings import sampler_notices


def inspect(
    path: str, revision: str | None = None, base: str | None = None, show: Show | None = None
) -> dict[str, Any]:
    """Describe an artifact, a checkpoint or STATS, by headers alone, as `dgq inspect --json` prints it.

    path: a file, a directory, `tiny` or USER/NAME on the Hub at `revision`. Of a checkpoint on the Hub only headers are
    fetched; of an artifact there everything, into the cache, where `run` and `verify` find it. InputError if it is not
    what its config says. STATS are told by is_statistics(). base: what a checkpoint was fine-tuned from, a directory or
    a Hub id: all weights of both are read and compared, into "difference"; show hears of the progress.
    """
    if base is not None:
        source = open_compared(path, revision)
        return _described(path, source) | {"difference": difference(source, open_source(base), show).to_json()}
    if Path(path).is_file() and (statistics := counted(Path(path))) is not None:
        return statistics
    return _described(path, _opened(path, revision))


def open_compared(path: str, revision: str | None) -> Source:
    """A checkpoint for --base. InputError for STATS and what is quantised."""
    if Path(path).is_file() or is_artifact(path):
        raise InputError(f"--base: {path} is no BF16 checkpoint; `dgq verify --against SRC` compares an artifact")
    return open_source(path, revision)


def is_statistics(content: dict[str, Any]) -> bool:
    """Whether inspect() was given STATS."""
    return "coverage" in content


def _opened(path: str, revision: str | None) -> Artifact | Source:
    if is_artifact(path):
        return open_artifact(path)
    if is_hub_id(path) and (small := published(path, revision)) is not None:
        return open_artifact(fetch_artifact(path, small.revision).path)
    return open_source(path, revision, weights=False)


def _described(path: str, opened: Artifact | Source) -> dict[str, Any]:
    weights: Weights = opened.weights if isinstance(opened, Artifact) else opened
    rows = _rows(weights)
    schemes = tally((scheme, numel, nbytes) for _, scheme, numel, nbytes, _ in rows)
    params = sum(group["params"] for group in schemes.values())
    below = sum(group["params"] for name, group in schemes.items() if stored_bits(name) < 16)
    config, generation = opened.config, opened.generation
    return {
        "path": path,
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
        "provenance": provenance_of(opened) if isinstance(opened, Artifact) else None,
        "calibration": coverage_of(opened) if isinstance(opened, Artifact) else None,
        "opens_in": ONLY_DGQ if weights.only_dgq else None,
        "remarks": [
            *weights.remarks,
            *sampler_notices(opened.path, generation),
            *_transformers(opened),
            *template_remarks(opened),
        ],
        "vision": _vision(weights),
        "stored_tensors": sum(row[-1] for row in rows),
        "tensors": {row[0]: row[1] for row in rows},
    }


def _vision(weights: Weights) -> dict[str, int] | None:
    """Parameters and bytes of the vision tower; None without one."""
    tower = [stored for name, stored in weights.everything().items() if name.startswith(VISION)]
    if not tower:
        return None
    return {"params": sum(one.numel for one in tower), "bytes": sum(one.nbytes for one in tower)}


Row = tuple[str, str, int, int, int]  # name in the file, scheme, elements, bytes, tensors


def _rows(weights: Weights) -> list[Row]:
    return [
        (weights.own_name(name), stored.scheme, stored.numel, stored.nbytes, stored.tensors)
        for name, stored in weights.everything().items()
    ]


def _transformers(opened: Artifact | Source) -> tuple[str, ...]:
    """A remark for users of transformers, if it cannot open the packed weights by itself."""
    weights = opened.weights if isinstance(opened, Artifact) else None
    if isinstance(weights, DirWeights) and weights.is_mixed and weights.is_modelopts:
        return ("transformers gives it WRONG weights and only warns; after `import dgq.runtime.hf` it raises",)
    if not isinstance(opened, Artifact) or (without := opened.weights.without_import) is None:
        return ()
    return (f"transformers opens it after `import dgq.runtime.hf`; without that line it {without}",)


def provenance_of(artifact: Artifact) -> dict[str, Any] | None:
    """What dgq.json beside the weights says of them; None without one, or if it does not list their files. InputError
    if it is damaged."""
    file = artifact.weights.files[0].parent / FILE
    if not file.is_file():
        return None
    document = read_json(file)
    kept = {key: document.get(key) for key in ("dgq", "recipe", "effort", *_SOUND)}
    for key, sound in _SOUND.items():
        entry = kept[key]
        if entry is not None and not (isinstance(entry, dict) and sound(entry)):
            raise InputError(f"{file}: its {key} is not what dgq writes there; damaged")
    adapters = document.get("adapters") or []
    if not isinstance(adapters, list) or not all(
        _holds(one, object) and isinstance(one.get("name"), str) for one in adapters
    ):
        raise InputError(f"{file}: its adapters are not what dgq writes there; damaged")
    kept["adapters"] = [one["name"] for one in adapters]
    listed = kept.pop("files") or {}
    return kept if all(weights.name in listed for weights in artifact.weights.files) else None


def _is_scales(entry: dict[str, Any]) -> bool:
    if entry.get("method") != "calibrated":
        return entry.get("method") == "given" and isinstance(entry.get("value"), float)
    amax = entry.get("amax")
    return isinstance(amax, dict) and bool(amax) and all(_holds(side, float) for side in amax.values())


def _holds(entry: Any, kind: type) -> bool:
    return isinstance(entry, dict) and bool(entry) and all(isinstance(value, kind) for value in entry.values())


# What must be true of dgq.json's objects before anybody reads on in them.
_SOUND: dict[str, Callable[[dict[str, Any]], bool]] = {
    "source": lambda entry: not entry.get("repository") or "revision" in entry,
    "imatrix": lambda entry: isinstance(entry.get("name"), str),
    "input_scales": _is_scales,
    "files": lambda entry: True,
}
