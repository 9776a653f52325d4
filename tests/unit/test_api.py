"""dgq.runtime.load() as a program uses it: prompts of every kind, what is refused, streams, an end."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgq.runtime
from dgq.quant.errors import InputError
from dgq.runtime.engine import engine as runtime_engine
from dgq.runtime.engine.api import Engine
from dgq.runtime.engine.batch import OnSlots, session_for
from dgq.runtime.engine.engine import Block
from dgq.runtime.shape.pictured import Pictured

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
SORT = [{"role": "user", "content": "Sort: wind apple king door"}]
QUICK = {"max_new_tokens": 1, "steps": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with dgq.runtime.load(TINY, device="cpu") as found:
        yield found


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a text", "another"], "a list of something else, expected text, token ids or a chat's messages"),
        ([[5, 6]], "a list of something else"),
        (torch.tensor([[5, 6]]), "a list of something else"),
        ([5.5, 6], "a list of something else"),
        (SORT[0], "a dict, expected text"),
        (UserDict(input_ids=[5, 6]), "a UserDict, expected text"),
        (b"text", "a bytes, expected text"),
        (None, "a NoneType, expected text"),
        ([*SORT, "and more"], "a list of messages and something else"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(engine: Engine, prompt: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        engine.generate(prompt, **QUICK)


def test_prompts_of_every_kind(engine: Engine) -> None:
    ids = [5, 6, 7]
    found = engine.generate(ids, seed=1, **QUICK)
    for same in (tuple(ids), range(5, 8), np.array(ids), torch.tensor(ids), list(torch.tensor(ids))):
        assert engine.generate(same, seed=1, **QUICK) == found
    assert engine.generate("", seed=1, **QUICK).tokens, "the beginning of a text"


def test_a_text_is_no_list_of_prompts(engine: Engine) -> None:
    with pytest.raises(InputError, match="prompts is a text"):
        engine.generate_batch("text", **QUICK)
    with pytest.raises(InputError, match=r"images is 'cat\.png': give a list"):
        engine.generate("text", images="cat.png", **QUICK)
    with pytest.raises(InputError, match=r"images is 'cat\.png': give a list"):
        list(engine.stream("text", images=["cat.png"], **QUICK))


def test_a_prompt_keeps_its_images(engine: Engine) -> None:
    """What ids() returned is asked again."""
    pictured = Pictured([2, 99, 99, 7], torch.zeros(2, engine.model.config.hidden), 99)
    assert engine.ids(pictured) is pictured


def test_text_is_a_prompts_own(engine: Engine) -> None:
    """The first prompt ends with its first block; afterwards the second is alone, and still the second."""
    blocks = [event for event in engine.stream(SORT, "Once upon a time", seed=0, steps=4, max_new_tokens=128)
              if isinstance(event, Block)]  # fmt: skip
    assert [event.rows for event in blocks] == [(0, 1), (1,)]
    assert engine.text(blocks[0], 0).split() == ["apple", "door", "king", "wind"] and engine.text(blocks[1], 0) == ""
    alone = engine.generate_batch([SORT, "Once upon a time"], seed=0, steps=4, max_new_tokens=128)[1]
    own = [token for event in blocks for token in event.canvas[event.rows.index(1)].tolist()]
    assert own[: len(alone.tokens)] == alone.tokens
    assert engine.text(blocks[1], 1) == engine.tokenizer.decode(alone.tokens[64:])


def test_streams_side_by_side(engine: Engine) -> None:
    """On the reference's caches each goes on; on a GPU the older one is refused (test_session)."""
    settings: dict[str, Any] = {"seed": 3, "steps": 3, "max_new_tokens": 128, "every_step": False}
    expected = [torch.cat([event.canvas[0] for event in engine.stream(text, **settings)]) for text in ("One", "Two")]
    streams = [engine.stream(text, **settings) for text in ("One", "Two")]
    found = [[next(stream).canvas[0] for stream in streams] for _ in range(2)]
    for number, tokens in enumerate(expected):
        assert torch.equal(torch.cat([blocks[number] for blocks in found]), tokens)
    with pytest.raises(ZeroDivisionError):
        engine.generate("One", on_step=lambda step: 1 / 0, **QUICK)
    assert engine.generate("One", seed=3, steps=3, max_new_tokens=128).tokens == expected[0].tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "gpu"}, "device is 'gpu', expected cuda"),
        ({"device": "cuda:1"}, "device is 'cuda:1', expected cuda"),
        ({"device": "cuda"}, "device cuda: no CUDA device"),
        ({"device": "cpu", "vram": 12 << 30}, "vram: is for bfloat16 on a GPU"),
        ({"device": "cuda", "vram": 12 << 30, "dtype": torch.float32}, "vram: is for bfloat16"),
    ],
)
def test_what_cannot_be_loaded(settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "vram" in settings)
    with pytest.raises(InputError, match=words):
        dgq.runtime.load(TINY, **settings)


def test_threads_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the one session that a GPU has: each gets its own answer."""

    class OnTheSession(OnSlots):
        def __init__(self, model: Any, prompts: Any, capacity: int, sampler: Any, random: Any, pad_id: int) -> None:
            super().__init__(model, prompts, capacity, sampler, random)

    monkeypatch.setattr(runtime_engine, "OnCache", OnTheSession)
    settings = {"seed": 3, "steps": 4, "max_new_tokens": 64}
    texts = ["One", "Two", "Three"]
    expected = [engine.generate(text, **settings) for text in texts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda text: engine.generate(text, **settings), texts)) == expected
    engine.model.drop_session()


def test_memory_is_given_back() -> None:
    """At once, though a session and its model know each other."""
    gc.disable()
    try:
        with dgq.runtime.load(TINY, device="cpu") as engine:
            session_for(engine.model, 1, 128, engine.generation.sampler)
            gone = [weakref.ref(engine.model), weakref.ref(engine.model.session)]
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
