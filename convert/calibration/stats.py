"""STATS, what `dgq calibrate` finds out: one safetensors file, its header's metadata a JSON text under "dgq".

    samples.prompts    int32 (tokens,)     ids of all prompts, one after the other; samples.lengths int32: of each
    samples.canvases   int32 (n, canvas)   samples.owner int32 (n,): each one's prompt; samples.kind int32 (n,)
    samples.chunks     int32               prompts in each chunk
    samples.given      int32 (m,)          canvases of the sampler, if any; samples.soft bfloat16 (m, canvas, hidden):
                                           what each was conditioned on
    <weight>.sum2      float32 (2, in) or (E, 2, in)      sum of x² over the prompts' tokens, and the canvases'
    <weight>.amax      float32 (2,) or (E, 2)             the largest |x|
    <weight>.count     int64 (KINDS,) or (E, KINDS)       tokens seen: prompts'; canvases by noise; the same conditioned

A weight is named once for all that read the same input (q_proj stands for k and v, gate_proj for up). Hessians are not
kept: `dgq convert --stats` makes a layer's anew from the samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import BINS, KINDS
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import sha256
from dgq.quant.errors import InputError
from dgq.runtime.shape.names import DECODER, EMBEDDING, layer_of

# The weights that stand for all that read the same input, and who reads it besides.
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
FLOOR = 256  # tokens below which an expert leans on its layer


@dataclass(frozen=True)
class Stats:
    """An opened STATS file. about: its metadata; sha256: of the file."""

    file: Path
    sha256: str
    about: dict[str, Any]
    chunks: list[Chunk]
    tensors: dict[str, torch.Tensor]

    def starved(self) -> dict[str, int]:
        """Experts that saw fewer than FLOOR tokens: "layer.expert" -> tokens."""
        return starved(self.tensors)

    def describe(self) -> dict[str, Any]:
        """For dgq.json. coverage: layer -> tokens that its experts saw: the least, the median, the most."""
        about = {**self.about, "name": self.file.name, "sha256": self.sha256, "starved": self.starved()}
        seen = {layer: sorted(counts) for layer, counts in coverage(self.tensors).items()}
        return about | {"coverage": {layer: [n[0], n[len(n) // 2], n[-1]] for layer, n in seen.items()}}


def starved(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """See Stats.starved."""
    return {
        f"{layer}.{expert}": seen
        for layer, counts in coverage(tensors).items()
        for expert, seen in enumerate(counts)
        if seen < FLOOR
    }


def named(starved: dict[str, int]) -> str:
    """One line on the experts of too few tokens, by name."""
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
    """Layers in order, and the counts (E, KINDS) of each."""
    names = {layer: name for name in tensors if name.endswith(SEEN) and (layer := layer_of(name)) is not None}
    return ((str(layer), tensors[names[layer]]) for layer in sorted(names))


def sample_tensors(chunks: list[Chunk]) -> dict[str, torch.Tensor]:
    prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
    owners, before = [], 0
    for chunk in chunks:
        owners += [before + owner for owner in chunk.owner]
        before += len(chunk.prompts)
    numbers = {
        "prompts": [token for prompt in prompts for token in prompt],
        "lengths": [len(prompt) for prompt in prompts],
        "owner": owners,
        "chunks": [len(chunk.prompts) for chunk in chunks],
    }
    found = {f"samples.{name}": torch.tensor(values, dtype=torch.int32) for name, values in numbers.items()}
    found["samples.canvases"] = torch.cat([chunk.canvases for chunk in chunks]).int()
    found["samples.kind"] = torch.cat([chunk.kind for chunk in chunks]).int()
    return found | given_tensors(chunks)


def given_tensors(chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
    """samples.given and samples.soft; nothing if no canvas is the sampler's."""
    places, soft, before = [], [], 0
    for chunk in chunks:
        places += [before + canvas for canvas in chunk.given]
        soft += list(chunk.given.values())
        before += len(chunk.owner)
    if not places:
        return {}
    return {"samples.given": torch.tensor(places, dtype=torch.int32), "samples.soft": torch.stack(soft)}


def counted(file: Path) -> dict[str, Any] | None:
    """What STATS say about themselves, with "floor", "starved", "coverage" and kinds: layer -> of each expert the
    tokens of each kind (samples.py). None if the file is no STATS; InputError for damaged ones."""
    try:
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get("dgq")
            if said is None:
                return None
            about = json.loads(said)
            tensors = {n: opened.get_tensor(n) for n in opened.keys() if n.endswith(SEEN)}  # noqa: SIM118
        kinds = {layer: counts.tolist() for layer, counts in _by_layer(tensors)}
        found = {"starved": starved(tensors), "coverage": coverage(tensors), "kinds": kinds}
    except (OSError, SafetensorError):
        return None
    except (ValueError, IndexError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(f"{file}: STATS of dgq calibrate, but damaged ({error})") from None
    if not isinstance(about, dict) or not isinstance(about.get("data"), dict) or not kinds:
        raise InputError(f"{file}: STATS of dgq calibrate, but damaged")
    return {**about, "floor": FLOOR, **found}


def read_stats(file: Path, source: Source) -> Stats:
    """Open and check STATS. InputError if it is none, damaged, or of another model."""
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["dgq"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        chunks = read_samples(tensors)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; `dgq calibrate` makes it") from None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, IndexError, RecursionError) as error:
        raise InputError(f"{file}: no STATS of dgq calibrate, or damaged ({error})") from None
    config = source.config
    ids = torch.cat([tensors["samples.prompts"], tensors["samples.canvases"].flatten()])
    soft = tensors.get("samples.soft")
    if soft is not None and soft.shape[-1] != config.hidden:
        raise InputError(f"{file}: its samples do not fit {source.path}; calibrate this model")
    if chunks[0].canvases.shape[1:] != (config.canvas,) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab:
        raise InputError(f"{file}: its samples do not fit {source.path}; calibrate this model")
    if not isinstance(about, dict) or about.get("weights") != source.digest():
        raise InputError(f"{file}: was made from other weights than {source.path}; calibrate these")
    if not _is_whole(about):
        raise InputError(f"{file}: does not say what it was made of; damaged")
    tokens = _tokens(chunks)
    for name, shape in watched(source).items():
        expected = {"sum2": (shape, torch.float32), "amax": (shape[:-1], torch.float32),
                    "count": ((*shape[:-2], KINDS), torch.int64)}  # fmt: skip
        for part, kind in expected.items():
            value = tensors.get(f"{name}.{part}")
            if value is None or (tuple(value.shape), value.dtype) != kind:
                raise InputError(f"{file}: {name}.{part} is missing, or not {kind[1]} {list(kind[0])}; damaged")
            if not bool(value.isfinite().all() and (value >= 0).all()):
                raise InputError(f"{file}: {name}.{part} holds values that are negative or not finite; damaged")
        if wrong := _contradiction(name, tensors, tokens, config.top_k):
            raise InputError(f"{file}: {name}: {wrong}; damaged")
    if about["tokens"] != int(tokens.sum()) or about["rounds"] < 1:
        said = f"{about['tokens']} tokens in {about['rounds']} rounds"
        raise InputError(f"{file}: tells of {said}, and its samples have {int(tokens.sum())}; damaged")
    return Stats(file, sha256(file), about, chunks, tensors)


def _contradiction(name: str, tensors: dict[str, torch.Tensor], tokens: torch.Tensor, top_k: int) -> str | None:
    """What a weight's sums, largest values and counts say against each other, or the tokens (KINDS,) that there are."""
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
    """Of each kind (KINDS,) int64, in a layer."""
    found = torch.zeros(KINDS, dtype=torch.int64)
    for chunk in chunks:
        found[0] += chunk.encoded
        each = torch.full_like(chunk.kind, chunk.canvases.shape[1])
        found.index_add_(0, chunk.kind, each).index_add_(0, chunk.kind + BINS, each)
    return found


def _is_whole(about: dict[str, Any]) -> bool:
    """Whether there is what artifacts, their cards and pages tell of."""
    data = about.get("data")
    return (
        isinstance(data, dict)
        and all(isinstance(data.get(key), str) for key in ("name", "sha256"))
        and all(type(value) is int for value in (about.get("tokens"), about.get("rounds"), data.get("documents")))
    )


def watched(source: Source, stage: str | int | None = None) -> dict[str, tuple[int, ...]]:
    """Weights that are named in STATS -> shape of their sums. stage: only those seen in it: "enter" (before the
    layers), a layer, "leave"."""
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


def read_samples(tensors: dict[str, torch.Tensor]) -> list[Chunk]:
    """The chunks that sample_tensors() was given. ValueError, KeyError or RuntimeError if they make no sense."""
    samples = {n.removeprefix("samples."): t for n, t in tensors.items() if n.startswith("samples.")}
    if any(part.dtype != torch.int32 for name, part in samples.items() if name != "soft"):
        raise ValueError("samples are no int32")
    if any(part.dim() != 1 + (name == "canvases") for name, part in samples.items() if name != "soft"):
        raise ValueError("samples are of another shape")
    given = _given(samples)
    lengths, counts = samples["lengths"].tolist(), samples["chunks"].tolist()
    if min(lengths) < 1 or sum(lengths) != len(samples["prompts"]) or sum(counts) != len(lengths) or min(counts) < 1:
        raise ValueError("lengths of prompts and chunks do not add up")
    owner, kind = samples["owner"].long(), samples["kind"].long()
    wrong = owner.diff() < 0 if len(owner) > 1 else torch.zeros(1, dtype=torch.bool)
    if len(owner) != len(samples["canvases"]) or len(kind) != len(owner) or bool(wrong.any()):
        raise ValueError("canvases and their owners do not match")
    if not (
        int(owner.min()) >= 0 and int(owner.max()) < len(lengths) and 0 < int(kind.min()) <= int(kind.max()) <= BINS
    ):
        raise ValueError("a canvas belongs to no prompt, or is of no known kind")
    prompts = [tuple(part.tolist()) for part in samples["prompts"].split(lengths)]
    made, first = [], 0
    for count in counts:
        own = (owner >= first) & (owner < first + count)
        owners = tuple((owner[own] - first).tolist())
        if not owners:
            raise ValueError("a chunk has no canvas")
        start = int(own.nonzero()[0])
        ours = {place - start: given[place] for place in range(start, start + len(owners)) if place in given}
        canvases = samples["canvases"][own].long()
        made.append(Chunk(tuple(prompts[first : first + count]), canvases, owners, kind[own], ours))
        first += count
    return made


def _given(samples: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    if ("given" in samples) != ("soft" in samples):
        raise ValueError("samples.given and samples.soft go together")
    if "given" not in samples:
        return {}
    places, soft = samples["given"].tolist(), samples["soft"]
    if soft.dtype != torch.bfloat16 or soft.dim() != 3 or soft.shape[:2] != (len(places), samples["canvases"].shape[1]):
        raise ValueError("samples.soft is not bfloat16, or of another shape than its canvases")
    if sorted(set(places)) != places or places[0] < 0 or places[-1] >= len(samples["canvases"]):
        raise ValueError("samples.given does not name canvases in order")
    if not bool(soft.isfinite().all()):
        raise ValueError("samples.soft is not finite")
    return dict(zip(places, soft, strict=True))


def imatrix_entries(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight -> in_sum2 (E or 1, in) and counts (E or 1,) float32, of prompts and canvases together."""
    found = {}
    for key, sums in tensors.items():
        if key.endswith(".sum2"):
            name = key.removesuffix(".sum2")
            count = tensors[name + ".count"].reshape(-1, KINDS).sum(-1).float()
            found[name] = (sums.reshape(len(count), 2, -1).sum(1), count)
    return found
