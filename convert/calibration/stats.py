"""STATS, the result of `dgq calibrate`: one safetensors file, whose metadata hold a JSON text under "dgq".

    samples.*          the samples (samples_file.py)
    <weight>.sum2      float32 (2, in) or (E, 2, in)      sum of x² over the prompts' tokens, and over the canvases'
    <weight>.amax      float32 (2,) or (E, 2)             the largest |x| of each
    <weight>.count     int64 (KINDS,) or (E, KINDS)       tokens seen: prompts'; canvases by noise; the same conditioned

One weight is named for all that read the same input: q_proj stands for k_proj and v_proj, gate_proj for up_proj.
Hessians are not kept: `dgq convert --stats` makes a layer's anew from the samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dgq.convert.calibration.samples_file import read_samples
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import BINS, KINDS
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import sha256
from dgq.quant.errors import InputError
from dgq.runtime.shape.names import DECODER, EMBEDDING, layer_of

# The weights whose inputs are summed, and the other readers of the same inputs.
WATCHED = (
    "q_proj.weight",
    "o_proj.weight",
    "gate_proj.weight",
    "down_proj.weight",
    "experts.gate_up_proj",
    "experts.down_proj",
    "embed_tokens.weight",
)
READERS = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
SEEN = "experts.gate_up_proj.count"
FLOOR = 256  # tokens; an expert that saw fewer leans on its layer's average


@dataclass(frozen=True)
class Stats:
    """An opened and checked STATS file. about: its metadata; sha256: of the file."""

    file: Path
    sha256: str
    about: dict[str, Any]
    chunks: list[Chunk]
    tensors: dict[str, torch.Tensor]

    def starved(self) -> dict[str, int]:
        """The experts that saw fewer than FLOOR tokens: "layer.expert" -> tokens."""
        return starved(self.tensors)

    def describe(self) -> dict[str, Any]:
        """What dgq.json says of the calibration. coverage: layer -> the least, the median and the most tokens that an
        expert saw."""
        about = {**self.about, "name": self.file.name, "sha256": self.sha256, "starved": self.starved()}
        seen = {layer: sorted(counts) for layer, counts in coverage(self.tensors).items()}
        return about | {"coverage": {layer: [n[0], n[len(n) // 2], n[-1]] for layer, n in seen.items()}}


def starved(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The experts that saw fewer than FLOOR tokens, by STATS' tensors: "layer.expert" -> tokens."""
    return {
        f"{layer}.{expert}": seen
        for layer, counts in coverage(tensors).items()
        for expert, seen in enumerate(counts)
        if seen < FLOOR
    }


def named(starved: dict[str, int]) -> str:
    """One line that names the experts of too few tokens."""
    if not starved:
        return f"no expert saw fewer than {FLOOR} tokens"
    each = ", ".join(f"{name} ({seen})" for name, seen in starved.items())
    return (
        f"{len(starved)} experts saw fewer than {FLOOR} tokens in calibration and lean on their layer's average;"
        f" layer.expert (tokens): {each}"
    )


def coverage(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Layer -> tokens that each expert saw."""
    return {layer: count.sum(-1).tolist() for layer, count in _by_layer(tensors)}


def _by_layer(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The layers in order, and the counts (E, KINDS) of each."""
    names = {layer: name for name in tensors if name.endswith(SEEN) and (layer := layer_of(name)) is not None}
    return ((str(layer), tensors[names[layer]]) for layer in sorted(names))


def counted(file: Path) -> dict[str, Any] | None:
    """What STATS say about themselves, with "floor", "starved", "coverage" and kinds: layer -> of each expert the
    tokens of each kind (layerwise/samples.py). None if the file is no STATS; InputError for damaged ones."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("dgq")
            if text is None:
                return None
            about = json.loads(text)
            tensors = {n: opened.get_tensor(n) for n in opened.keys() if n.endswith(SEEN)}  # noqa: SIM118
        kinds = {layer: counts.tolist() for layer, counts in _by_layer(tensors)}
        counts = {"starved": starved(tensors), "coverage": coverage(tensors), "kinds": kinds}
    except (OSError, SafetensorError):
        return None
    except (ValueError, IndexError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(f"{file}: STATS of dgq calibrate, but damaged ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("data"), dict) or not kinds:
        raise InputError(f"{file}: STATS of dgq calibrate, but damaged")
    return {**about, "floor": FLOOR, **counts}


def read_stats(file: Path, source: Source) -> Stats:
    """Open and check STATS. InputError if the file is none, is damaged, or was made of another model."""
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["dgq"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        chunks = read_samples(tensors)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; `dgq calibrate` makes it") from None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, IndexError, RecursionError) as error:
        raise InputError(f"{file}: no STATS of dgq calibrate, or damaged ({error})") from None
    _check_samples(file, source, tensors)
    if not isinstance(about, dict) or about.get("weights") != source.digest():
        raise InputError(f"{file}: was made from other weights than {source.path}; calibrate these")
    if not _is_whole(about):
        raise InputError(f"{file}: does not say what it was made of; damaged")
    tokens = _tokens(chunks)
    _check_sums(file, source, tensors, tokens)
    if about["tokens"] != int(tokens.sum()) or about["rounds"] < 1:
        claim = f"{about['tokens']} tokens in {about['rounds']} rounds"
        raise InputError(f"{file}: tells of {claim}, and its samples have {int(tokens.sum())}; damaged")
    return Stats(file, sha256(file), about, chunks, tensors)


def _check_samples(file: Path, source: Source, tensors: dict[str, torch.Tensor]) -> None:
    """InputError if the samples are not of the source's vocabulary, canvas and width."""
    config, canvases = source.config, tensors["samples.canvases"]
    ids = torch.cat([tensors["samples.prompts"], canvases.flatten()])
    soft = tensors.get("samples.soft")
    fits = canvases.shape[1:] == (config.canvas,) and int(ids.min()) >= 0 and int(ids.max()) < config.vocab
    if not fits or (soft is not None and soft.shape[-1] != config.hidden):
        raise InputError(f"{file}: its samples do not fit {source.path}; calibrate this model")


def _check_sums(file: Path, source: Source, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    """InputError if a weight's sums are missing, are no numbers, or contradict each other or the samples' `tokens`."""
    for name, shape in watched(source).items():
        expected = {"sum2": (shape, torch.float32), "amax": (shape[:-1], torch.float32),
                    "count": ((*shape[:-2], KINDS), torch.int64)}  # fmt: skip
        for part, kind in expected.items():
            value = tensors.get(f"{name}.{part}")
            if value is None or (tuple(value.shape), value.dtype) != kind:
                raise InputError(f"{file}: {name}.{part} is missing, or not {kind[1]} {list(kind[0])}; damaged")
            if not bool(value.isfinite().all() and (value >= 0).all()):
                raise InputError(f"{file}: {name}.{part} holds values that are negative or not finite; damaged")
        if wrong := _contradiction(name, tensors, tokens, source.config.top_k):
            raise InputError(f"{file}: {name}: {wrong}; damaged")


def _contradiction(name: str, tensors: dict[str, torch.Tensor], tokens: torch.Tensor, top_k: int) -> str | None:
    """What contradicts what in a weight's sums, largest values and counts, and the samples' tokens (KINDS,)."""
    sum2, amax, count = (tensors[f"{name}.{part}"] for part in ("sum2", "amax", "count"))
    seen = torch.stack((count[..., 0], count[..., 1:].sum(-1)), -1).double()
    most, squared = sum2.double().amax(-1), amax.double().square()  # of a column; its largest value is among the sum
    low, high = most < squared * (1 - 1e-3) - 1e-30, most > squared * seen * (1 + 1e-3) + 1e-30
    if bool((low | high).any()):
        return "the largest values, sums and counts of its inputs contradict each other"
    if layer_of(name) is not None:
        routed = ".experts." in name
        if not torch.equal(count.sum(0) if routed else count, tokens * (top_k if routed else 1)):
            return "its counts are not those of the samples' tokens"
    return None


def _tokens(chunks: list[Chunk]) -> torch.Tensor:
    """The samples' tokens of each kind that go through a layer, (KINDS,) int64."""
    counts = torch.zeros(KINDS, dtype=torch.int64)
    for chunk in chunks:
        counts[0] += chunk.encoded
        each = torch.full_like(chunk.kind, chunk.canvases.shape[1])
        counts.index_add_(0, chunk.kind, each).index_add_(0, chunk.kind + BINS, each)
    return counts


def _is_whole(about: dict[str, Any]) -> bool:
    """Whether the metadata hold what artifacts, their cards and pages repeat."""
    data = about.get("data")
    return (
        isinstance(data, dict)
        and all(isinstance(data.get(key), str) for key in ("name", "sha256"))
        and all(type(value) is int for value in (about.get("tokens"), about.get("rounds"), data.get("documents")))
    )


def watched(source: Source, stage: str | int | None = None) -> dict[str, tuple[int, ...]]:
    """The weights that STATS name -> shape of their sum2. stage: only those that are seen in it; it is "enter" (before
    the layers), a layer's number, or "leave" (the head)."""
    stages: dict[str | int | None, str] = {
        None: DECODER,
        "enter": f"{DECODER}self_conditioning.",
        "leave": EMBEDDING,
    }
    prefix = stages.get(stage, f"{DECODER}layers.{stage}.")
    return {
        name: (*(spec.shape[:1] if len(spec.shape) == 3 else ()), 2, spec.shape[-1])
        for name, spec in source.text.items()
        if name.startswith(prefix) and name.endswith(WATCHED)
    }
