"""Each artifact of `tiny` in our runtime against transformers with the decoded weights copied in; W4A4 by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional

from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import NVFP4, decode, encode
from dgq.quant.types import Packed
from dgq.runtime.engine.batch import encode_each
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.images import placed
from dgq.runtime.model.layers import experts, linear
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model

transformers: Any = pytest.importorskip("transformers")
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
RECIPES = {  # prompts of each: short, past the window, left padding
    "nvfp4": (110, 30, 70), "nvfp4-w4a16": (150,), "nvfp4-all": (40,),
    "bnb4": (150,), "bnb4-dq": (40,), "q4_k_m": (110, 30, 70),
}  # fmt: skip


@dataclass
class Both:
    """One artifact twice: in our runtime, weights packed and decoded at every use, and in transformers."""

    artifact: Artifact
    model: Model
    oracle: Any
    lengths: tuple[int, ...]


@pytest.fixture(scope="module")
def oracle() -> Any:
    return transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def bf16() -> tuple[Model, Artifact]:
    artifact = open_artifact(TINY)
    return artifact.load(), artifact


@pytest.fixture(scope="module", params=RECIPES)
def both(request: pytest.FixtureRequest, converted: Callable[[str, str], Path], oracle: Any) -> Both:
    artifact = open_artifact(converted(request.param, "stock"))
    original, changed = open_artifact(TINY).weights, 0
    for name, weight in artifact.weights.items():
        target = oracle.get_parameter(name) if "layer_scalar" not in name else oracle.get_buffer(name)
        with torch.no_grad():
            target.copy_(weight.dequantize())
        changed += not torch.equal(weight.dequantize(), original[name].dequantize())
    assert changed >= 12, "quantised weights differ from the original's"
    model = Model(artifact.config, artifact.weights, options=LoadOptions(keep_decoded=0))
    return Both(artifact, model, oracle, RECIPES[request.param])


def test_logits_over_blocks(both: Both) -> None:
    """With and without self-conditioning, before any committed block and after each of two."""
    model, config, lengths = both.model, both.artifact.config, both.lengths
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(12, config.vocab, (len(lengths), longest), generator=generator)
    real = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    ids = ids.masked_fill(~real, both.artifact.generation.pad_id)
    cache = model.new_cache(len(lengths))
    theirs = transformers.DynamicCache(config=both.oracle.config.get_text_config())
    padding = None if real.all() else ~real
    for block in range(3):
        start = cache.length
        model.encode(ids, cache, padding=padding)
        canvas = torch.randint(0, config.vocab, (len(lengths), config.canvas), generator=generator)
        ours = model.decode(canvas, cache)
        again = model.decode(canvas, cache, ours / 0.7)
        with torch.no_grad():
            positions = torch.arange(start, start + ids.shape[1])[None]
            both.oracle.model.encoder(
                input_ids=ids, attention_mask=real, past_key_values=theirs, position_ids=positions
            )
            seen = functional.pad(real, (0, config.canvas), value=True)
            step = {"decoder_input_ids": canvas, "past_key_values": theirs, "decoder_attention_mask": seen}
            step["decoder_position_ids"] = torch.arange(cache.length, cache.length + config.canvas)[None]
            expected = both.oracle(**step).logits
            expected_again = both.oracle(**step, self_conditioning_logits=ours / 0.7).logits
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0, msg=lambda m, b=block: f"block {b}: {m}")
        torch.testing.assert_close(again, expected_again, atol=1e-4, rtol=0)
        ids, padding, real = canvas, None, seen


def test_an_image_differs_by_quantisation_alone(both: Both, bf16: Any) -> None:
    """Soft tokens are the source's, bit for bit; logits over them transformers' with the decoded weights; and what is
    between them and BF16's is that much KL, in nats a position (the mean of three noised canvases)."""
    tower = both.artifact.vision.tower("cpu", torch.float32)
    reference, source = bf16
    rng = np.random.default_rng(2)
    images = [PIL.Image.fromarray((rng.random((h, w, 3)) * 255).astype("uint8")) for h, w in ((112, 160), (96, 96))]
    text = "Sort: wind apple king door"
    prompts = []
    for artifact, eyes in ((both.artifact, tower), (source, source.vision.tower("cpu", torch.float32))):
        ids, shown, _ = placed(artifact.tokenizer, [{"role": "user", "content": text}], images)
        prompts.append(artifact.vision.prompt(ids, shown, eyes))
    assert list(prompts[0]) == list(prompts[1]) and torch.equal(prompts[0].embeddings, prompts[1].embeddings)

    length, theirs = len(prompts[0]), transformers.DynamicCache(config=both.oracle.config.get_text_config())
    ids, at = torch.tensor(prompts[0][:])[None], torch.arange(length)[None]
    with torch.no_grad():
        embeddings = both.oracle.get_input_embeddings()(ids)
        embeddings[0, torch.tensor(prompts[0].is_image)] = prompts[0].embeddings
        masks = both.oracle.model.encoder.create_masks_for_generate(
            config=both.oracle.config, inputs_embeds=embeddings, attention_mask=torch.ones(1, length, dtype=torch.bool),
            past_key_values=theirs, position_ids=at, mm_token_type_ids=torch.tensor([prompts[0].is_image]).int(),
        )  # fmt: skip
        both.oracle.model.encoder(
            inputs_embeds=embeddings, attention_mask=masks, past_key_values=theirs, position_ids=at
        )
    caches = [encode_each(m, [p], length + 64) for m, p in zip((both.model, reference), prompts, strict=True)]
    divergence = []
    for seed in range(3):
        canvas = torch.randint(0, 2048, (1, 64), generator=torch.Generator().manual_seed(seed))
        ours, whole = both.model.decode(canvas, caches[0]), reference.decode(canvas, caches[1])
        divergence.append(
            functional.kl_div(ours.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="sum")
        )
        if seed == 0:
            with torch.no_grad():
                expected = both.oracle(
                    decoder_input_ids=canvas,
                    past_key_values=theirs,
                    decoder_position_ids=torch.arange(length, length + 64)[None],
                ).logits
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    mean = float(torch.stack(divergence).mean()) / 64
    print(f"{both.artifact.kind}, {both.artifact.path.parent.name}: KL with two images {mean:.5f} nats a position")
    assert 1e-4 < mean < 2, "large: tiny's tower is random, and its text model never saw such tokens"


def test_decoded_once_is_decoded_at_every_use(both: Both) -> None:
    kept = both.artifact.load()
    ids = torch.arange(20, 60).unsqueeze(0)
    logits = []
    for model in (kept, both.model):
        cache = model.new_cache(1)
        model.encode(ids, cache)
        logits.append(model.decode(ids[:, : both.artifact.config.canvas], cache))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def w4a4(seed: int, experts_: int, out: int, columns: int, scale: float) -> Packed:
    weight = torch.randn(experts_, out, columns, generator=torch.Generator().manual_seed(seed))
    parts = NVFP4.quantize(weight)
    scales = torch.linspace(scale, 2 * scale, experts_).view(-1, 1, 1).expand(experts_, out, 1)
    return Packed(NVFP4, tuple(weight.shape), parts | {"input_scale": scales})


def rounded(x: torch.Tensor, packed: Packed, expert: int) -> torch.Tensor:
    scale = packed.parts["input_scale"][expert, :1]
    return decode(*encode(x, scale), scale)


def test_w4a4_experts_by_formula() -> None:
    """Token by token and expert by expert: both inputs rounded with that expert's own scale."""
    gate_up, down = w4a4(0, 4, 64, 48, 1e-3), w4a4(1, 4, 48, 32, 2e-2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 48, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    share = torch.rand(7, 2, generator=generator)
    expected = torch.zeros(7, 48)
    for token in range(7):
        for rank in range(2):
            expert = int(chosen[token, rank])
            inner = rounded(x[token : token + 1], gate_up, expert) @ gate_up[expert].dequantize().T
            inner = functional.gelu(inner[:, :32], approximate="tanh") * inner[:, 32:]
            expected[token] += share[token, rank] * (rounded(inner, down, expert) @ down[expert].dequantize().T)[0]
    found = experts(x, chosen, share, gate_up, down)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    weight_only = [
        Packed(p.scheme, p.shape, {k: v for k, v in p.parts.items() if k != "input_scale"}) for p in (gate_up, down)
    ]
    assert (experts(x, chosen, share, *weight_only) - expected).abs().max() > 1e-2, "rounding matters"
    torch.testing.assert_close(linear(x, gate_up[1]), rounded(x, gate_up, 1) @ gate_up[1].dequantize().T)


def test_activations_of_an_artifact(converted: Callable[[str, str], Path]) -> None:
    """W4A4 changes the logits a little; weight-only files have no scales and say so; the decoded path rounds too."""
    artifact = open_artifact(converted("nvfp4", "stock"))
    ids = torch.arange(20, 84).unsqueeze(0)
    logits = []
    for activations, keep in ((None, 0), ("nvfp4", 0), ("nvfp4", 1 << 30)):
        model = Model(
            artifact.config, artifact.weights, options=LoadOptions(keep_decoded=keep, activations=activations)
        )
        cache = model.new_cache(1)
        model.encode(ids, cache)
        logits.append(model.decode(ids, cache))
    torch.testing.assert_close(logits[1], logits[2], atol=1e-3, rtol=0)
    assert 1e-2 < (logits[0] - logits[1]).abs().max() < 20
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.5
    plain = open_artifact(converted("nvfp4-w4a16", "stock"))
    with pytest.raises(InputError, match="holds no input scales"):
        plain.load(activations="nvfp4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_on_cuda(both: Both) -> None:
    """Float32 on both devices, weights packed on the GPU; bf16 is near."""
    ids = torch.arange(20, 84).unsqueeze(0)
    logits = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        model = Model(both.artifact.config, both.artifact.weights, device, dtype, options=LoadOptions(keep_decoded=0))
        cache = model.new_cache(1)
        model.encode(ids.to(device), cache)
        logits.append(model.decode(ids.to(device), cache).cpu())
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=0)
    assert (logits[2].argmax(-1) == logits[0].argmax(-1)).float().mean() > 0.8
