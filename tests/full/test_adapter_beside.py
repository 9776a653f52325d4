"""Adapters beside the weights against unmerged peft over transformers, in float32: logits, and the tokens of whole
answers; over BF16, NVFP4, bitsandbytes' NF4 and GGUF, whose decoded weights transformers gets. The kernels against our
own reference, which the first tests hold against peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from commands import error_of
from peft import LoraConfig, PeftModel, get_peft_model
from second import write_second
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from dgq.convert.source.models import open_model
from dgq.runtime.adapters.adapter import open_adapter
from dgq.runtime.engine.api import load
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.images import placed
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import expected_tensors
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
LAYERS = r"model\.(encoder\.language_model|decoder)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
SOME = (".q_proj", ".o_proj", ".up_proj", "down_proj", ".router.", ".experts.")  # a product's parts, but not all
KINDS: dict[str, dict[str, Any]] = {
    "two sides": {"target_modules": LAYERS},
    "decoder": {"target_modules": LAYERS.replace(r"(encoder\.language_model|decoder)", "decoder")},
    "encoder": {"target_modules": LAYERS.replace(r"(encoder\.language_model|decoder)", r"encoder\.language_model")},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "experts": {
        "target_modules": [],
        "target_parameters": [
            f"{side}.layers.{layer}.experts.{part}"
            for side in ("decoder", "language_model")
            for layer, part in ((0, "gate_up_proj"), (1, "down_proj"))
        ],
    },
}


def transformers_model(path: Path) -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


def save_adapter(model: Any, path: Path, settings: dict[str, Any]) -> None:
    """As training leaves it: no number zero."""
    wrapped = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)))
    generator = torch.Generator().manual_seed(len(settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else noise * 0.05
    wrapped.save_pretrained(path)


def with_weights(oracle: Any, artifact: Artifact) -> Any:
    """transformers' model with an artifact's decoded weights."""
    for name, weight in artifact.weights.items():
        target = oracle.get_parameter(name) if "layer_scalar" not in name else oracle.get_buffer(name)
        with torch.no_grad():
            target.copy_(weight.dequantize())
    return oracle


def check_logits(model: Model, oracle: Any, base: Model | None = None) -> None:
    """40 tokens and a canvas, without and with self-conditioning, to 1e-4."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 500, (1, 40), generator=generator)
    canvas = torch.randint(20, 500, (1, model.config.canvas), generator=generator)
    with torch.no_grad():
        first = oracle(input_ids=ids, decoder_input_ids=canvas).logits
        again = oracle(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=first / 0.7).logits
    cache = model.new_cache(1)
    model.encode(ids, cache)
    torch.testing.assert_close(model.decode(canvas, cache), first, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(canvas, cache, first / 0.7), again, atol=1e-4, rtol=0)
    if base is not None:
        cache = base.new_cache(1)
        base.encode(ids, cache)
        assert float((base.decode(canvas, cache) - first).abs().max()) > 0.1  # it is not small


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_kind(kind: str, tmp_path: Path) -> None:
    save_adapter(transformers_model(TINY), tmp_path / "a", KINDS[kind])
    oracle = PeftModel.from_pretrained(transformers_model(TINY), tmp_path / "a").eval()
    check_logits(open_model("tiny", adapters=[tmp_path / "a"]).load(), oracle, open_model("tiny").load())


@pytest.mark.parametrize("kind", ["two sides", "experts"])
def test_logits_of_the_second_shape(kind: str, shared: Any, tmp_path: Path) -> None:
    path = shared.made("second-16", lambda folder: write_second(folder, 16))
    save_adapter(transformers_model(path), tmp_path / "a", KINDS[kind])
    oracle = PeftModel.from_pretrained(transformers_model(path), tmp_path / "a").eval()
    check_logits(open_model(str(path), adapters=[tmp_path / "a"]).load(), oracle)


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4-w4a16", "bnb4", "q4_k_m"])
def test_logits_and_tokens_over_quantised_bases(recipe: str, converted: Callable[..., Path], tmp_path: Path) -> None:
    save_adapter(transformers_model(TINY), tmp_path / "a", KINDS["two sides"])
    path = str(TINY) if recipe == "bf16" else str(converted(recipe))
    artifact = open_model(path, adapters=[tmp_path / "a"])
    oracle = PeftModel.from_pretrained(with_weights(transformers_model(TINY), artifact), tmp_path / "a").eval()
    options = LoadOptions(keep_decoded=0, adapters=artifact.adapters)  # packed, decoded at every use
    model = Model(artifact.config, artifact.weights, options=options)
    check_logits(model, oracle, Model(artifact.config, artifact.weights))

    prompt = artifact.tokenizer.chat([{"role": "user", "content": "Sort: wind apple king door"}])
    pad, sampler = artifact.generation.pad_id, SamplerConfig(steps=12, confidence=0.005)
    settings = GenerationConfig(sampler, (1,), pad)
    result = generate(model, Request([prompt], settings, 128, seed=3, rng="torch"))
    torch.manual_seed(3)
    right = oracle.base_model.model.generate(
        torch.tensor([prompt]), sampler_config=EntropyBoundSamplerConfig(entropy_bound=sampler.entropy_bound),
        disable_compile=True, pad_token_id=pad, max_new_tokens=128, max_denoising_steps=12, t_min=0.4, t_max=0.8,
        stability_threshold=sampler.stability, confidence_threshold=0.005, eos_token_id=[1],
    ).sequences[:, len(prompt) :]  # fmt: skip
    assert result.canvases.tolist() == right.tolist()


def test_vision_layers(tmp_path: Path) -> None:
    """A picture's soft tokens through a tower and a projector that an adapter changes."""
    from PIL import Image

    save_adapter(transformers_model(TINY), tmp_path / "a", KINDS["all-linear"])
    oracle = PeftModel.from_pretrained(transformers_model(TINY), tmp_path / "a").eval()
    picture = Image.linear_gradient("L").convert("RGB").resize((96, 96))
    seen = {}
    for name, adapters in (("plain", []), ("changed", [tmp_path / "a"])):
        artifact = open_model("tiny", adapters=adapters)
        _, images, _ = placed(artifact.tokenizer, "<|image|>what?", [picture])
        patches = artifact.vision.patches(images[0])
        seen[name] = artifact.vision.tower("cpu", torch.float32)(patches)
    encoder = oracle.base_model.model.model.encoder
    with torch.no_grad():
        hidden = encoder.vision_tower(patches.values, patches.positions).last_hidden_state
        right = encoder.embed_vision(hidden)
    torch.testing.assert_close(seen["changed"], right, atol=1e-4, rtol=0)
    assert float((seen["plain"] - right).abs().max()) > 0.01


def test_chosen_by_name(tmp_path: Path) -> None:
    """Python's engine, and a conversation that changes its adapter: each turn is that of a model with that one."""
    for seed in (1, 2):
        save_adapter(transformers_model(TINY), tmp_path / str(seed), KINDS["two sides"] | {"r": 2 * seed})
    both = load(TINY, "cpu", adapters={"one": tmp_path / "1", "two": tmp_path / "2"})
    alone = {"one": load(TINY, "cpu", adapters=[tmp_path / "1"]), "two": load(TINY, "cpu", adapters=[tmp_path / "2"])}
    ask, settings = [{"role": "user", "content": "Sort: wind apple king"}], {"max_new_tokens": 64, "seed": 1}
    texts = {name: engine.generate(ask, **settings).tokens for name, engine in alone.items()}
    assert both.generate(ask, **settings).tokens == load(TINY, "cpu").generate(ask, **settings).tokens
    for name, tokens in texts.items():
        assert both.generate(ask, adapter=name, **settings).tokens == tokens
    chat, other = both.chat(), alone["two"].chat()
    chat.ask("Sort: b a", adapter="one", max_new_tokens=64)
    reply = chat.ask("And c?", adapter="two", max_new_tokens=64)
    other.messages = chat.messages[:2]
    assert reply.encoded == reply.prompt_tokens  # keys and values of the other adapter are of no use
    assert reply.tokens == other.ask("And c?", max_new_tokens=64).tokens
    assert "not loaded; there are one, two" in str(error_at(lambda: both.generate(ask, adapter="three")))


def error_at(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_hub_id_without_a_network(tmp_path: Path) -> None:
    assert "somebody/lora" in error_of("run", "tiny", "x", "--adapter", "somebody/lora")


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products and those of the adapters beside them, experts' too, in bfloat16: about as far from float32
    as the reference's operations in bfloat16 are, and far nearer than a model without the adapters. On this model the
    packed products alone are 1.6 times as far as the reference's."""
    fast = pytest.importorskip("dgq.runtime.engine.fast", reason="needs Triton", exc_type=ImportError)
    from test_fast import ALL, PROMPT, run, small

    from dgq.runtime.engine.plain import Plain

    monkeypatch.setattr("dgq.runtime.model.loading.decodes", lambda *_: False)
    config, weights = small(ALL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapters = tuple(
        open_adapter(write_adapter(tmp_path / name, config, seed, modules), expected_tensors(config))
        for name, seed, modules in (("one", 1, SOME), ("two", 2, (".self_attn.",)))
    )
    chosen = {"adapters": adapters, "active": ("one",)}
    passes = {}
    for name, backend in (
        ("exact", Plain(Model(config, weights, device, torch.float32, options=LoadOptions(**chosen)))),
        ("plain", Plain(Model(config, weights, device, torch.bfloat16, options=LoadOptions(**chosen)))),
        (
            "fast",
            fast.Fast(Model(config, weights, device, torch.bfloat16, options=LoadOptions(kernels=True, **chosen))),
        ),
        ("none", Plain(Model(config, weights, device, torch.float32))),
    ):
        steps = run(backend, PROMPT[:8])
        passes[name] = torch.cat([next(steps), next(steps)])
    passes["fast"] = (passes["fast"] / config.softcap).tanh() * config.softcap
    away = {name: float((one - passes["exact"]).square().mean().sqrt()) for name, one in passes.items()}
    assert away["fast"] < 2.5 * away["plain"] and away["fast"] < 0.2 * away["none"], away
