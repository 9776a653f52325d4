"""The sampler's rules on small numbers, and generate()'s bookkeeping.

Tokens are compared with transformers' in test_runtime_parity, batches with single runs in test_batches.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.rng import CounterRandom, TorchRandom
from dgq.runtime.model.sampler import Stopper, accept, decide, temperature
from dgq.runtime.shape.settings import SamplerConfig

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"


@pytest.fixture(scope="module")
def tiny():
    artifact = open_artifact(TINY_A)
    return artifact.load(), artifact.generation


def test_temperature_runs_from_t_max_to_nearly_t_min():
    config = SamplerConfig(steps=4, t_min=0.4, t_max=0.8)
    schedule = [float(temperature(left, config, torch.device("cpu"))) for left in (4, 3, 2, 1)]
    assert schedule == pytest.approx([0.8, 0.7, 0.6, 0.5])


def test_accept_counts_all_but_the_largest():
    entropy = torch.tensor([[0.06, 2.0, 0.05, 0.03], [0.5, 0.6, 0.7, 0.8]])
    # ascending .03 .05 .06 2.0: what comes before each is 0, .03, .08, .14; the least is always accepted
    assert accept(entropy, 0.1).tolist() == [[True, False, True, True], [True, False, False, False]]
    assert accept(entropy, 0.15).tolist()[0] == [True] * 4
    assert accept(torch.tensor([[0.25, 0.5, 0.25]]), 0.5).tolist() == [[True] * 3], "the bound itself is within it"


def randoms(vocab, length):
    """One row's stream of either kind."""
    cpu = torch.device("cpu")
    return [CounterRandom(0, [0], length, vocab, cpu), TorchRandom(0, length, vocab, cpu)]


@pytest.mark.parametrize("kind", [0, 1], ids=["counter", "torch"])
def test_decide(kind):
    logits = torch.full((1, 3, 8), -20.0)
    logits[0, 0, 5] = logits[0, 2, 1] = 20.0
    logits[0, 1] = 0.0
    random = randoms(8, 3)[kind]
    config = SamplerConfig(steps=2, t_min=0.4, t_max=0.8)
    decision = decide(logits, 1, config, lambda p: random.draw(p, torch.tensor([0]), 0, 2))
    torch.testing.assert_close(decision.logits, logits / 0.6)
    assert decision.entropy[0].tolist() == pytest.approx([0.0, math.log(8), 0.0], abs=1e-5)
    assert decision.argmax[0, 0] == 5 and decision.argmax[0, 2] == 1
    assert decision.accepted.tolist() == [[True, True, True]]  # one uncertain position is as good as independent
    assert decision.canvas[0, 0] == 5 and decision.canvas[0, 2] == 1


def test_rejected_positions_get_fresh_tokens():
    sampled, fresh = torch.full((1, 64), 3), torch.full((1, 64), 5)
    decision = decide(torch.zeros(1, 64, 1000), 1, SamplerConfig(), lambda p: (sampled, fresh))
    assert int(decision.accepted.sum()) == 1
    assert torch.equal(decision.canvas, torch.where(decision.accepted, sampled, fresh))


@pytest.mark.parametrize("kind", [0, 1], ids=["counter", "torch"])
def test_noise_is_new_every_time(kind):
    rows, random = torch.tensor([0]), randoms(1000, 64)[kind]
    uniform = torch.full((1, 64, 1000), 1e-3)
    drawn = [random.canvas(rows, 0), *random.draw(uniform, rows, 0, 1), *random.draw(uniform, rows, 0, 2)]
    for tokens in drawn:
        assert tokens.shape == (1, 64) and tokens.min() >= 0 and tokens.max() < 1000 and len(tokens.unique()) > 50
    for i, tokens in enumerate(drawn):
        assert all(int((tokens == other).sum()) <= 3 for other in drawn[:i])


def test_stopper():
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])
    sure, unsure = torch.full((2, 2), 0.001), torch.tensor([[0.001, 0.02], [0.001, 0.001]])
    stopper = Stopper(SamplerConfig(stability=1, confidence=0.005))
    assert stopper.done(a, sure).tolist() == [False, False]  # nothing to compare with
    assert stopper.done(b, sure).tolist() == [True, False]
    assert stopper.done(b, unsure).tolist() == [False, True]
    stopper = Stopper(SamplerConfig(stability=2))
    assert [stopper.done(a, sure).tolist() for _ in range(3)] == [[False] * 2, [False] * 2, [True] * 2]
    assert Stopper(SamplerConfig(stability=0)).done(a, unsure).tolist() == [False, True]


def test_result_is_cut(tiny):
    """At max_new_tokens exactly (not at whole canvases), and before the first end-of-sequence token."""
    model, generation = tiny
    endless = replace(generation, eos_ids=())
    full = generate(model, Request([[5, 6, 7]], endless, 64, seed=1, steps=3))
    cut = generate(model, Request([[5, 6, 7]], endless, 40, seed=1, steps=3))
    assert full.tokens == full.canvases.tolist() and len(full.tokens[0]) == 64
    assert cut.tokens[0] == full.tokens[0][:40] and cut.ended == [False]
    assert cut.canvases.shape == (1, 64) and cut.steps == [[3, 3]] and cut.stopped_early == [[False, False]]
    eos = full.tokens[0][20]
    at = full.tokens[0].index(eos)
    ended = generate(model, Request([[5, 6, 7]], replace(generation, eos_ids=(eos,)), 64, seed=1, steps=3))
    assert ended.tokens[0] == full.tokens[0][:at] and ended.ended == [True]
    assert ended.canvases[0, at] == eos and ended.canvases[0, at + 1 :].eq(generation.pad_id).all()
    assert ended.canvases.shape == (1, 32) and ended.steps == [[3]]
    late = generate(model, Request([[5, 6, 7]], replace(generation, eos_ids=(eos,)), max(1, at), seed=1, steps=3))
    assert late.ended == [at == 0]  # the token lies behind the cut


def test_the_context_can_be_filled(tiny):
    model, generation = tiny
    prompt = [5] * (model.config.context - model.config.canvas)
    assert len(generate(model, Request([prompt], replace(generation, eos_ids=()), 32, seed=1, steps=1)).tokens[0]) == 32
    with pytest.raises(InputError, match="2017 tokens and 32 new ones"):
        generate(model, Request([[*prompt, 5]], generation, 32, steps=1))


def test_same_seed_same_tokens(tiny):
    model, generation = tiny
    for rng in ("counter", "torch"):
        settings = {"steps": 2, "rng": rng}
        one, two, other, drawn, again = (
            generate(model, Request([[9, 8]], generation, 32, seed=s, **settings)).canvases
            for s in (4, 4, 5, None, None)
        )
        assert torch.equal(one, two) and not torch.equal(one, other) and not torch.equal(drawn, again)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    generate(
        model, Request([[9, 8]], generation, 32, steps=1, rng="torch")
    )  # an own generator: the caller's stream stays
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_draw_has_its_own_place(tiny, monkeypatch):
    """Step 0 is the noise; nothing is counted twice."""
    model, generation = tiny
    counted, stock = [], CounterRandom.words

    def words(self, rows, block, step):
        counted.append((block, step))
        return stock(self, rows, block, step)

    monkeypatch.setattr(CounterRandom, "words", words)
    generate(model, Request([[5]], replace(generation, eos_ids=()), 64, seed=0, steps=2))
    assert counted == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_on_step(tiny):
    model, generation = tiny
    seen = []
    result = generate(
        model, Request([[5], [6, 7]], replace(generation, eos_ids=()), 64, seed=0, steps=3), on_step=seen.append
    )
    assert [(s.block, s.step, s.steps) for s in seen] == [(b, n, 3) for b in (0, 1) for n in (1, 2, 3)]
    assert seen[0].canvas.shape == seen[0].accepted.shape == (2, 32) and seen[0].entropy.shape == (2,)
    assert torch.equal(seen[2].canvas, result.canvases[:, :32])


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([[5], []], {}, "the prompt is empty"),
        ([[5, 512]], {}, "token 512, the vocabulary has 512"),
        ([[-1]], {}, "token -1"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[5]], {"steps": 0}, "steps is 0"),
        ([[5]], {"rng": "philox"}, "rng is 'philox', expected one of counter, torch"),
        ([[5]], {"seed": 1 << 64}, "seed 18446744073709551616 does not fit"),
        ([[5]], {"seed": -(1 << 63) - 1}, "does not fit"),
        ([[5]], {"rows": [0, 1]}, "rows has 2 numbers for 1 prompts"),
        ([[5], [6]], {"rows": [0, -1]}, "outside 0 to 4294967295"),
        ([[5]], {"rows": [1 << 32]}, "outside 0 to 4294967295"),
        ([[5]], {"rows": [3], "rng": "torch"}, "rng=torch has no numbers"),
        ([[5] * 2000], {"max_new_tokens": 33}, "2000 tokens and 64 new ones"),
    ],
)
def test_bad_requests(tiny, rows, settings, words):
    model, generation = tiny
    with pytest.raises(InputError) as error:
        generate(model, Request(rows, generation, **settings))
    assert words in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_on_cuda(tiny, dtype):
    """Left padding, several blocks, either stream: the same seed gives the same tokens."""
    generation = replace(tiny[1], eos_ids=())
    model = open_artifact(TINY_A).load("cuda", dtype)
    for rng in ("counter", "torch"):
        runs = [
            generate(model, Request([[5, 6, 7], [8] * 40], generation, 96, seed=3, steps=4, rng=rng)) for _ in range(2)
        ]
        assert runs[0].tokens == runs[1].tokens and len(runs[0].tokens[1]) == 96
