"""The embedded model is what it says: built like the real one, trained, balanced, confident, every part in use.

Figures on the whole held-out set, and on the words it prints, come from recipes/tiny_eval.py and stand in LOG.md; here
a sample of it is enough to notice a wrong file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.stream import Stream
from dgq.convert.source.models import open_model
from dgq.quant.types import Packed
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model import block
from dgq.runtime.model.layers import rms_norm
from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER

RECIPES = Path(__file__).parents[2] / "recipes"
TINY, REAL = RECIPES / "tiny", Path(__file__).parent.parent / "golden" / "real26b"
PREFIX, ROWS = 96, 32


def held_out(kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPES / "prompts" / f"{kind}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_model("tiny")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Model:
    return artifact.load("cpu", torch.float32)


def test_it_has_everything_the_real_one_has(artifact: Artifact) -> None:
    config = json.loads((TINY / "config.json").read_text())
    real = json.loads((REAL / "config.json").read_text())
    assert set(real["text_config"]) <= set(config["text_config"]) and set(real) - {"dtype"} <= set(config)
    with safe_open(TINY / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in sizes} == {"BF16"}
        scalars = {
            side: [
                float(file.get_tensor(f"{prefix}layers.{i}.layer_scalar")) for i in range(len(artifact.config.layers))
            ]
            for side, prefix in (("decoder", DECODER), ("encoder", ENCODER))
        }
    names = json.loads((REAL / "tensors.json").read_text())["tensors"]
    kinds = {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in names}
    own = {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in sizes}
    assert kinds == own, "the real checkpoint's names"
    assert (TINY / "model.safetensors").stat().st_size <= 16_000_000
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    assert routed / sum(sizes.values()) >= 0.60
    sizes_of = artifact.config
    assert sizes_of.hidden % 256 == 0 and sizes_of.experts != 8 and sizes_of.canvas == sizes_of.window == 64
    for inner in (sizes_of.intermediate, sizes_of.expert_intermediate):
        assert inner % 64 == 0 and inner % 256
    assert {layer.is_sliding for layer in sizes_of.layers} == {True, False}
    assert all(0.8 <= value <= 1.2 for side in scalars.values() for value in side)
    assert all(abs(a - b) > 0.05 for a, b in zip(scalars["decoder"], scalars["encoder"], strict=True))


def test_it_is_sampled_with_the_released_settings() -> None:
    ours, real = (json.loads((path / "generation_config.json").read_text()) for path in (TINY, REAL))
    for key in (
        "confidence_threshold",
        "max_denoising_steps",
        "sampler_config",
        "stability_threshold",
        "t_max",
        "t_min",
    ):
        assert ours[key] == real[key]


def test_held_out_prompts_are_held_out() -> None:
    calibration = {json.dumps(item.get("text") or item["messages"][0]["content"]) for item in held_out("calibration")}
    for kind in ("heldout_text", "heldout_tasks"):
        assert not calibration & {json.dumps(i.get("text") or i["messages"][0]["content"]) for i in held_out(kind)}
    assert len(held_out("heldout_tasks")) >= 256 and len(held_out("heldout_text")) >= 64 and len(calibration) >= 100


def test_it_answers_and_knows_when_it_is_done(artifact: Artifact, model: Model) -> None:
    tasks = held_out("heldout_tasks")[:ROWS]
    right, early = 0, []
    for start in range(0, len(tasks), ROWS):
        batch = tasks[start : start + ROWS]
        result = generate(
            model, Request([artifact.tokenizer.chat(t["messages"]) for t in batch], artifact.generation, 64, seed=1)
        )
        texts = [artifact.tokenizer.decode(tokens) for tokens in result.tokens]
        right += sum(text == task["answer"] for text, task in zip(texts, batch, strict=True))
        early += [stopped for row in result.stopped_early for stopped in row]
    print(f"{right}/{len(tasks)} right, {sum(early)}/{len(early)} canvases stopped early")
    assert right / len(tasks) >= 0.70
    assert sum(early) / len(early) >= 0.50


def texts(artifact: Artifact) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 96) prompts and (rows, 64) true canvases of held-out text."""
    rows = [artifact.tokenizer.encode(item["text"])[: PREFIX + 64] for item in held_out("heldout_text")[:ROWS]]
    ids = torch.tensor(rows)
    return ids[:, :PREFIX], ids[:, PREFIX:]


def noised(clean: torch.Tensor, level: float, vocab: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    noise = torch.randint(0, vocab, clean.shape, generator=g)
    return torch.where(torch.rand(clean.shape, generator=g) < level, noise, clean)


def loss(artifact: Artifact, model: Model, level: float) -> float:
    """Cross-entropy of the true token with self-conditioning, nats a position, at one noise level."""
    prompt, clean = texts(artifact)
    cache = model.new_cache(len(prompt))
    model.encode(prompt, cache)
    canvas = noised(clean, level, artifact.config.vocab)
    logits = model.decode(canvas, cache, model.decode(canvas, cache) / 0.6)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), clean.flatten()))


class Changed(Mapping[str, Packed]):
    """Weights with every layer_scalar below a prefix set to 1."""

    def __init__(self, weights: Mapping[str, Packed], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Packed:
        found = self.weights[name]
        if name.startswith(self.prefix) and name.endswith("layer_scalar"):
            return Packed(found.scheme, found.shape, {"": torch.ones_like(found.parts[""])})
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def next_token_loss(artifact: Artifact, weights: Mapping[str, Packed]) -> float:
    """Of the encoder alone, nats a token."""
    prompt, canvas = texts(artifact)
    stream = Stream(artifact.config, weights, "cpu", torch.float32)
    chunk = Chunk(tuple(map(tuple, prompt.tolist())), canvas[:1], (len(prompt) - 1,), torch.ones(1, dtype=torch.int64))
    x = stream.enter(chunk, None)
    for index in range(len(artifact.config.layers)):
        x = stream.layer(index)(chunk, x)
    plain = {name: weights[name].dequantize(torch.float32) for name in (EMBEDDING, DECODER + "norm.weight")}
    normed = rms_norm(x[: chunk.encoded], plain[DECODER + "norm.weight"], artifact.config.norm_eps)
    logits = artifact.config.softcap * torch.tanh(normed @ plain[EMBEDDING].T / artifact.config.softcap)
    logits = logits.view(*prompt.shape, -1)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), prompt[:, 1:].flatten()))


def test_no_layer_scalar_can_go_unnoticed(artifact: Artifact, model: Model) -> None:
    """With one side's scalars at 1, that side guesses worse: the decoder a fully noised canvas, the encoder the next
    token."""
    changed = Model(artifact.config, Changed(artifact.weights, DECODER), "cpu", torch.float32)
    whole, hurt = loss(artifact, model, 1.0), loss(artifact, changed, 1.0)
    print(f"loss at noise 1: {whole:.3f}, with the decoder's scalars at 1 {hurt:.3f}")
    assert hurt > 1.04 * whole
    whole, hurt = (next_token_loss(artifact, w) for w in (artifact.weights, Changed(artifact.weights, ENCODER)))
    print(f"encoder's loss: {whole:.3f}, with its scalars at 1 {hurt:.3f}")
    assert whole < 3.5 and hurt > 1.02 * whole


def test_self_conditioning_cannot_go_unnoticed(
    artifact: Artifact, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text canvases settle with it; without it they never do, and the same word comes again and again."""
    prompts = texts(artifact)[0][:4].tolist()

    def write() -> tuple[int, float]:
        result = generate(model, Request(prompts, artifact.generation, 64, seed=2))
        repeats = (result.canvases[:, 1:] == result.canvases[:, :-1]).float().mean()
        return sum(row[0] for row in result.stopped_early), float(repeats)

    early, repeats = write()
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda canvas, cache, logits=None: decode(canvas, cache))
    early_without, repeats_without = write()
    print(f"{early} of 4 stop early, {early_without} without; repeats {repeats:.1%}, {repeats_without:.1%} without")
    assert early >= 2 and early_without == 0
    assert repeats < 0.05 and repeats_without > 0.2


def test_every_expert_works(artifact: Artifact, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out text through encoder and decoder: each expert gets 0.25 to 4 times its layer's mean of tokens."""
    counts: list[torch.Tensor] = []
    stock = block.experts

    def counted(x: torch.Tensor, chosen: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(torch.bincount(chosen.flatten(), minlength=artifact.config.experts))
        return stock(x, chosen, *rest)

    monkeypatch.setattr(block, "experts", counted)
    loss(artifact, model, 0.5)
    layers = len(artifact.config.layers)
    total = torch.stack(counts).view(-1, layers, artifact.config.experts).sum(0)
    ratio = total / total.float().mean(-1, keepdim=True)
    print(f"tokens of an expert over its layer's mean: {float(ratio.min()):.2f} to {float(ratio.max()):.2f}")
    assert ratio.min() >= 0.25 and ratio.max() <= 4
