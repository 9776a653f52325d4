"""What a prompt gets does not depend on its batch: padding, neighbours that finish first, order; nor on the device.

On one CPU thread with MKL a row's logits are the same to the bit. Elsewhere, and on a GPU, a batch's products round
otherwise than a single row's, so a near-tie can fall the other way and the tokens part: rarely in a canvas that settles
in two or three steps, now and then in one that takes forty. Hence few steps for texts where that must not matter.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgq.quant.errors import InputError
from dgq.runtime.engine import batch as batches
from dgq.runtime.engine.engine import Request, generate, stream
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.rng import CounterRandom

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS, BLOCKS = 5, 3


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(RECIPES / "tiny")


@pytest.fixture(scope="module")
def model(artifact):
    return artifact.load("cpu", torch.float32)


def held_out(kind):
    return [json.loads(line) for line in (RECIPES / "prompts" / f"heldout_{kind}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tasks(artifact):
    return [artifact.tokenizer.chat(task["messages"]) for task in held_out("tasks")]


@pytest.fixture(scope="module")
def five(artifact, tasks):
    """Tasks, which end in their first canvas, and texts, which go on: shorter than the window, and past it."""
    texts = [artifact.tokenizer.encode(item["text"]) for item in held_out("text")]
    return [tasks[0], texts[0][:150], tasks[5], texts[1][:31], tasks[3]]


@pytest.fixture(scope="module")
def watched(artifact, model, five):
    """The five together: the result and every Step."""
    seen = []
    request = Request(five, artifact.generation, BLOCKS * 64, seed=1, steps=STEPS)
    return generate(model, request, seen.append), seen


@pytest.fixture(scope="module")
def batch(watched):
    return watched[0]


def same(result, other, rows, others=None):
    """The rows of one result are the others' of another, in every field."""
    for row, at in zip(rows, others or range(len(rows)), strict=True):
        for field in ("tokens", "ended", "steps", "stopped_early"):
            assert getattr(result, field)[row] == getattr(other, field)[at], f"row {row}: {field}"
        made = min(result.canvases.shape[1], other.canvases.shape[1])
        assert torch.equal(result.canvases[row, :made], other.canvases[at, :made])


def test_a_batch_of_five_is_five_single_runs(artifact, model, five, batch):
    assert len({len(prompt) for prompt in five}) == 5
    assert [len(steps) for steps in batch.steps] == [1, BLOCKS, 1, BLOCKS, 1]
    assert batch.ended == [True, False, True, False, True]
    assert len({count for steps in batch.steps for count in steps}) > 2, "rows stop at different steps"
    for row, prompt in enumerate(five):
        alone = generate(model, Request([prompt], artifact.generation, BLOCKS * 64, seed=1, steps=STEPS, rows=[row]))
        same(batch, alone, [row])
        assert batch.canvases[row, alone.canvases.shape[1] :].eq(artifact.generation.pad_id).all()


@pytest.mark.parametrize("start", [0, 40, 80])
def test_tasks_in_batches_of_five(artifact, model, tasks, start):
    """As released: up to 48 steps."""
    prompts = tasks[start : start + 5]
    together = generate(model, Request(prompts, artifact.generation, 64, seed=start))
    for row, prompt in enumerate(prompts):
        same(together, generate(model, Request([prompt], artifact.generation, 64, seed=start, rows=[row])), [row])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries round by the batch's size")
def test_a_row_of_a_batch_is_the_row_alone_to_the_bit(artifact, model, five, monkeypatch, request):
    """Every logit of two blocks: without that, 28 % of such texts part within 74 steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # MKL shares the rows out among threads
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    endless = replace(artifact.generation, eos_ids=(), sampler=replace(artifact.generation.sampler, confidence=0.0))
    seen, stock = [], batches.decide

    def decide(logits, *rest):
        seen.append(logits)
        return stock(logits, *rest)

    monkeypatch.setattr(batches, "decide", decide)

    def logits(rows):
        """(steps of both blocks, rows, canvas, vocab)"""
        seen.clear()
        generate(model, Request([five[row] for row in rows], endless, 128, seed=4, steps=12, rows=rows))
        return torch.stack(seen)

    together = logits([1, 3, 4])
    for at, row in enumerate((1, 3, 4)):
        assert torch.equal(together[:, at : at + 1], logits([row])), f"row {row}"


def test_order_and_neighbours_do_not_matter(artifact, model, five, batch):
    settings = {"max_new_tokens": BLOCKS * 64, "seed": 1, "steps": STEPS}
    order = [3, 0, 4]
    shuffled = generate(model, Request([five[row] for row in order], artifact.generation, **settings, rows=order))
    same(batch, shuffled, order)


def test_seed_and_row_make_the_difference(artifact, model, five):
    def first(seed, rows):
        return generate(model, Request([five[1]], artifact.generation, 64, seed=seed, steps=1, rows=rows)).canvases

    one = first(1, [0])
    assert torch.equal(one, first(1, None))
    assert not torch.equal(one, first(2, [0])) and not torch.equal(one, first(1, [1]))
    twice = generate(model, Request([five[1]] * 2, artifact.generation, 64, seed=1, steps=1)).canvases
    assert not torch.equal(twice[0], twice[1])


def test_rows_with_seeds_of_their_own(artifact, model, five):
    """A server's batch: what each prompt would get alone as row 0 with its seed."""
    rows, seeds = [0, 1, 3], [5, 6, 2**63]
    prompts = [five[row] for row in rows]
    settings = {"generation": artifact.generation, "max_new_tokens": 128, "steps": STEPS}
    together = generate(model, Request(prompts, **settings, seed=seeds, rows=[0, 0, 0]))
    for at, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        same(together, generate(model, Request([prompt], **settings, seed=seed)), [at], [0])
    with pytest.raises(InputError, match="seed has 2 numbers for 3 prompts"):
        generate(model, Request(prompts, **settings, seed=[1, 2]))
    with pytest.raises(InputError, match="one seed"):
        generate(model, Request(prompts, **settings, seed=seeds, rng="torch"))


def test_a_row_that_nobody_waits_for_leaves(artifact, model, five, batch):
    """Row 1 after its first block; row 3 goes on as though nothing had happened."""
    seen, unwanted = [], set()
    settings = {"max_new_tokens": BLOCKS * 64, "seed": 1, "steps": STEPS, "leaving": lambda: unwanted}
    for block in stream(model, Request(five, artifact.generation, **settings), every_step=False):
        seen.append(block)
        unwanted.add(1)
    assert [block.rows for block in seen] == [(0, 1, 2, 3, 4), (3,), (3,)]
    kept = torch.cat([block.canvas[block.rows.index(3)] for block in seen])
    assert torch.equal(kept, batch.canvases[3])


def test_finished_rows_leave_and_nobody_notices(artifact, model, five, watched, monkeypatch):
    """Steps show who is still there; the results are those of a batch that everybody stays in."""
    batch, seen = watched
    assert {(step.block, step.rows) for step in seen} == {(0, (0, 1, 2, 3, 4)), (1, (1, 3)), (2, (1, 3))}
    assert all(len(step.canvas) == len(step.accepted) == len(step.entropy) == len(step.rows) for step in seen)
    monkeypatch.setattr(CounterRandom, "independent", False)
    seen = []
    stayed = generate(model, Request(five, artifact.generation, BLOCKS * 64, seed=1, steps=STEPS), seen.append)
    assert {step.rows for step in seen} == {(0, 1, 2, 3, 4)}
    same(batch, stayed, range(5))
    assert torch.equal(batch.canvases, stayed.canvases)


def test_torchs_stream_needs_everybody(artifact, model, five):
    seen = []
    settings = {"max_new_tokens": 128, "seed": 1, "steps": 2, "rng": "torch"}
    result = generate(model, Request(five, artifact.generation, **settings), on_step=seen.append)
    assert {step.rows for step in seen} == {(0, 1, 2, 3, 4)} and {step.block for step in seen} == {0, 1}
    assert [len(steps) for steps in result.steps] == [1, 2, 1, 2, 1]
    assert result.canvases[0, 64:].eq(artifact.generation.pad_id).all()


def test_a_padded_row_computes_what_it_computes_alone(artifact, model, five):
    """Logits over four blocks; after the second, the other rows are dropped from the cache."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(5, max(map(len, five)), dtype=torch.long)
    padding = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(five):
        ids[row, -len(prompt) :], padding[row, -len(prompt) :] = torch.tensor(prompt), False
    cache, alone = model.new_cache(5), [model.new_cache(1) for _ in five]
    model.encode(ids, cache, padding=padding)
    for prompt, own in zip(five, alone, strict=True):
        model.encode(torch.tensor([prompt]), own)
    rows = [0, 1, 2, 3, 4]
    for block in range(4):
        canvas = torch.randint(0, artifact.config.vocab, (5, 64), generator=generator)[rows]
        logits = model.decode(canvas, cache)
        for at, row in enumerate(rows):
            expected = model.decode(canvas[at : at + 1], alone[row])
            torch.testing.assert_close(logits[at : at + 1], expected, atol=1e-4, rtol=0, msg=f"block {block} row {row}")
            model.encode(canvas[at : at + 1], alone[row])
        model.encode(canvas, cache)
        if block == 1:
            rows, before = [1, 3, 4], cache.nbytes
            cache.keep(torch.tensor(rows))
            assert cache.rows == 3 and cache.nbytes * 5 == before * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_cuda_write_the_same(artifact, model, tasks, five, batch):
    """In float32: 40 tasks as released, and the batch above."""
    there = artifact.load("cuda", torch.float32)
    for start in range(0, 40, 5):
        results = [
            generate(m, Request(tasks[start : start + 5], artifact.generation, 64, seed=2)) for m in (model, there)
        ]
        same(*results, range(5))
    same(batch, generate(there, Request(five, artifact.generation, BLOCKS * 64, seed=1, steps=STEPS)), range(5))
    endless = replace(artifact.generation, eos_ids=())
    results = [generate(m, Request(five[::2], endless, 128, seed=3)) for m in (model, there)]
    same(*results, range(3))
