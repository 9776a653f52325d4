"""Opens everything that dgq runs: a checkpoint directory, an artifact directory, or a bare .gguf.

    DIR/config.json, *.safetensors, tokenizer     kind "safetensors"     config and tokenizer from their files
    the same, quantised as its config.json says   kind "nvfp4", "bnb4",  modelopt's, compressed-tensors', bitsandbytes'
                                                  "fp8"
    DIR/config.json, one *.gguf, tokenizer        kind "gguf"            the same, weights from the .gguf (or its parts)
    file.gguf                                     kind "gguf"            everything from its metadata

A .gguf beside safetensors is opened by its own name. A .gguf's vision tower is the mmproj*.gguf beside it, opened with
its directory, or with the bare file when an image is given. Opening reads headers only: configs are parsed and a
.gguf's tensors are held against them, by name and shape. Bytes are read when `load()` builds the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader, is_later_part
from dgq.quant.files.hf_dir import HFDir, read_json
from dgq.quant.formats.bnb import BitsAndBytes
from dgq.quant.formats.bnb_experts import experts_apart
from dgq.quant.formats.compressed_tensors import CompressedTensors
from dgq.quant.formats.fp8_groups import Mixed
from dgq.quant.formats.nvfp4_modules import NVFP4Modules, fitted
from dgq.quant.types import Layout
from dgq.runtime.adapters.adapter import Adapter
from dgq.runtime.files.canonical import canonical, canonical_packed, index_notices, stored_tensors
from dgq.runtime.files.folders import refuse_other
from dgq.runtime.files.gguf_weights import GGUFWeights
from dgq.runtime.files.mmproj import ARCH, Mmproj, find_mmproj, is_mmproj, only_mmproj
from dgq.runtime.files.quantization import quantization, scale_remarks, stale_declaration
from dgq.runtime.files.tied import TiedDir
from dgq.runtime.files.weights import DirWeights, Weights
from dgq.runtime.shape.config import ModelConfig, early_names
from dgq.runtime.shape.names import expected_tensors
from dgq.runtime.shape.settings import GenerationConfig, sampler_notices
from dgq.runtime.shape.vision import causal_images, expected_vision, gguf_attention

if TYPE_CHECKING:
    from dgq.runtime.files.images import Tokens, Vision
    from dgq.runtime.files.tokenizer import Tokenizer
    from dgq.runtime.model.model import Model


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. weights: canonical name -> Packed, read lazily; file: the .gguf or the directory; adapters:
    LoRA adapters to apply beside the weights; active: the names of those that are applied where a request chooses none,
    all of them if None."""

    kind: str
    path: Path
    file: Path
    config: ModelConfig
    generation: GenerationConfig
    weights: Weights
    adapters: tuple[Adapter, ...] = ()
    active: tuple[str, ...] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its weights by canonical name, those of its vision tower among them if it is known to have
        one."""
        raw = read_json(self.path / "config.json") if self.path.is_dir() else {}
        sees = isinstance(self.weights, GGUFWeights) or self.weights.sees
        vision = expected_vision(raw, self.config.hidden, str(self.path / "config.json")) if sees else {}
        return expected_tensors(self.config) | vision

    def with_adapters(self, adapters: Sequence[Adapter], active: Sequence[str] | None = None) -> Artifact:
        """This artifact with LoRA adapters, opened by adapters.adapter.open_adapter() for its shapes."""
        return dataclasses.replace(self, adapters=tuple(adapters), active=None if active is None else tuple(active))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for whoever runs it: about its weights, and about how it is sampled."""
        applied = (adapter.notice for adapter in self.adapters)
        return (*self.weights.remarks, *applied, *sampler_notices(self.path, self.generation))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer, or the one rebuilt from a bare .gguf. InputError if it is missing or broken."""
        from dgq.runtime.files.tokenizer import Tokenizer

        if self.path.is_dir():
            return Tokenizer.from_dir(self.path)
        assert isinstance(self.weights, GGUFWeights)
        return Tokenizer.from_gguf(self.weights.reader.metadata, str(self.path))

    @cached_property
    def vision(self) -> Vision:
        """The artifact's way to take images; nothing is loaded yet. InputError if it has no vision tower, or if its
        files contradict each other."""
        from dgq.runtime.files.images import Vision

        folder = self.path if self.path.is_dir() else None
        raw = read_json(self.path / "config.json") if folder else {}
        config, weights = raw.get("vision_config"), self.weights
        read: Callable[[str], Tensor] = weights.vision_tensor
        if isinstance(weights, GGUFWeights):
            mmproj = weights.mmproj or Mmproj(only_mmproj(self.file.parent, self.file), self.config.hidden)
            config, read = mmproj.config, mmproj.tensor
        if not config or not weights.sees:
            raise InputError(f"{self.path}: has no vision tower, which images need")
        metadata = weights.reader.metadata if isinstance(weights, GGUFWeights) else {}
        settings = (raw, str(self.path / "config.json")) if folder else (gguf_attention(metadata), str(self.path))
        is_causal = causal_images(*settings)
        read = self._with_changes(read)
        return Vision(config, self.config.hidden, read, self._image_tokens(raw), folder, str(self.path), is_causal)

    def _with_changes(self, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """read() of vision tensors with the adapters' changes. The tower belongs to one side, so that the sum is the
        product beside; it is looked through before a request chooses, with the adapters that are active."""
        names = {adapter.name for adapter in self.adapters} if self.active is None else set(self.active)
        changes = [adapter.vision for adapter in self.adapters if adapter.name in names]

        def changed(name: str) -> Tensor:
            values = read(name)
            deltas = [vision[name] for vision in changes if name in vision]
            whole = values.double() if deltas else values
            for delta in deltas:
                whole = delta.merged(whole, 0)
            return whole.float() if deltas else values

        return changed if any(changes) else read

    def _image_tokens(self, raw: Mapping[str, Any]) -> Tokens:
        """The tokens around an image: config.json's, or else those with these names in Gemma 4's tokenizer."""
        from dgq.runtime.files.images import Tokens

        ids = []
        for key, token in (("boi", "<|image>"), ("image", "<|image|>"), ("eoi", "<image|>")):
            token_id = raw.get(f"{key}_token_id")
            token_id = self.tokenizer.token_id(token) if token_id is None else token_id
            if type(token_id) is not int or not 0 <= token_id < self.config.vocab:
                raise InputError(f"{self.path}: {key}_token_id is {token_id!r}, no token to put an image between")
            ids.append(token_id)
        return Tokens(*ids)

    def load(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        activations: str | None = None,
        vram: int | None = None,
        kernels: bool | None = None,
    ) -> Model:
        """The model on a device; for activations, vram and kernels see loading.LoadOptions. InputError for values
        that no quantiser writes."""
        from dgq.runtime.model.loading import LoadOptions
        from dgq.runtime.model.model import Model

        options = LoadOptions(
            activations=activations, kernels=kernels, vram=vram, adapters=self.adapters, active=self.active
        )  # fmt: skip
        return Model(self.config, self.weights, device, dtype, str(self.file), options=options)


def open_artifact(path: Path | str) -> Artifact:
    """Open a directory or a .gguf. InputError, one line, for everything that is wrong with it."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: expected a directory or a .gguf file")
        return _open_gguf(path)
    refuse_other(path)
    ggufs = sorted(file for file in path.glob("*.gguf") if not (is_mmproj(file) or is_later_part(file)))
    if len(ggufs) == 1 and not (path / "config.json").is_file():
        raise InputError(
            f"{path}: has no config.json; name the file, {ggufs[0].name}, to open it without its directory"
        )
    shards = any(path.glob("*.safetensors"))
    if len(ggufs) > 1 and not shards:
        raise InputError(f"{path}: holds {len(ggufs)} .gguf files ({ggufs[0].name}, {ggufs[1].name}, …); name one")
    if not ggufs and not shards:
        raise InputError(f"{path}: holds neither safetensors nor a .gguf")
    raw = read_json(path / "config.json")
    if shards:
        kind, config, weights = open_weights(path, raw)
        generation = GenerationConfig.from_file(path / "generation_config.json", config)
        return Artifact(kind, path, path, config, generation, weights)
    config = ModelConfig.from_json(raw, str(path / "config.json"))
    generation = GenerationConfig.from_file(path / "generation_config.json", config)
    reader = GGUFReader(ggufs[0])
    _check_agreement(config, ModelConfig.from_gguf(reader.metadata, str(ggufs[0])), path, ggufs[0])
    packed = GGUFWeights(reader, config, _mmproj(path, raw, config))
    return Artifact("gguf", path, ggufs[0], config, generation, packed)


def open_weights(path: Path, raw: dict[str, Any]) -> tuple[str, ModelConfig, DirWeights]:
    """The kind, the model's shape and the weights of a safetensors directory. raw: its config.json."""
    config = ModelConfig.from_json(raw, str(path / "config.json"))
    stored = stored_tensors(path)
    quantised = quantization(path, raw, stored)
    layout = None if quantised is None else quantised.layout()
    vision = expected_vision(raw, config.hidden, str(path / "config.json"))
    base = layout.base if isinstance(layout, Mixed) else layout
    tied = base is None or isinstance(base, (CompressedTensors, BitsAndBytes))
    remarks = early_names(raw)
    if quantised is None:
        named = canonical(stored, expected_tensors(config), vision)
        stale = stale_declaration(path, raw, stored)
        remarks += [*([stale] if stale else []), *index_notices(path, stored)]
    else:
        named = canonical_packed(stored, vision)
    remarks += named.notices
    stored, vision = named.specs, named.vision
    directory = TiedDir(path, stored, config.experts) if tied else HFDir(path, stored)
    apart: Layout | None = experts_apart(layout, directory.specs) if isinstance(layout, BitsAndBytes) else layout
    if isinstance(apart, Mixed):
        base = apart.base if apart.either else fitted(apart.base, directory.specs)
        apart = dataclasses.replace(apart, specs=directory.specs, base=base)
    elif isinstance(apart, NVFP4Modules):
        apart = fitted(apart, directory.specs)
        remarks += scale_remarks(apart, base)
    kind = "safetensors" if quantised is None else quantised.kind
    return kind, config, DirWeights(directory, config, apart, vision, remarks)


def _mmproj(path: Path, raw: Mapping[str, Any], config: ModelConfig) -> Mmproj | None:
    """The directory's mmproj file if it has exactly one; it must agree with config.json. With several files, an image
    is refused later."""
    files = find_mmproj(path)
    if len(files) != 1:
        return None
    mmproj = Mmproj(files[0], config.hidden)
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        return mmproj
    for key, value in mmproj.config.items():
        expected = vision.get(key, value)
        same = math.isclose(expected, value, rel_tol=1e-6) if isinstance(expected, float) else expected == value
        if not same and key != "rope_parameters":
            raise InputError(
                f"{path / 'config.json'}: vision_config.{key} is {expected}, but {files[0].name} says {value}"
            )
    return mmproj


def _open_gguf(path: Path) -> Artifact:
    reader = GGUFReader(path)
    if reader.metadata.get("general.architecture") == ARCH:
        raise InputError(f"{path}: is a vision tower (mmproj); name the text model's .gguf, it is found beside that")
    config = ModelConfig.from_gguf(reader.metadata, str(path))
    generation = GenerationConfig.from_gguf(reader.metadata, config, str(path))
    return Artifact("gguf", path, path, config, generation, GGUFWeights(reader, config))


def _check_agreement(ours: ModelConfig, files: ModelConfig, path: Path, file: Path) -> None:
    """Refuse a directory whose config.json describes another model than its .gguf's metadata. Floats may differ by
    float32's rounding."""
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(ours, field.name), getattr(files, field.name)
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
        if not same and field.name not in ("eos_ids", "pad_id", "rope_partial"):  # not in the metadata, or not as such
            raise InputError(
                f"{path / 'config.json'}: {field.name} is {a}, but {file.name} says {b}; one is not the other's"
            )
