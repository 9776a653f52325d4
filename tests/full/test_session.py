"""Fixed memory and steps that wait for nothing, against the reference: the same tokens in float32, on any device.

On a CPU a session's steps run operation by operation; on a GPU generate() itself takes it (test_batches, test_cuda),
and graphs are held against the same kernels without one.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dgq.quant.errors import InputError
from dgq.runtime.engine import engine
from dgq.runtime.engine.batch import OnSlots
from dgq.runtime.engine.engine import Block, Request, Result, Step, generate, stream
from dgq.runtime.engine.plain import Plain
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.session import Session
from dgq.runtime.model.slots import CanvasView, PromptView, Slots

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(RECIPES / "tiny")


@pytest.fixture(scope="module")
def model(artifact):
    return artifact.load("cpu", torch.float32)


@pytest.fixture(scope="module")
def prompts(artifact):
    """Tasks, which end in their first canvas, and texts, which go on: shorter than the window, and past it."""
    tasks, texts = (
        [json.loads(line) for line in (RECIPES / "prompts" / f"heldout_{kind}.jsonl").read_text().splitlines()]
        for kind in ("tasks", "text")
    )
    chats = [artifact.tokenizer.chat(task["messages"]) for task in tasks]
    long = [artifact.tokenizer.encode(item["text"]) for item in texts]
    return [chats[0], long[0][:150], chats[5], long[1][:31], long[2][:64], chats[3]]


class _SlotsAnywhere(OnSlots):
    def __init__(self, model: Any, prompts: Any, capacity: int, sampler: Any, random: Any, pad_id: int) -> None:
        super().__init__(model, prompts, capacity, sampler, random)


def on_slots(monkeypatch: pytest.MonkeyPatch, model: Any, request: Request) -> Result:
    with monkeypatch.context() as patched:
        patched.setattr(engine, "OnCache", _SlotsAnywhere)
        return generate(model, request)


def same(one: Result, other: Result) -> None:
    assert one.tokens == other.tokens and one.steps == other.steps and one.ended == other.ended
    assert torch.equal(one.canvases, other.canvases)


def test_tokens_are_the_references(artifact, model, prompts, monkeypatch):
    """Rows that leave, prompts past the window, blocks that take the ring around."""
    request = Request(prompts, artifact.generation, 4 * 64, 1, 5)
    slots = on_slots(monkeypatch, model, request)
    same(generate(model, request), slots)
    assert {len(steps) for steps in slots.steps} == {1, 4}


@pytest.mark.parametrize("stability", [0, 1, 2])
def test_stops_are_the_references(artifact, model, prompts, monkeypatch, stability):
    generation = replace(artifact.generation, sampler=replace(artifact.generation.sampler, stability=stability))
    request = Request(prompts[::2], generation, 64, 3, 16)
    slots = on_slots(monkeypatch, model, request)
    same(generate(model, request), slots)
    assert any(slots.stopped_early[0])


def test_a_session_is_used_again(artifact, model, prompts, monkeypatch):
    """Whatever an earlier batch left in its memory."""
    first = on_slots(monkeypatch, model, Request(prompts[:2], artifact.generation, 192, 1, 4))
    session = model.session
    on_slots(monkeypatch, model, Request(prompts[2:4], artifact.generation, 64, 2, 4))
    assert model.session is session
    same(first, on_slots(monkeypatch, model, Request(prompts[:2], artifact.generation, 192, 1, 4)))
    on_slots(monkeypatch, model, Request(prompts[:2], artifact.generation, 320, 1, 4))
    assert model.session is not session, "no room for so many tokens"


def test_a_reserved_session_takes_smaller_batches(artifact, model, prompts, monkeypatch):
    """A server's: whatever the number of rows, with a seed for each, in one memory; nothing of the batch before."""
    kept = Session(Plain(model), 4, 512, artifact.generation.sampler, reserved=True)
    model.keep_session(kept)
    for rows in ([1, 0, 3], [1], [2, 5]):
        request = Request([prompts[row] for row in rows], artifact.generation, 64, rows, rows=[0] * len(rows))
        same(on_slots(monkeypatch, model, request), generate(model, request))
        assert model.session is kept
    model.drop_session()


def test_slots_hold_the_last_tokens(artifact):
    """Values are positions: each view shows those it should, whatever has been written over."""
    config = artifact.config
    slots = Slots(config, 2, 600, "cpu", torch.float32)
    lengths = [150, 31]

    def values(layer: int, positions: torch.Tensor) -> torch.Tensor:
        shape = config.layers[layer]
        return positions[:, None, :, None].float().expand(-1, shape.kv_heads, -1, shape.head_dim)

    kinds = {layer.is_sliding: index for index, layer in enumerate(config.layers)}
    for sliding, layer in kinds.items():
        for row, length in enumerate(lengths):
            for start in range(0, length, 70):
                view = PromptView(slots, row, start, min(70, length - start))
                new = values(layer, view.positions())
                seen = view.write(layer, new, -new)[0][0, 0, :, 0]
                first = max(0, start - config.window + 1) if sliding else 0
                assert seen.tolist() == list(range(first, min(start + 70, length)))
                assert view.mask(sliding).shape[-1] == len(seen)
    for _ in range(4):
        slots.lengths.copy_(torch.tensor(lengths))
        view = CanvasView(slots, 2, config.canvas)
        for sliding, layer in kinds.items():
            new = values(layer, view.positions())
            keys, negative = view.write(layer, new, -new)
            assert torch.equal(keys, -negative)
            decoder, encoder = view.decoder_mask(sliding), view.encoder_mask(sliding)
            for row, length in enumerate(lengths):
                end, own = length + config.canvas, keys[row, 0, :, 0]
                first = max(0, length - config.window + 1) if sliding else 0
                assert sorted(own[decoder[row, 0, 0]].tolist()) == list(range(first, end))
                for token in (0, 1, config.canvas - 1):
                    first = max(0, length + token - config.window + 1) if sliding else 0
                    assert sorted(own[encoder[row, 0, token]].tolist()) == list(range(first, length + token + 1))
        lengths = [length + config.canvas for length in lengths]


def test_a_blocks_random_numbers_are_the_single_ones():
    random = CounterRandom(7, [3, 0, 1 << 31], 16, 1000, torch.device("cpu"))
    rows = torch.tensor([0, 2])
    canvas, u, fresh = random.ahead(rows, 5, 3)
    assert torch.equal(canvas, random.canvas(rows, 5)) and u.shape == fresh.shape == (3, 2, 16)
    for step in (1, 2, 3):
        probabilities = torch.full((2, 16, 1000), 1e-3)
        sampled, expected = random.draw(probabilities, rows, 5, step)
        assert torch.equal(fresh[step - 1], expected)
        assert (sampled - u[step - 1] * 1000).abs().max() <= 1


def test_stream_tells_steps_and_blocks(artifact, model, prompts):
    events = list(stream(model, Request(prompts[:2], artifact.generation, 128, seed=1, steps=3)))
    result = generate(model, Request(prompts[:2], artifact.generation, 128, seed=1, steps=3))
    blocks = [event for event in events if isinstance(event, Block)]
    assert [event.block for event in blocks] == [0, 1] and blocks[0].rows == (0, 1) and blocks[1].rows == (1,)
    assert blocks[0].ended == (True, False)
    assert torch.equal(blocks[0].canvas, result.canvases[:, :64])
    assert torch.equal(blocks[1].canvas[0], result.canvases[1, 64:])
    steps = [event for event in events if isinstance(event, Step)]
    assert [(event.block, event.step) for event in steps[:3]] == [(0, 1), (0, 2), (0, 3)]
    assert torch.equal(steps[-1].canvas, blocks[1].canvas)
    quiet = list(stream(model, Request(prompts[:2], artifact.generation, 128, seed=1, steps=3), every_step=False))
    assert [type(event) for event in quiet] == [Block, Block]


def test_a_stream_ends_where_another_begins(artifact, model, prompts, monkeypatch):
    """It is refused before it touches the other's memory: between steps, and where it would commit its block."""
    monkeypatch.setattr(engine, "OnCache", _SlotsAnywhere)
    settings = {"max_new_tokens": 128, "seed": 1, "steps": 3}
    expected = generate(model, Request(prompts[1:2], artifact.generation, **settings))
    for events in (2, 4):
        older = stream(model, Request(prompts[3:4], artifact.generation, **settings))
        seen = [next(older) for _ in range(events)]
        assert isinstance(seen[-1], Block) == (events == 4)
        newer = stream(model, Request(prompts[1:2], artifact.generation, **settings))
        first = next(newer)
        with pytest.raises(InputError, match="another answer was begun"):
            next(older)
        canvases = [event.canvas for event in (first, *newer) if isinstance(event, Block)]
        assert torch.equal(torch.cat(canvases, 1), expected.canvases)


def test_logits_that_are_no_numbers_are_forgotten(artifact, model, prompts, monkeypatch):
    """With the memory that they went into: a masked slot's value times 0 would be no number either."""
    monkeypatch.setattr(engine, "OnCache", _SlotsAnywhere)
    settings = {"max_new_tokens": 64, "seed": 1, "steps": 3}
    expected = generate(model, Request(prompts[:1], artifact.generation, **settings))
    with monkeypatch.context() as broken:
        broken.setattr(model, "final_norm", model.final_norm * torch.nan)
        with pytest.raises(InputError, match="the logits are not a number"):
            generate(model, Request(prompts[:1], artifact.generation, **settings))
    assert model.session is None
    same(expected, generate(model, Request(prompts[:1], artifact.generation, **settings)))


def test_rows_that_leave_are_computed_up_to_a_power_of_two(artifact, model):
    """For so many graphs are made; a place for nobody holds nothing that would be looked at."""
    session = Session(Plain(model), 6, 128, artifact.generation.sampler)
    session.slots.lengths.copy_(torch.arange(10, 16))
    config, lives = artifact.config, []
    random = CounterRandom(1, range(6), config.canvas, config.vocab, torch.device("cpu"))
    for rows in ([0, 1, 2, 4, 5], [0, 3, 4], [1, 2], [1]):
        session.keep(torch.tensor(rows))
        lives.append(session.live)
        session.state.begin(random, torch.arange(len(rows)), 1)
        assert session.state._done.tolist() == [place >= len(rows) for place in range(session.live)]
        assert not session.slots.lengths[len(rows) :].any()
    assert lives == [6, 4, 2, 1] and int(session.slots.lengths[0]) == 15


def test_a_capture_that_fails_leaves_no_graph(artifact, model, prompts, monkeypatch):
    """Memory runs out, or Ctrl-C, in the middle of one: what is half there would be replayed ever after."""
    captures = []

    @contextmanager
    def capture(graph, pool):
        captures.append(graph)
        if len(captures) == 2:
            raise torch.OutOfMemoryError("in the middle")
        yield

    for name, fake in (("CUDAGraph", object), ("graph", capture), ("graph_pool_handle", int), ("synchronize", int)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Plain, "capturable", True)
    model.drop_session()
    with pytest.raises(torch.OutOfMemoryError):
        on_slots(monkeypatch, model, Request(prompts[:1], artifact.generation, 64, 1, 3))
    assert list(model.session._graphs) == [("step", 1, "none")], "and none of what came after the step"
    model.drop_session()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_do_what_their_kernels_do(artifact, model, prompts):
    """In bfloat16, over blocks: bit for bit with and without graphs; logits are float32's but for roundings."""
    from dgq.runtime.engine.fast import Fast

    half = artifact.load("cuda")
    config, rows = artifact.config, torch.arange(len(prompts), device="cuda")
    logits, seen = [], []
    with torch.inference_mode():
        for backend in (Plain(artifact.load("cuda", torch.float32)), Fast(half), Fast(half)):
            graphs = len(seen) == 2
            backend.capturable = graphs
            session = Session(backend, len(prompts), 600, artifact.generation.sampler)
            session.start(prompts)
            random = CounterRandom(1, range(len(prompts)), config.canvas, config.vocab, torch.device("cuda"))
            logits.append([])
            seen.append([])
            for block in range(4):
                session.state.begin(random, rows, block)
                found = backend.decode(session.state, session._view()).float().view(len(prompts), config.canvas, -1)
                logits[-1].append(config.softcap * torch.tanh(found / config.softcap) if len(seen) > 1 else found)
                for _ in range(3):
                    session.step()
                    seen[-1].append(session.state.argmax.clone())
                canvas = torch.randint(0, config.vocab, (len(prompts), config.canvas), device="cuda")
                session.commit(canvas.fill_(block + 5))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    for exact, *others in zip(*logits, strict=True):
        assert torch.equal(*others)
        assert float((others[0] - exact).norm() / exact.norm()) < 0.1
