"""The BF16 checkpoint (or a fine-tune of it) that everything is made from, checked from its headers.

    config.json (either style)   ->  ModelConfig  ->  the exact list of tensors it must hold
    safetensors headers          ->  Spec         ->  compared name by name, shape by shape

Missing, extra and mis-shaped tensors, foreign dtypes and already quantised checkpoints are refused before a byte of
payload is read. Two deviations are accepted with a notice: F16 and F32 tensors, and copies of tied weights (lm_head,
the encoder's text weights) that turn out byte-equal when they are compared, as the first thing a conversion reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgq.convert.source.adapter import AdapterChoice, AdapterLike, Merged, MergedDir, merge
from dgq.convert.source.hub import Located, locate, remote_specs
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, HFDir, read_json
from dgq.quant.types import Packed, Spec
from dgq.runtime.files.canonical import canonical, stored_tensors
from dgq.runtime.files.folders import refuse_other
from dgq.runtime.files.quantization import DECLARATIONS, quantization, stale_declaration
from dgq.runtime.files.weights import Stored, Weights
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, check_tensors, expected_tensors
from dgq.runtime.shape.settings import GenerationConfig, sampler_notices
from dgq.runtime.shape.vision import expected_vision

COMPARE_BYTES = 1 << 24
ROWS = 8  # of a matrix that tell it from another
STRIDE = 37  # from the row that tells an expert to the next one's
ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"
SAMPLER_KEYS = ("t_min", "t_max", "stability_threshold", "confidence_threshold", "sampler_config._cls_name",
                "sampler_config.entropy_bound")  # fmt: skip


@dataclass(frozen=True)
class Source(Weights):
    """A checked BF16 checkpoint: a mapping from the canonical name of a tensor of the text model to a Packed, which is
    mapped from the file and not loaded. Vision tensors can be looked up by name and are not iterated over.

    text, vision: header entries; copies: name of a duplicate -> canonical name; notices: lines for the user; adapters:
    merged into the weights as these are read; deviations: those notices that say how the files differ from a plain
    checkpoint.
    """

    where: Located
    config: ModelConfig
    generation: GenerationConfig
    text: dict[str, Spec]
    vision: dict[str, Spec]
    copies: dict[str, str]
    notices: tuple[str, ...]
    _dir: HFDir
    adapters: tuple[Merged, ...] = ()
    deviations: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Packed:
        if name not in self.text and name not in self.vision:
            raise KeyError(name)
        return self._dir[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.text)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def path(self) -> Path:
        return self.where.path

    @property
    def sees(self) -> bool:
        return bool(self.vision)

    @property
    def remarks(self) -> tuple[str, ...]:
        return (*self.deviations, *(adapter.notice for adapter in self.adapters))

    def plain_config(self) -> dict[str, Any] | None:
        """config.json without what the files contradict: a stale declaration of quantisation, the vision_config of a
        model without a tower. None if there is no such thing in it."""
        config = read_json(self.path / "config.json")
        wrong = [key for key in DECLARATIONS if config.get(key) is not None]
        wrong += [] if self.vision or config.get("vision_config") is None else ["vision_config"]
        return {key: value for key, value in config.items() if key not in wrong} if wrong else None

    def vision_tensor(self, name: str) -> torch.Tensor:
        return self._dir.tensor(name)

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor."""
        return self._dir.specs[name].dtype

    def file(self, name: str) -> Path:
        return self._dir.specs[name].file

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor along its first axis, read, not mapped."""
        return self._dir.rows(name, start, stop)

    def row(self, name: str, *at: int) -> torch.Tensor:
        """One row (in,) of a matrix, or of one expert's: row(name, expert, row)."""
        return self._dir.row(name, *at)

    def digest(self) -> str:
        """The SHA-256 of a sample of the weights, by which two models are told apart: ROWS rows of every matrix, one
        row of each expert's (not the same one), and all vectors. A fine-tune changes some of them, and so do experts
        that are exchanged, left out or made anew; a change of single rows may go unnoticed."""
        digest = hashlib.sha256()
        for name, spec in self.text.items():
            *lead, rows = spec.shape[:-1] or (1,)
            if len(spec.shape) < 2:
                parts = [self.rows(name, 0, spec.shape[0] if spec.shape else 1)]
            elif lead:
                parts = [self.row(name, expert, expert * STRIDE % rows) for expert in range(lead[0])]
            else:
                parts = [self.row(name, i * rows // ROWS) for i in range(min(ROWS, rows))]
            for part in parts:
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def everything(self) -> dict[str, Stored]:
        specs = self.text | self.vision
        return {name: Stored(FLOATS[spec.dtype], spec.numel, spec.stop - spec.start) for name, spec in specs.items()}

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({spec.file for spec in self._dir.specs.values()})

    def check_copies(self) -> None:
        """Compare each copy of a tied weight with its original, byte by byte; InputError if one differs."""
        for copy, original in self.copies.items():
            kinds = [self._dir.specs[name].dtype for name in (copy, original)]
            if kinds[0] != kinds[1]:
                file = self._dir.specs[copy].file
                raise InputError(f"{file}: {copy} is {kinds[0]}, but {original}, which it is tied to, is {kinds[1]}")
            if not all(torch.equal(a, b) for a, b in zip(*map(self._pieces, (copy, original)), strict=True)):
                raise InputError(
                    f"{self._dir.specs[copy].file}: {copy} differs from {original}, which it should be tied to;"
                    " this is no plain fine-tune of DiffusionGemma"
                )

    def check_vocabulary(self) -> None:
        """InputError if tokenizer.json, which may be another model's, has a token that the embedding has no row for. A
        row without a token is allowed, since embeddings are padded."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            return
        raw = read_json(file)
        model, added = raw.get("model"), raw.get("added_tokens")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        tokens = dict(vocab) if isinstance(vocab, dict) else {}
        tokens |= {str(one.get("content")): one.get("id") for one in added or () if isinstance(one, dict)}
        for token, number in tokens.items():
            if type(number) is not int or not 0 <= number < self.config.vocab:
                raise InputError(
                    f"{file}: token {token!r} has id {number}, outside the vocabulary of {self.config.vocab}"
                )

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor's bytes, some rows at a time, read and not mapped."""
        spec = self._dir.specs[name]
        count = spec.shape[0] if spec.shape else 1
        step = max(1, COMPARE_BYTES * count // max(1, spec.stop - spec.start))
        for start in range(0, count, step):
            stored = HFDir.rows(self._dir, name, start, min(start + step, count))  # adapters change no copies
            yield stored.view(torch.uint8)

    @property
    def unsaid(self) -> list[str]:
        """The settings that vLLM has no default for and that the source lacks: of the architecture in config.json, of
        the sampler in generation_config.json."""
        file = self.path / "generation_config.json"
        settings = read_json(file) if file.is_file() else {}
        sampler = settings.get("sampler_config") or {}
        settings |= {f"sampler_config.{key}": value for key, value in sampler.items()}
        named = ARCHITECTURE in str(read_json(self.path / "config.json").get("architectures"))
        missing = [f"{file.name}: {key}" for key in SAMPLER_KEYS if settings.get(key) is None]
        return missing if named else [f"config.json: architectures [{ARCHITECTURE}]", *missing]


def open_source(
    asked: str, revision: str | None = None, *, weights: bool = True, adapters: Sequence[AdapterLike] = ()
) -> Source:
    """Locate SRC and check it, from headers alone. InputError for anything that is wrong with it.

    asked: a directory, a Hub id (at `revision`) or `tiny`. weights=False: of a Hub id, fetch only small files and
    headers; the result can be planned, but not converted. adapters: directories or Hub ids of LoRA adapters, merged
    into the weights as these are read.
    """
    where = locate(asked, revision, weights=weights)
    config_file = where.path / "config.json"
    if where.repo is None or not config_file.exists():  # a Hub repository's weights may not be fetched yet
        refuse_other(where.path)
    raw = read_json(config_file)
    remote = None if weights or where.repo is None else remote_specs(where.repo, str(where.revision))
    stored = stored_tensors(where.path) if remote is None else remote
    if (packed := quantization(where.path, raw, stored)) is not None:
        raise InputError(
            f"{packed.source}: already quantised ({packed.method!r}); dgq converts from the BF16 checkpoint, and runs"
            " and inspects a quantised one in a directory of its own"
        )
    config = ModelConfig.from_json(raw, str(config_file))
    generation = GenerationConfig.from_file(where.path / "generation_config.json", config)
    text, stale = expected_tensors(config), stale_declaration(where.path, raw, stored)
    named = canonical(stored, text, expected_vision(raw, config.hidden, str(config_file)))
    vision, directory = named.vision, HFDir(where.path, named.specs)
    copies = _copies(directory, text)
    expected = text | vision | {copy: text[original] for copy, original in copies.items()}
    specs = directory.specs
    shapes = {name: spec.shape for name, spec in specs.items()}
    check_tensors(shapes, expected, str(where.path), file=lambda name: str(specs[name].file))
    _check_dtypes(specs)
    merged = tuple(merge(AdapterChoice.of(one), text | vision) for one in adapters)
    sampler = sampler_notices(where.path, generation)
    deviations = (*([stale] if stale else []), *named.notices)
    notices = (*_notices(specs, copies, raw.get("text_config", {})), *deviations, *sampler)
    return Source(
        where,
        config,
        generation,
        {n: specs[n] for n in text},
        {n: specs[n] for n in vision},
        copies,
        (*notices, *(adapter.notice for adapter in merged)),
        MergedDir(directory, merged) if merged else directory,
        merged,
        deviations,
    )


def _copies(directory: HFDir, text: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Duplicates of tied weights among the directory's tensors -> the tensor they duplicate."""
    copies = {}
    for name in directory.specs:
        original = EMBEDDING if name == "lm_head.weight" else DECODER + name.removeprefix(ENCODER)
        if name not in text and (name == "lm_head.weight" or name.startswith(ENCODER)) and original in text:
            copies[name] = original
    return copies


def _check_dtypes(specs: Mapping[str, Spec]) -> None:
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise InputError(f"{spec.file}: {name} has dtype {spec.dtype}; dgq converts from BF16 (or F16, F32)")


def _notices(specs: Mapping[str, Spec], copies: Mapping[str, str], text: Mapping[str, Any]) -> tuple[str, ...]:
    lines = []
    others = [name for name, spec in specs.items() if spec.dtype != "BF16"]
    if others:
        kinds = "/".join(sorted({specs[name].dtype for name in others}))
        lines.append(f"{len(others)} of {len(specs)} tensors are {kinds}, not BF16 ({others[0]}, …)")
    if copies:
        lines.append(
            f"{len(copies)} copies of tied weights ({next(iter(copies))}, …): dropped if byte-equal, else refused"
        )
    if "per_layer_config" in text:
        lines.append("config.json has the style of transformers >= 5.17 (per_layer_config): read, and kept as it is")
    return tuple(lines)
