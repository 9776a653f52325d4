"""The fast runtime in bfloat16 against transformers' eager DiffusionGemma, dynamic cache, on `tiny`.

The noise of bfloat16 is what transformers' own bfloat16 is off its float32, in norm over a canvas's logits; the runtime
may be 1.25 times as far off. By kernels on a GPU; on a CPU by the reference's operations, which says that this test
compares like with like (their parity in float32 is test_runtime_parity's).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dgq.runtime.engine.plain import Plain
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.session import Backend, Session

transformers = pytest.importorskip("transformers")
RECIPES = Path(__file__).parents[2] / "recipes"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (150, 31, 97)  # tokens of the prompts; the window has 64, a block too
BLOCKS = 4


class Eager:
    """Its cache, filled with left padding."""

    def __init__(self, dtype: torch.dtype, prompts: list[list[int]], pad: int) -> None:
        self._model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
            RECIPES / "tiny", dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
        )
        self._model = self._model.eval().to(DEVICE)
        self._cache = transformers.DynamicCache(config=self._model.config.get_text_config())
        self._length, longest = 0, max(map(len, prompts))
        self._real = torch.zeros(len(prompts), 0, dtype=torch.bool, device=DEVICE)
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=DEVICE)
        real = [[False] * (longest - len(row)) + [True] * len(row) for row in prompts]
        self.encode(ids, torch.tensor(real, device=DEVICE))

    def encode(self, ids: torch.Tensor, real: torch.Tensor) -> None:
        self._real = torch.cat((self._real, real), 1)
        places = torch.arange(self._length, self._length + ids.shape[1], device=DEVICE)[None]
        self._model.model.encoder(
            input_ids=ids, attention_mask=self._real, past_key_values=self._cache, position_ids=places
        )
        self._length += ids.shape[1]

    def decode(self, canvas: torch.Tensor) -> torch.Tensor:
        width = canvas.shape[1]
        seen = torch.nn.functional.pad(self._real, (0, width), value=True)
        places = torch.arange(self._length, self._length + width, device=DEVICE)[None]
        step = {"past_key_values": self._cache, "decoder_attention_mask": seen, "decoder_position_ids": places}
        logits: torch.Tensor = self._model(decoder_input_ids=canvas, **step).logits
        return logits.double()


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def runtime(artifact: Any) -> Backend:
    if DEVICE == "cpu":
        return Plain(artifact.load("cpu", torch.bfloat16, kernels=False))
    from dgq.runtime.engine.fast import Fast

    return Fast(artifact.load("cuda"))


@torch.inference_mode()
def test_logits_are_within_bfloat16s_noise() -> None:
    """Prompts of different lengths; committed blocks, the later ones by CUDA graphs, take the window on four times."""
    artifact = open_artifact(RECIPES / "tiny")
    config, rows = artifact.config, torch.arange(len(LENGTHS), device=DEVICE)
    texts = (RECIPES / "prompts" / "heldout_text.jsonl").read_text("utf-8").splitlines()
    ids = [token for line in texts for token in artifact.tokenizer.encode(json.loads(line)["text"])]
    prompts = [ids[300 * i : 300 * i + length] for i, length in enumerate(LENGTHS)]
    eager = [Eager(dtype, prompts, artifact.generation.pad_id) for dtype in (torch.float32, torch.bfloat16)]
    backend = runtime(artifact)
    session = Session(backend, len(prompts), max(LENGTHS) + (BLOCKS + 1) * config.canvas, artifact.generation.sampler)
    session.start(prompts)
    random = CounterRandom(1, range(len(prompts)), config.canvas, config.vocab, torch.device(DEVICE))
    for block in range(BLOCKS + 1):
        session.state.begin(random, rows, block)
        canvas = random.canvas(rows, block)
        exact, theirs = (one.decode(canvas) for one in eager)
        ours = backend.decode(session.state, session._view()).double().view_as(exact)
        if DEVICE == "cuda":  # kernels leave the cap to the sampler
            ours = config.softcap * torch.tanh(ours / config.softcap)
        print(f"block {block}: ours {off(ours, exact):.5f}, transformers {off(theirs, exact):.5f} off float32")
        assert off(ours, exact) <= 1.25 * off(theirs, exact)
        committed = torch.tensor(ids[2000 + 64 * block :][: canvas.numel()], device=DEVICE).view_as(canvas)
        session.commit(committed)
        for one in eager:
            one.encode(committed, torch.ones_like(committed, dtype=torch.bool))
    assert min(LENGTHS) + BLOCKS * config.canvas > 4 * config.window
