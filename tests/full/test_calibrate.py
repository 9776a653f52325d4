"""Input scales: which activations are looked at, and that nothing else decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from micro import micro_config, micro_tensors, write_micro

from dgq.convert.calibration import input_scales
from dgq.convert.cli.__main__ import main
from dgq.convert.source.checkpoint import open_source
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model.model import Model

TINY = Path(__file__).parents[2] / "recipes" / "tiny"


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
    scales, about = input_scales.input_scales(open_source("tiny"), "cpu", lambda done, total: None)
    texts, chats = input_scales.TEXTS // input_scales.BATCH, input_scales.CHATS // input_scales.BATCH
    chat = ["encode"] * input_scales.BATCH + ["decode"] * input_scales.DRAFTS
    assert [name for name, _, _ in calls] == ["encode", "decode", "decode"] * texts + chat * chats
    assert calls[0][1].shape == (input_scales.BATCH, about["prompt_tokens"])
    assert [conditioning is None for name, _, conditioning in calls if name == "decode"] == (
        [True, False] * texts + ([True] + [False] * (input_scales.DRAFTS - 1)) * chats
    )
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
    caches: list[Any] = []
    with torch.no_grad():
        for name, ids, conditioning in calls:
            side = "encoder" if name == "encode" else "decoder"
            if name == "encode":
                cache = transformers.DynamicCache(config=oracle.config.get_text_config())
                oracle.model.encoder(input_ids=ids, past_key_values=cache)
                caches.append((cache, *ids.shape))
                continue
            # chats are encoded one by one and decoded together; here each stays alone
            alone = caches[-1][1] == 1
            parts = [slice(i, i + 1) for i in range(len(ids))] if alone else [slice(None)]
            for part, (cache, _, length) in zip(parts, caches[-len(parts) :], strict=True):
                step = {"decoder_input_ids": ids[part], "past_key_values": cache}
                step["decoder_position_ids"] = torch.arange(length, length + ids.shape[1])[None]
                oracle(**step, self_conditioning_logits=None if conditioning is None else conditioning[part])
    for side in seen:
        assert seen[side].keys() == about["amax"][side].keys()
        for name, value in seen[side].items():
            assert value * 0.9999 <= about["amax"][side][name] <= value * 1.009, (side, name)
    louder = set()
    for name, scale in scales.items():
        both = {side: about["amax"][side][name] for side in seen}
        assert scale == pytest.approx(input_scales.HEADROOM * max(both.values()) / 2688, rel=1e-6)
        louder.add(max(both, key=lambda side: both[side]))
    assert louder == {"encoder", "decoder"}, "either side decides somewhere, or one of them need not be run"


def test_texts_chats_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts begin at their beginnings, chats end where an answer would, canvases are replaced by their rows' shares."""
    source = open_source("tiny")
    tokenizer = Tokenizer.from_dir(source.path)
    texts, chats = input_scales._texts(source, tokenizer), input_scales._chats(source, tokenizer)
    assert texts.shape == (input_scales.TEXTS, input_scales.PROMPT + 64) and bool((texts[:, 0] == 2).all()), "<bos>"
    assert len({tuple(row.tolist()) for row in texts}) == input_scales.TEXTS and not bool((texts == 0).any())
    assert all(tokenizer.decode(chat, keep_special=True).endswith("<|turn>model\n") for chat in chats)
    decoded: list[torch.Tensor] = []
    stock = Model.decode

    def decode(self: Model, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        decoded.append(ids)
        return stock(self, ids, *rest)

    monkeypatch.setattr(Model, "decode", decode)
    input_scales.input_scales(source, "cpu", lambda done, total: None)
    canvases = torch.cat(decoded[0 : 2 * input_scales.TEXTS // input_scales.BATCH : 2])
    shares = (canvases != texts[:, -64:]).float().mean(1).tolist()
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.12)


def test_a_model_that_cannot_be_calibrated(tmp_path: Path) -> None:
    config = micro_config()
    config["text_config"] |= {"max_position_embeddings": 16}
    expected = "context of 16 has no room for a prompt and a canvas of 16"
    source = write_micro(tmp_path / "in", config, micro_tensors(config))
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "nvfp4", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and expected in result.stderr and "--input-scale" in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    """A fine-tune of a base model: its chats are plain text."""
    source = write_micro(tmp_path / "in")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    (source / "tokenizer_config.json").write_text("{}")
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "nvfp4", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_the_same_scales_every_time() -> None:
    found = [input_scales.input_scales(open_source("tiny"), "cpu", lambda done, total: None) for _ in range(2)]
    assert found[0] == found[1]
