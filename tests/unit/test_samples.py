"""What calibration runs on: where canvases are cut, how much of them is noise, and in what order. No model needed."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgq.convert.layerwise import samples
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import BINS, PER_PROMPT, Document, chunks

CANVAS, VOCAB = 256, 1 << 30
SOURCE: Any = SimpleNamespace(config=SimpleNamespace(canvas=CANVAS, context=1 << 14, pad_id=0, vocab=VOCAB))


def text(first: int, length: int, chat: int = 0) -> Document:
    """Ids that count up from `first`; of a chat an answer that begins after so many."""
    return Document(tuple(range(first, first + length)), chat or samples.SHORTEST, bool(chat))


def made(found: list[Document], rounds: int = 1, seed: int = 0) -> list[Chunk]:
    return [chunk for turn in range(rounds) for chunk in chunks(found, seed, turn, SOURCE)]


def start(canvas: torch.Tensor) -> int:
    """The first token of a canvas before noise: what counts up is still there in part."""
    return Counter((canvas - torch.arange(CANVAS)).tolist()).most_common(1)[0][0]


def test_a_kind_is_the_share_that_was_replaced() -> None:
    documents = [Document((7,) * 4000, samples.SHORTEST, False)] * 64
    kinds: Counter[int] = Counter()
    for chunk in made(documents, 2):
        for canvas, kind in zip(chunk.canvases, chunk.kind.tolist(), strict=True):
            share = float((canvas != 7).float().mean())
            assert (kind - 1) / BINS - 0.12 < share < kind / BINS + 0.12
            kinds[kind] += 1
        for owner in range(len(chunk.prompts)):
            own = [kind for kind, one in zip(chunk.kind.tolist(), chunk.owner, strict=True) if one == owner]
            assert len(own) == PER_PROMPT and own[0] <= BINS // 2 < own[1], "one of little noise, one of much"
    assert sorted(kinds) == [1, 2, 3, 4] and min(kinds.values()) > 0.7 * max(kinds.values())


def test_canvases_are_cut_anywhere_and_lie_behind_their_prompts() -> None:
    document = text(1000, 6000)
    starts = []
    for chunk in made([document] * 8, 8):
        for number, prompt in enumerate(chunk.prompts):
            first = prompt[-1] + 1
            assert prompt == tuple(range(first - len(prompt), first)) and len(prompt) <= samples.LONGEST
            for canvas, owner in zip(chunk.canvases, chunk.owner, strict=True):
                assert owner != number or first == start(canvas) or float((canvas >= 8000).float().mean()) > 0.95
            starts.append(first - 1000)
    assert min(starts) < 1000 and max(starts) > 4700 and len(set(starts)) > 50
    assert all(samples.SHORTEST <= first <= 6000 - CANVAS for first in starts)


def test_an_answer_is_cut_where_the_sampler_would() -> None:
    """At its beginning, or canvases later, the last one padded."""
    firsts = [chunk.prompts[0][-1] + 1 for chunk in made([text(1000, 40 + 3 * CANVAS - 100, chat=40)], 40)]
    assert set(firsts) == {1040 + CANVAS * block for block in range(3)}
    last = next(chunk for chunk in made([text(1000, 40 + 10, chat=40)], 1))
    kept = last.canvases[0][:10] == torch.arange(1040, 1050)
    assert float(kept.float().mean()) > 0.2 and float((last.canvases[0][10:] == 0).float().mean()) > 0.2


def test_every_document_once_a_round_in_another_order() -> None:
    """A conversion takes the first of them, so that these must be any."""
    documents = [text(10000 * n, 600) for n in range(1, 41)]
    for turn in range(2):
        order = [prompt[-1] // 10000 for chunk in chunks(documents, 0, turn, SOURCE) for prompt in chunk.prompts]
        assert sorted(order) == list(range(1, 41)) and sum(order[:20]) not in (sum(range(1, 21)), sum(range(21, 41)))
    both = [made(documents, 1, seed)[0] for seed in (0, 0, 1)]
    assert both[0].prompts == both[1].prompts != both[2].prompts
    assert torch.equal(both[0].canvases, both[1].canvases) and both[0].canvases.max() > 1 << 20


@pytest.mark.parametrize(("most", "count"), [(1, 1), (5000, 3), (5999, 3), (6000, 4), (1 << 18, 10)])
def test_used(most: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canvases count twice, since they are run twice."""
    monkeypatch.setattr(samples, "TOKENS", most)
    chunk = Chunk(((1,) * 476,), torch.zeros(2, CANVAS, dtype=torch.int64), (0, 0), torch.ones(2, dtype=torch.int64))
    assert chunk.run_tokens == 1500
    assert len(samples.used([chunk] * 10)) == count
