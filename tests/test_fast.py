"""The passes by kernels against the reference's, on a model small enough for Triton's interpreter.

Kernel by kernel they are held against float64 in test_moe, test_fused and test_dense; on a GPU test_session compares
whole runs of `tiny`, and graphs with what they were made of.
"""

from __future__ import annotations

import pytest
import torch
from micro import micro_config, micro_tensors

from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.config import ModelConfig
from dgq.runtime.model import Model
from dgq.runtime.plain import Plain
from dgq.runtime.rng import CounterRandom
from dgq.runtime.session import Passes, Session
from dgq.runtime.settings import SamplerConfig

fast = pytest.importorskip("dgq.runtime.fast", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
PROMPT = [[5, 6, 7, 8, 9, 10, 11, 12] * 3]


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


def run(passes: Passes, blocks: int) -> list[torch.Tensor]:
    """Logits before and after a committed block, and after a step's self-conditioning; the window is passed."""
    config, device = passes.config, passes.device
    session = Session(passes, 1, 24 + 2 * 16, SamplerConfig(steps=2))
    session.start(PROMPT)
    random = CounterRandom(1, [0], config.canvas, config.vocab, device)
    found = []
    for block in range(blocks):
        session.state.begin(random, torch.zeros(1, dtype=torch.int64, device=device), block)
        for step in range(1 if block else 2):
            if step:
                session.step()
            logits = passes.decode(session.state, session._view()).float().view(1, config.canvas, -1)
            found.append(logits.cpu())
        if block + 1 < blocks:
            session.commit(torch.arange(16, device=device)[None] + 3)
    return found


@pytest.mark.parametrize(("schemes", "blocks"), [({}, 2), (ALL, 1)], ids=["bf16", "nvfp4-all"])
def test_logits_are_the_references(schemes: dict[str, str], blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgq.runtime.model.decodes", lambda *_: False)  # packed, as on a small card
    config, weights = small(schemes)
    exact = run(Plain(Model(config, weights, DEVICE, torch.float32)), blocks)
    passes = fast.Fast(Model(config, weights, DEVICE, torch.bfloat16, kernels=True))
    passes.capturable = False
    for ours, theirs in zip(run(passes, blocks), exact, strict=True):
        capped = config.softcap * torch.tanh(ours / config.softcap)
        errors = (capped - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert float(errors.median()) < 0.03, "of most tokens; a near-tie in a router may fall the other way"
