"""The kernels' backend against the reference's, on a model small enough for Triton's interpreter.

Kernel by kernel they are held against float64 in test_moe, test_fused and test_dense; on a GPU test_session compares
whole runs of `tiny`, and graphs with what they were made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch
from micro import micro_config, micro_tensors

from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.engine.plain import Plain
from dgq.runtime.engine.turns import SessionStore, Turns
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.session import Backend, Session
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.pictured import Pictured
from dgq.runtime.shape.settings import SamplerConfig

fast = pytest.importorskip("dgq.runtime.engine.fast", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton.runtime.)?interpreter"),
]
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3


ALL = {"_proj": "nvfp4", "embed_tokens": "q8_0"}  # recipe nvfp4-all


def small(schemes: dict[str, str]) -> tuple[ModelConfig, dict[str, Packed]]:
    """schemes: of the matrices whose name has this in it."""
    raw = micro_config()
    raw["text_config"] |= {"intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 128}
    raw["canvas_length"] = 16
    tensors = micro_tensors(raw)
    packed = {}
    for name, values in tensors.items():
        scheme = SCHEMES[next((s for word, s in schemes.items() if word in name), "bf16")]
        packed[name] = Packed(scheme, tuple(values.shape), scheme.quantize(values))
    return ModelConfig.from_json(raw, "config.json"), packed


def pictured() -> Pictured:
    """With an image of 20 tokens, longer than the window of 16, and one of 3."""
    embeddings = torch.randn(23, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    return Pictured([5, 6, *[99] * 20, 7, 8, 9, 10, *[99] * 3, 11, 12], embeddings.to(DEVICE), 99)


def run(backend: Backend, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
    """Logits before and after a committed block, and after a step's self-conditioning; the window is passed."""
    config, device = backend.config, backend.device
    session = Session(backend, 1, len(prompt) + 2 * 16, SamplerConfig(steps=2))
    session.start([prompt])
    random = CounterRandom(1, [0], config.canvas, config.vocab, device)
    for block in range(2):
        session.state.begin(random, torch.zeros(1, dtype=torch.int64, device=device), block)
        for step in range(1 if block else 2):
            if step:
                session.step()
            logits = backend.decode(session.state, session._view()).float().view(1, config.canvas, -1)
            yield logits.cpu()
        if not block:
            session.commit(torch.arange(16, device=device)[None] + 3)


@pytest.mark.parametrize(
    ("schemes", "prompt", "prefill", "count"),
    [({}, PROMPT, 2048, 3), ({}, pictured(), 7, 1), (ALL, PROMPT, 2048, 2)],
    ids=["text", "images, in pieces", "nvfp4-all"],
)
def test_logits_are_the_references(
    schemes: dict[str, str], prompt: Sequence[int], prefill: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """count: how many of run()'s logits."""
    monkeypatch.setattr("dgq.runtime.model.loading.decodes", lambda *_: False)  # packed, as on a small card
    config, weights = small(schemes)
    exact = run(Plain(Model(config, weights, DEVICE, torch.float32)), prompt)
    backend = fast.Fast(Model(config, weights, DEVICE, torch.bfloat16, options=LoadOptions(kernels=True)))
    backend.capturable, backend.prefill = False, prefill
    pairs = list(islice(zip(run(backend, prompt), exact, strict=True), count))
    assert len(pairs) == count
    for ours, theirs in pairs:
        capped = config.softcap * torch.tanh(ours / config.softcap)
        errors = (capped - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert float(errors.median()) < 0.03, "of most tokens; a near-tie in a router may fall the other way"


def test_a_new_block_has_nothing_of_the_last() -> None:
    """Rows that are left have their own numbers; a place for nobody is done, or a block would take all its steps."""
    config, _ = small({})
    room = torch.empty(3 * config.canvas, config.vocab, dtype=torch.bfloat16, device=DEVICE)
    state = fast.FastState(config, fast.PlainTable(room), 3, SamplerConfig(), room)
    random = CounterRandom(-7, [4, 9, 2], config.canvas, config.vocab, torch.device(DEVICE))
    state.soft.fill_(1)
    rows = torch.tensor([1, 2], device=DEVICE)
    state.begin(random, rows, 5)
    assert torch.equal(state.canvas[:2], random.canvas(rows, 5)) and not state.soft.any()
    assert state._all.done.tolist() == [0, 0, 1] and int(state.flag()) == 0
    state._all.done[:2] = 1
    assert int(state.flag()) == 1
    state._all.mean[1] = torch.nan
    assert int(state.flag()) & 2
    state.begin(random, rows, 6)
    assert state._all.done.tolist() == [0, 0, 1] and torch.equal(state.canvas[:2], random.canvas(rows, 6))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter two minutes; see test_chat")
def test_a_conversation_keeps_what_it_has() -> None:
    """A turn written anew in the middle of a reply, on rings that went around: logits as of a new session."""
    config, weights = small({})
    model = Model(config, weights, DEVICE, torch.bfloat16, options=LoadOptions(kernels=True))
    backend, sampler = fast.Fast(model), SamplerConfig(steps=2)
    session, turns = Session(backend, 1, 192, sampler), Turns()
    store = SessionStore(session)
    said = [(7 * i) % 120 + 3 for i in range(150)]

    def logits(here: Session) -> torch.Tensor:
        here.state.begin(CounterRandom(1, [0], config.canvas, config.vocab, backend.device), rows, 0)
        return backend.decode(here.state, here._view()).float().cpu()

    rows = torch.zeros(1, dtype=torch.int64, device=backend.device)
    with torch.inference_mode():
        for first, settled in ((said[:70], 66), (said[:68] + said[100:120], 84), (said[:68] + said[100:150], 110)):
            turns.settled = settled
            turns.begin(store, first, config.window)
            fresh = Session(backend, 1, 192, sampler)
            fresh.start([first])
            torch.testing.assert_close(logits(session), logits(fresh), atol=0.03, rtol=0.03)
            for _ in range(2):  # a reply of three blocks, of which two are committed
                canvas = torch.arange(16, device=backend.device)[None] + 3
                for one in (session, fresh):
                    one.commit(canvas)
                session.slots.reach(len(turns.ids) + 16)
                turns.ids += canvas[0].tolist()
            torch.testing.assert_close(logits(session), logits(fresh), atol=0.03, rtol=0.03)
    assert session.slots.first > 0 and turns.encoded < 118 - 68
