"""A safetensors artifact on its way to disk: the tensors its layout makes of each weight, and what config.json says.

config.json is the source's, key for key, with `quantization_config` as its last; in modelopt's layout
hf_quant_config.json says the same in its older words. Everything else that a loader reads is copied verbatim by the
pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgq.convert.plans.plan import Plan, layout_of
from dgq.quant.files.hf_dir import read_json
from dgq.quant.files.hf_writer import HFWriter, shards
from dgq.quant.formats import bnb, modelopt, own_layout
from dgq.quant.types import Packed
from dgq.runtime.shape.names import EMBEDDING


class DirWriter:
    """Takes the plan's weights a slice at a time, in order, and writes their tensors."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._layout = layout_of(plan.recipe, {tensor.name: tensor.scheme for tensor in plan.tensors})
        self._next = dict.fromkeys(self._tensors, 0)
        self._files = HFWriter(path, shards(tensor.entries for tensor in plan.tensors))
        self.places = self._files.places

    def append(self, name: str, piece: Packed) -> None:
        """The next slice of a weight along its first axis."""
        tensor = self._tensors[name]
        start = self._next[name]
        self._next[name] += piece.shape[0]
        if len(tensor.entries) == 1:
            self.places.append(name, piece.parts[""])
            return
        for entry, part in self._layout.split(name, tensor.shape, piece, start):
            self.places.append(entry, part)

    def close(self) -> None:
        self._files.close()


def write_configs(plan: Plan, path: Path, version: str) -> None:
    """config.json and, in modelopt's layout, hf_quant_config.json."""
    config = read_json(plan.source.path / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in part.keys() & {"dtype", "torch_dtype"}:
            part[key] = "bfloat16"  # what is not quantised is stored so, whatever the source had
    config["quantization_config"] = _quantization_config(plan, version)
    _write(path / "config.json", config)
    if plan.recipe.format == "nvfp4" and plan.recipe.layout is None:
        _write(path / modelopt.HF_QUANT_CONFIG, modelopt.hf_quant_config(*_modelopt_arguments(plan), version))


def _quantization_config(plan: Plan, version: str) -> dict[str, Any]:
    if isinstance(plan.layout, own_layout.OwnLayout):
        return own_layout.quantization_config(plan.layout, version)
    if plan.recipe.format == "nvfp4":
        return modelopt.quantization_config(*_modelopt_arguments(plan), version)
    linears = {
        t.name.removesuffix(".weight"): t for t in plan.tensors if t.name in plan.source.text and len(t.shape) == 2
    }
    kept = [name for name, t in linears.items() if t.scheme.bits >= 16 and t.name != EMBEDDING]
    quantised = [name for name, t in linears.items() if t.scheme.bits < 16]
    double = any(t.scheme.name == "nf4_dq" for t in plan.tensors)
    return bnb.quantization_config(bnb.skip_patterns(kept, quantised), double)


def _modelopt_arguments(plan: Plan) -> tuple[int, bool, bool]:
    source = plan.source
    return len(source.config.layers), bool(source.vision), plan.recipe.activations is not None


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
