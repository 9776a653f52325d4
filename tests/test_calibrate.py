"""Input scales: which activations are looked at, and that nothing else decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgq.convert import calibrate
from dgq.convert.source import open_source
from dgq.runtime.model import Model

TINY = Path(__file__).parent.parent / "recipes" / "tiny"


def test_amax_of_both_sides_against_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows and canvases through transformers, its experts watched: prompt, canvas, canvas conditioned."""
    import transformers

    calls: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []
    for name in ("encode", "decode"):
        stock = getattr(Model, name)

        def recorded(self: Model, ids: torch.Tensor, cache: Any, *rest: Any, n: str = name, f: Any = stock) -> Any:
            calls.append((n, ids, rest[0] if rest else None))
            return f(self, ids, cache, *rest)

        monkeypatch.setattr(Model, name, recorded)
    _, about = calibrate.input_scales(open_source("tiny"), "cpu", lambda done, total: None)
    assert [name for name, _, _ in calls] == ["encode", "decode", "decode"] * (calibrate.ROWS // calibrate.BATCH)
    assert {ids.shape for name, ids, _ in calls if name == "encode"} == {(calibrate.BATCH, about["prompt_tokens"])}
    oracle = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    seen: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
    side = "encoder"
    names = {
        id(layer.experts): f"model.decoder.layers.{i}.experts."
        for stack in (oracle.model.decoder, oracle.model.encoder.language_model)
        for i, layer in enumerate(stack.layers)
    }
    assert len(names) == 12
    linear = torch.nn.functional.linear

    def keep(name: str, x: torch.Tensor) -> None:
        seen[side][name] = max(seen[side].get(name, 0.0), float(x.abs().max()))

    (kind,) = {type(module) for module in oracle.modules() if id(module) in names}
    stock_forward = kind.forward

    def forward(self: Any, *arguments: Any) -> Any:
        def watched(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
            keep(names[id(self)] + ("gate_up_proj" if weight.shape[1] == 256 else "down_proj"), x)
            return linear(x, weight, *rest)

        monkeypatch.setattr(torch.nn.functional, "linear", watched)
        try:
            return stock_forward(self, *arguments)
        finally:
            monkeypatch.setattr(torch.nn.functional, "linear", linear)

    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad():
        for name, ids, conditioning in calls:
            side = "encoder" if name == "encode" else "decoder"
            if name == "encode":
                cache = transformers.DynamicCache(config=oracle.config.get_text_config())
                oracle.model.encoder(input_ids=ids, past_key_values=cache)
                continue
            positions = torch.arange(about["prompt_tokens"], about["prompt_tokens"] + ids.shape[1])[None]
            step = {"decoder_input_ids": ids, "past_key_values": cache, "decoder_position_ids": positions}
            oracle(**step, self_conditioning_logits=conditioning)
    for side in seen:
        assert seen[side].keys() == about["amax"][side].keys()
        for name, value in seen[side].items():
            assert about["amax"][side][name] == pytest.approx(value, rel=1e-4), (side, name)


def test_rows_and_noise() -> None:
    """Windows of one length at equal gaps, no padding; shares of a canvas replaced as the module says."""
    source = open_source("tiny")
    from dgq.runtime.tokenizer import Tokenizer

    rows = calibrate._rows(source, Tokenizer.from_dir(source.path))
    assert rows.shape == (calibrate.ROWS, calibrate.PROMPT + 64)
    assert len({tuple(row.tolist()) for row in rows}) == calibrate.ROWS
    assert int(rows.max()) < 2048 and not bool((rows == 0).any())


def test_the_same_scales_every_time() -> None:
    found = [calibrate.input_scales(open_source("tiny"), "cpu", lambda done, total: None) for _ in range(2)]
    assert found[0] == found[1]
