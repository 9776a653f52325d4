"""Open whatever dgq runs: a checkpoint directory, a GGUF directory, or a bare .gguf.

    DIR/config.json, *.safetensors, tokenizer     kind "safetensors"     config and tokenizer from their files
    DIR/config.json, one *.gguf, tokenizer        kind "gguf"            the same, weights from the .gguf
    file.gguf                                     kind "gguf"            everything from its metadata

A .gguf beside safetensors is opened by its own name. Opening reads headers only: configs are parsed and a .gguf's
tensors are held against them, by name and shape. Bytes are read when `load()` builds the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dgq.quant.errors import InputError
from dgq.quant.gguf_file import GGUFReader
from dgq.quant.hf_dir import HFDir
from dgq.quant.types import Packed
from dgq.runtime.config import ModelConfig
from dgq.runtime.names import ROPE_FREQS, check_tensors, expected_tensors, gguf_name, hf_name
from dgq.runtime.settings import GenerationConfig

if TYPE_CHECKING:
    from dgq.runtime.model import Model
    from dgq.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. weights: canonical name -> Packed, read lazily; file: the .gguf or the directory."""

    kind: str
    path: Path
    file: Path
    config: ModelConfig
    generation: GenerationConfig
    weights: Mapping[str, Packed]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer, or the one rebuilt from a bare .gguf. InputError if it is missing or broken."""
        from dgq.runtime.tokenizer import Tokenizer

        if self.path.is_dir():
            return Tokenizer.from_dir(self.path)
        assert isinstance(self.weights, GGUFWeights)
        return Tokenizer.from_gguf(self.weights.reader.metadata, str(self.path))

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Model:
        """The model on a device; dtype as for Model. InputError if tensors don't fit the config."""
        from dgq.runtime.model import Model

        return Model(self.config, self.weights, device, dtype, source=str(self.file))


class GGUFWeights(Mapping[str, Packed]):
    """A .gguf's tensors under their canonical names, checked against the config when made."""

    def __init__(self, reader: GGUFReader, config: ModelConfig) -> None:
        """InputError naming the .gguf's own tensor: missing, unknown, renamed, mis-shaped, or another RoPE."""
        self.reader = reader
        self._names: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for own in reader:
            if own != ROPE_FREQS:
                name = hf_name(own) or own  # an unknown name stays as it is, and check_tensors refuses it
                self._names[name] = own
                shapes[name] = reader.shape(own)
        expected = expected_tensors(config)
        check_tensors(shapes, expected, str(reader.path), shown=lambda name: gguf_name(name) or name)
        _check_rope(reader, config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Packed:
        return self.reader[self._names[name]]


def open_artifact(path: Path | str) -> Artifact:
    """Open a directory or a .gguf. InputError, one line, for everything that is wrong with it."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: expected a directory or a .gguf file")
        return _open_gguf(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and not (path / "config.json").is_file():
        raise InputError(
            f"{path}: has no config.json; name the file, {ggufs[0].name}, to open it without its directory"
        )
    shards = any(path.glob("*.safetensors"))
    if len(ggufs) > 1 and not shards:
        raise InputError(f"{path}: holds {len(ggufs)} .gguf files ({ggufs[0].name}, {ggufs[1].name}, …); name one")
    if not ggufs and not shards:
        raise InputError(f"{path}: holds neither safetensors nor a .gguf")
    config = ModelConfig.from_file(path / "config.json")
    generation = GenerationConfig.from_file(path / "generation_config.json", config)
    if not shards:
        reader = GGUFReader(ggufs[0])
        _check_agreement(config, ModelConfig.from_gguf(reader.metadata, str(ggufs[0])), path, ggufs[0])
        return Artifact("gguf", path, ggufs[0], config, generation, GGUFWeights(reader, config))
    return Artifact("safetensors", path, path, config, generation, HFDir(path))


def _open_gguf(path: Path) -> Artifact:
    reader = GGUFReader(path)
    config = ModelConfig.from_gguf(reader.metadata, str(path))
    generation = GenerationConfig.from_gguf(reader.metadata, config, str(path))
    return Artifact("gguf", path, path, config, generation, GGUFWeights(reader, config))


def _check_agreement(ours: ModelConfig, files: ModelConfig, path: Path, file: Path) -> None:
    """config.json and the .gguf's own metadata say the same of the model (floats to float32's precision)."""
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(ours, field.name), getattr(files, field.name)
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
        if not same and field.name not in ("eos_ids", "pad_id", "rope_partial"):  # not in the metadata, or not as such
            raise InputError(
                f"{path / 'config.json'}: {field.name} is {a}, but {file.name} says {b}; one is not the other's"
            )


def _check_rope(reader: GGUFReader, config: ModelConfig) -> None:
    """rope_freqs.weight divides full layers' frequencies: 1 for angles that turn, 1e30 for those that stand still."""
    half = config.layers[-1].head_dim // 2
    if ROPE_FREQS not in reader:
        raise InputError(f"{reader.path}: tensor {ROPE_FREQS} is missing")
    factors = reader[ROPE_FREQS].dequantize().flatten()
    turning = int((factors == 1).sum())
    if len(factors) != half or turning != config.rope_angles or not bool((factors[turning:] >= 1e29).all()):
        raise InputError(
            f"{reader.path}: tensor {ROPE_FREQS} lets {turning} of {len(factors)} angles turn, the config says "
            f"{config.rope_angles} of {half}"
        )
