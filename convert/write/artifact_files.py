"""An artifact's files on their way to disk: weights arrive a slice at a time, in any order of weights.

    GGUFFiles        NAME-LABEL.gguf, and the vision tower's mmproj file
    DirectoryFiles   *.safetensors, config.json, and what else the format's loaders read

config.json is the source's, key for key, with `quantization_config` as its last. Everything else that a loader reads is
copied verbatim.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from dgq.convert.plans.formats import Directory
from dgq.convert.plans.gguf_metadata import metadata
from dgq.convert.plans.mmproj import metadata as vision_metadata
from dgq.convert.plans.plan import Plan
from dgq.quant.files.gguf_file import GGUFWriter
from dgq.quant.files.hf_dir import BOM, read_json
from dgq.quant.files.hf_writer import HFWriter, shards
from dgq.quant.files.imatrix import Imatrix
from dgq.quant.files.places import Places
from dgq.quant.types import Packed
from dgq.runtime.files import mmproj
from dgq.runtime.shape.config import GGUF_ARCH

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)


class ArtifactFiles(ABC):
    """The files of one plan. open() places every tensor; then append() its slices, close(), and finish()."""

    main: str = ""  # the file to open, below the artifact's directory; "" is the directory itself
    notices: tuple[str, ...] = ()
    places: Places

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._next = dict.fromkeys(self._tensors, 0)

    @abstractmethod
    def open(self, path: Path) -> None:
        """Write headers into the directory `path`; of files that are there already the tensors' bytes stay."""

    def append(self, name: str, piece: Packed) -> None:
        """The next slice of a weight along its first axis."""
        tensor, start = self._tensors[name], self._next[name]
        self._next[name] += piece.shape[0] if piece.shape else 1
        for stored, part in self._plan.split(tensor, piece, start):
            self.places.append(stored, part)

    @abstractmethod
    def close(self) -> None:
        """RuntimeError if a tensor is incomplete."""

    @abstractmethod
    def finish(self, path: Path, version: str) -> None:
        """Write the small files, once those that the pipeline copies are there."""


class GGUFFiles(ArtifactFiles):
    """A text model's .gguf, and its vision tower's."""

    def __init__(self, plan: Plan, version: str, imatrix: Imatrix | None) -> None:
        """InputError for a tokenizer or a vision tower that a GGUF cannot describe."""
        super().__init__(plan)
        self.main = plan.files[0]
        self._keys = metadata(plan, version, imatrix)
        self._tower_keys = vision_metadata(plan.source, version) if plan.mmproj else {}
        if "tokenizer.ggml.mask_token_id" not in self._keys:
            names_none = "its tokenizer names no mask token; llama.cpp's llama-diffusion-cli stops without one"
            self.notices = (f"{plan.source.path}: {names_none}",)

    def open(self, path: Path) -> None:
        text = {t.name: (t.shape, t.scheme) for t in self._plan.text}
        self._writer = GGUFWriter(path / self.main, GGUF_ARCH, self._keys, text)
        self.places = self._writer.places
        if self._plan.mmproj:
            tower = {t.name: (t.shape, t.scheme) for t in self._plan.mmproj}
            GGUFWriter(path / self._plan.files[1], mmproj.ARCH, self._tower_keys, tower, self.places)

    def close(self) -> None:
        self._writer.close()

    def finish(self, path: Path, version: str) -> None:
        """A GGUF says everything itself. config.json loses what the source's files contradict."""
        if (config := self._plan.source.plain_config()) is not None:
            _write(path / "config.json", config)


class DirectoryFiles(ArtifactFiles):
    """A directory of safetensors."""

    def __init__(self, plan: Plan, form: Directory) -> None:
        super().__init__(plan)
        self._form = form

    def open(self, path: Path) -> None:
        self._writer = HFWriter(path, shards(tensor.entries for tensor in self._plan.tensors))
        self.places = self._writer.places

    def close(self) -> None:
        self._writer.close()

    def finish(self, path: Path, version: str) -> None:
        plan = self._plan
        source, activations = plan.source, plan.recipe.activations is not None
        config = source.plain_config() or read_json(source.path / "config.json")
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in part.keys() & {"dtype", "torch_dtype"}:
                part[key] = "bfloat16"  # what is not quantised is stored so, whatever the source had
        config["quantization_config"] = self._form.quantization_config(source, plan.tensors, activations, version)
        _write(path / "config.json", config)
        for name, content in self._form.other_configs(source, activations, version).items():
            _write(path / name, content)


def artifact_files(plan: Plan, version: str, imatrix: Imatrix | None) -> GGUFFiles | DirectoryFiles:
    """The files of the plan's format. InputError for a source that they cannot describe."""
    if isinstance(plan.format, Directory):
        return DirectoryFiles(plan, plan.format)
    return GGUFFiles(plan, version, imatrix)


def copy_small_files(source: Path, out: Path) -> None:
    """Copy those of COPIED that are there. A JSON file loses the byte order mark that other loaders stumble over."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            if name.endswith(".json") and (raw := (out / name).read_bytes()).startswith(BOM):
                (out / name).write_bytes(raw.removeprefix(BOM))


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
