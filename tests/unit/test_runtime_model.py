"""Logits against transformers' (golden files), and packed weights against decoded ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model import layers
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
GOLDEN = load_file(TINY_A / "logits.safetensors")
FILES = {"bf16": TINY_A, "Q4_K_M": TINY_A / "reference.Q4_K_M.gguf"}


def two_steps(model):
    """Logits of a canvas without and with self-conditioning (whose logits are the BF16 model's in both files)."""
    cache = model.new_cache(1)
    model.encode(GOLDEN["prompt"].to(model.device), cache)
    canvas = GOLDEN["canvas"].to(model.device)
    return model.decode(canvas, cache)[0], model.decode(canvas, cache, GOLDEN["logits"][None].to(model.device))[0]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("keep_decoded", [0, 1 << 28], ids=["packed", "decoded"])
def test_golden_logits(kind, keep_decoded):
    golden = GOLDEN if kind == "bf16" else load_file(TINY_A / "logits_from_Q4_K_M.safetensors")
    artifact = open_artifact(FILES[kind])
    first, second = two_steps(Model(artifact.config, artifact.weights, options=LoadOptions(keep_decoded=keep_decoded)))
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, golden["logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(second, golden["logits_sc"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 100_000, 300_000])
def test_a_small_budget_changes_nothing(budget, monkeypatch):
    """Row chunks and expert groups of every size, down to single ones."""
    artifact = open_artifact(FILES["Q4_K_M"])
    model = Model(artifact.config, artifact.weights, options=LoadOptions(keep_decoded=0))
    whole = two_steps(model)
    monkeypatch.setattr(layers, "DECODE_BUDGET", budget)
    for piecewise, at_once in zip(two_steps(model), whole, strict=True):
        torch.testing.assert_close(piecewise, at_once, atol=2e-5, rtol=0)


def test_bfloat16_stays_near():
    """Not a parity test: 16-bit activations of a sharp random model. It must run, give float32, and not be garbage."""
    artifact = open_artifact(TINY_A)
    first, _ = two_steps(artifact.load(dtype=torch.bfloat16))
    assert first.dtype == torch.float32
    assert (first.argmax(-1) == GOLDEN["logits"].argmax(-1)).float().mean() > 0.8


def test_experts_against_one_token_at_a_time():
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, inner, count, k = 9, 16, 8, 5, 2
    x = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=generator)
    down = torch.randn(count, hidden, inner, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(tokens)])  # expert 4 gets none
    share = torch.rand(tokens, k, generator=generator)
    f32 = SCHEMES["f32"]
    result = layers.experts(x, chosen, share, *(Packed(f32, w.shape, {"": w}) for w in (gate_up, down)))
    for t in range(tokens):
        expected = torch.zeros(hidden)
        for e, s in zip(chosen[t], share[t], strict=True):
            gate, up = gate_up[e, :inner] @ x[t], gate_up[e, inner:] @ x[t]
            expected += s * (down[e] @ (torch.nn.functional.gelu(gate, approximate="tanh") * up))
        torch.testing.assert_close(result[t], expected, atol=1e-5, rtol=1e-5)


def test_the_two_scalars_are_told_apart():
    """In tinyA they differ; the golden logits would not notice an encoder that is never used."""
    artifact = open_artifact(TINY_A)
    weights = dict(artifact.weights)
    name = "model.encoder.language_model.layers.0.layer_scalar"
    weights[name] = Packed(weights[name].scheme, (1,), {"": weights[name].parts[""] * 2})
    changed, _ = two_steps(Model(artifact.config, weights))
    assert (changed - GOLDEN["logits"]).abs().max() > 1e-3


def test_wrong_tensors_are_refused():
    artifact = open_artifact(TINY_A)
    weights = dict(artifact.weights)
    for change, words in (
        ({"model.decoder.norm.weight": None}, "a/b: tensor model.decoder.norm.weight is missing"),
        ({"lm_head.weight": weights["model.decoder.norm.weight"]}, "tensor lm_head.weight is not part of the model"),
        ({"model.decoder.layers.1.router.scale": weights["model.decoder.layers.1.layer_scalar"]}, "has shape [1]"),
    ):
        changed = {name: weight for name, weight in (weights | change).items() if weight is not None}
        with pytest.raises(InputError) as error:
            Model(artifact.config, changed, source="a/b")
        assert words in str(error.value)


def test_the_decoder_leaves_the_cache_alone():
    model = open_artifact(TINY_A).load()
    cache = model.new_cache(1)
    model.encode(GOLDEN["prompt"], cache)
    first = model.decode(GOLDEN["canvas"], cache)
    model.decode(GOLDEN["canvas"].flip(1), cache)
    assert cache.length == GOLDEN["prompt"].shape[1]
    assert torch.equal(model.decode(GOLDEN["canvas"], cache), first)


def test_capacity_only_saves_growing():
    model = open_artifact(TINY_A).load()
    small, large = model.new_cache(1), model.new_cache(1, capacity=200)
    before = large.nbytes
    for cache in (small, large):
        for part in GOLDEN["prompt"].split(7, dim=1):
            model.encode(part, cache)
    canvas = GOLDEN["canvas"]
    assert torch.equal(model.decode(canvas, small), model.decode(canvas, large))
    assert large.nbytes == before
    assert [small.held(i) for i in range(6)] == [15, 15, 40, 15, 15, 40]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", FILES)
def test_golden_logits_on_cuda(kind):
    golden = GOLDEN if kind == "bf16" else load_file(TINY_A / "logits_from_Q4_K_M.safetensors")
    artifact = open_artifact(FILES[kind])
    for keep_decoded in (0, 1 << 28):
        model = Model(
            artifact.config, artifact.weights, "cuda", torch.float32, options=LoadOptions(keep_decoded=keep_decoded)
        )
        first, second = two_steps(model)
        torch.testing.assert_close(first.cpu(), golden["logits"], atol=1e-3, rtol=0)
        torch.testing.assert_close(second.cpu(), golden["logits_sc"], atol=1e-3, rtol=0)
    first, _ = two_steps(artifact.load("cuda"))
    assert (first.argmax(-1).cpu() == golden["logits"].argmax(-1)).float().mean() > 0.8
