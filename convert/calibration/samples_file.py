"""The samples in STATS: chunks of documents (layerwise/samples.py) as tensors, and back.

samples.prompts    int32 (tokens,)     ids of all prompts, one after the other; samples.lengths int32: of each
samples.canvases   int32 (n, canvas)   samples.owner int32 (n,): each one's prompt; samples.kind int32 (n,)
samples.chunks     int32               prompts in each chunk
samples.given      int32 (m,)          canvases of the sampler, if any; samples.soft bfloat16 (m, canvas, hidden):
                                       what each was conditioned on
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import BINS


def sample_tensors(chunks: list[Chunk]) -> dict[str, torch.Tensor]:
    """The chunks as tensors, under the names above."""
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
    tensors = {f"samples.{name}": torch.tensor(values, dtype=torch.int32) for name, values in numbers.items()}
    tensors["samples.canvases"] = torch.cat([chunk.canvases for chunk in chunks]).int()
    tensors["samples.kind"] = torch.cat([chunk.kind for chunk in chunks]).int()
    return tensors | given_tensors(chunks)


def given_tensors(chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
    """samples.given and samples.soft; no tensor at all if no canvas is the sampler's."""
    places, soft, before = [], [], 0
    for chunk in chunks:
        places += [before + canvas for canvas in chunk.given]
        soft += list(chunk.given.values())
        before += len(chunk.owner)
    if not places:
        return {}
    return {"samples.given": torch.tensor(places, dtype=torch.int32), "samples.soft": torch.stack(soft)}


def read_samples(tensors: dict[str, torch.Tensor]) -> list[Chunk]:
    """The chunks that sample_tensors() was given. ValueError, KeyError or RuntimeError if the tensors make no sense."""
    samples = {n.removeprefix("samples."): t for n, t in tensors.items() if n.startswith("samples.")}
    if any(part.dtype != torch.int32 for name, part in samples.items() if name != "soft"):
        raise ValueError("samples are no int32")
    if any(part.dim() != 1 + (name == "canvases") for name, part in samples.items() if name != "soft"):
        raise ValueError("samples are of another shape")
    given = _given(samples)
    lengths, counts = samples["lengths"].tolist(), samples["chunks"].tolist()
    _check(samples, lengths, counts)
    owner, kind = samples["owner"].long(), samples["kind"].long()
    prompts = [tuple(part.tolist()) for part in samples["prompts"].split(lengths)]
    made, first = [], 0
    for count in counts:
        mine = (owner >= first) & (owner < first + count)
        owners = tuple((owner[mine] - first).tolist())
        if not owners:
            raise ValueError("a chunk has no canvas")
        start = int(mine.nonzero()[0])
        conditions = {place - start: given[place] for place in range(start, start + len(owners)) if place in given}
        canvases = samples["canvases"][mine].long()
        made.append(Chunk(tuple(prompts[first : first + count]), canvases, owners, kind[mine], conditions))
        first += count
    return made


def _check(samples: dict[str, torch.Tensor], lengths: list[int], counts: list[int]) -> None:
    """ValueError if prompts, chunks, canvases and owners do not fit together."""
    if min(lengths) < 1 or sum(lengths) != len(samples["prompts"]) or sum(counts) != len(lengths) or min(counts) < 1:
        raise ValueError("lengths of prompts and chunks do not add up")
    owner, kind = samples["owner"].long(), samples["kind"]
    wrong = owner.diff() < 0 if len(owner) > 1 else torch.zeros(1, dtype=torch.bool)
    if len(owner) != len(samples["canvases"]) or len(kind) != len(owner) or bool(wrong.any()):
        raise ValueError("canvases and their owners do not match")
    if not (
        int(owner.min()) >= 0 and int(owner.max()) < len(lengths) and 0 < int(kind.min()) <= int(kind.max()) <= BINS
    ):
        raise ValueError("a canvas belongs to no prompt, or is of no known kind")


def _given(samples: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The sampler's canvases by number -> what each was conditioned on, (canvas, hidden) bfloat16."""
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
