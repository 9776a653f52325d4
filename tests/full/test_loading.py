"""Weights on their way to the kernels: groups, what the reference reads of them, experts in host memory, the API."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from micro import micro_config, micro_tensors

import dgq.runtime
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.engine.api import Engine
from dgq.runtime.engine.engine import Block, Request, generate
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.kernels.repack import Tiles, tile
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.model.offload import Host, Offload
from dgq.runtime.model.placement import place
from dgq.runtime.shape.config import ModelConfig

pytest.importorskip("dgq.runtime.kernels.dense", reason="needs Triton", exc_type=ImportError)
from dgq.runtime.model import loading

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter's


def micro_weights() -> dict[str, Packed]:
    raw = micro_config()
    raw["text_config"] |= {"intermediate_size": 128, "moe_intermediate_size": 64}
    tensors = {name: values.to(DEVICE) for name, values in micro_tensors(raw).items()}
    return {name: Packed(SCHEMES["bf16"], tuple(values.shape), {"": values}) for name, values in tensors.items()}


def quantised(weights: dict[str, Packed], schemes: dict[str, str]) -> dict[str, Packed]:
    """schemes: of the weights whose name has this in it, the first that fits."""
    found = {}
    for name, weight in weights.items():
        scheme = next((s for word, s in schemes.items() if word in name and len(weight.shape) > 1), None)
        one = SCHEMES[scheme] if scheme else weight.scheme
        found[name] = Packed(one, weight.shape, one.quantize(weight.parts[""])) if scheme else weight
    return found


@pytest.mark.parametrize(
    "schemes",
    [
        {},
        {"q_proj": "nf4", "mlp.": "nf4", "self_conditioning": "nf4"},  # q in 4 bits, k and v not
        {"_proj": "nf4"},
        {"_proj": "nvfp4", "embed": "q8_0"},  # each with a scale_2 of its own, gate and up too
        {"v_proj": "q8_0", "up_proj": "q8_0", "embed": "q8_0", "_proj": "q5_0"},  # gate and up unlike, too
    ],
    ids=["bf16", "mixed", "nf4", "nvfp4-all", "ggml"],
)
@pytest.mark.parametrize("decode", [False, True])
def test_the_reference_reads_what_was_repacked(schemes: dict[str, str], decode: bool) -> None:
    weights = quantised(micro_weights(), schemes)
    names = sorted(weights, key=lambda name: ".experts." in name)
    loaded = loading.for_kernels(names, ((name, weights[name]) for name in names), "micro", decode)
    assert set(loaded.weights) == {name for name in names if ".experts." not in name}
    assert sorted(loaded.experts) == [0, 1] and loaded.offload is None
    for name, weight in loaded.weights.items():
        assert weight.shape == weights[name].shape
        found, expected = weight.dequantize(), weights[name].dequantize()
        assert float((found - expected).norm() / expected.norm()) <= 4e-3, name
    packed = {key for key, product in loaded.products.items() if product.packed}
    assert bool(packed) == (not decode and bool(schemes))
    assert len(loaded.products) == 4 * 2 + 2


def test_one_weight_at_a_time() -> None:
    """What was read is forgotten before more is; but for those that a product waits for, never experts."""
    made = micro_weights()
    alive: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
    read: list[str] = []

    class Read(Mapping[str, Packed]):
        def __getitem__(self, name: str) -> Packed:
            held = {other for other in alive if ".experts." in other}
            assert not held, f"{held} still there when {name} is read"
            alive[name] = own = made[name].parts[""].clone()
            read.append(name)
            return Packed(made[name].scheme, made[name].shape, {"": own})

        def __iter__(self) -> Iterator[str]:
            return iter(made)

        def __len__(self) -> int:
            return len(made)

    raw = micro_config()
    raw["text_config"] |= {"intermediate_size": 128, "moe_intermediate_size": 64}
    Model(ModelConfig.from_json(raw, "micro"), Read(), "cpu", torch.bfloat16, options=LoadOptions(kernels=True))
    assert sum(".experts." in name for name in read) == 4 and len(read) == len(made)


def test_where_products_are_decoded() -> None:
    config = ModelConfig.from_file(Path(__file__).parent.parent / "golden" / "real26b" / "config.json")
    assert [card for card in (8, 12, 16, 24, 80) if loading.decodes(config, card << 30)] == [24, 80]


def pairs(layers: int) -> list[tuple[Tiles, Tiles]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in range(layers):
        scheme = SCHEMES[("nf4", "q8_0", "bf16")[layer % 3]]
        weights = [torch.randn(2, 128, 64, generator=generator).bfloat16() for _ in range(2)]
        packed = [Packed(scheme, tuple(weight.shape), scheme.quantize(weight)) for weight in weights]
        found.append((tile(packed[0], True), tile(packed[1], False)))
    return found


def same(one: tuple[Tiles, Tiles], other: tuple[Tiles, Tiles]) -> bool:
    def parts(pair: tuple[Tiles, Tiles]) -> list[torch.Tensor]:
        return [part for t in pair for part in (t.codes, t.scales, t.high, t.factors)]

    return all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_experts_come_in_time(count: int) -> None:
    """Whatever was in the places before, in every pass; layers of other sizes."""
    originals = {2 * number + 1: pair for number, pair in enumerate(pairs(count))}
    offload = Offload({layer: Host.of(pair) for layer, pair in originals.items()}, torch.device("cpu"))
    assert 0 not in offload and 1 in offload
    for _ in range(3):
        for layer, pair in originals.items():
            offload.arrive(layer)
            assert same(offload.weights(layer), pair), layer
            offload.leave(layer)
    assert (offload.copied > 0) == (count > 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_experts_come_in_time_after_a_pass_that_was_broken_off(count: int) -> None:
    """By an error or Ctrl-C, before a layer, in it or behind it."""
    originals = dict(enumerate(pairs(count)))
    offload = Offload({layer: Host.of(pair) for layer, pair in originals.items()}, torch.device("cpu"))
    for last in range(count):
        for inside in (False, True):
            for layer in range(last + 1):
                offload.arrive(layer)
                if layer < last or not inside:
                    offload.leave(layer)
            for layer, pair in originals.items():
                offload.arrive(layer)
                assert same(offload.weights(layer), pair), (last, inside, layer)
                offload.leave(layer)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_layers_in_host_memory_are_spread(share: float) -> None:
    weights = micro_weights()
    own = [weights[f"model.decoder.layers.0.experts.{part}_proj"] for part in ("gate_up", "down")]
    loaded = loading.ForKernels()
    size = sum(tile(weight, True).nbytes for weight in own)
    room = int((12 * share + 2) * size)
    experts = loading._Experts(loaded, 12, room)
    for layer in range(12):
        for number, weight in enumerate(own):
            experts.add(layer, tile(weight, number == 0))
    assert len(loaded.experts) == int(12 * share) and len(loaded.experts) + len(experts.hosts) == 12
    placement = place([size] * 12, 12, room)
    assert [layer for layer, stays in enumerate(placement.stays) if stays] == list(loaded.experts)
    assert placement.waiting == [size] * len(experts.hosts)
    assert placement.copied == (sum(placement.waiting) if len(experts.hosts) > 2 else 0)
    assert placement.on_gpu == size * (len(loaded.experts) + 2)
    for first in range(1, 13):  # nowhere more than evenly
        assert sum(layer < first for layer in loaded.experts) <= share * first


def test_the_api() -> None:
    engine = dgq.runtime.load(TINY, device="cpu")
    assert isinstance(engine, Engine)
    message = [{"role": "user", "content": "Sort: wind apple king door"}]
    assert engine.ids(message) == engine.tokenizer.chat(message)
    assert engine.ids([5, 6]) == [5, 6] and engine.ids("wind") == engine.tokenizer.encode("wind")
    answer = engine.generate(message, seed=0)
    assert answer.ended and answer.text.split() == ["apple", "door", "king", "wind"]
    both = engine.generate_batch([message, "Once upon a time"], seed=0, max_new_tokens=64)
    assert both[0].tokens == answer.tokens and len(both) == 2
    found = generate(engine.model, Request([engine.ids(message)], engine.generation, seed=0))
    assert [answer.tokens, answer.steps] == [found.tokens[0], found.steps[0]]
    events = list(engine.stream(message, seed=0))
    assert isinstance(events[-1], Block) and engine.text(events[-1]) == answer.text
    assert len(events) == sum(answer.steps) + 1
    with pytest.raises(AttributeError, match="has no attribute 'save'"):
        _ = dgq.runtime.save


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_experts_in_host_memory_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(TINY)
    prompts = [artifact.tokenizer.encode(text) for text in ("Once upon a time there was a king", "The wind")]
    for name, value in (("CONTEXT", 0), ("working_bytes", lambda *_: 0)):
        monkeypatch.setattr(f"dgq.runtime.model.loading.{name}", value)
    whole = artifact.load("cuda")
    assert whole.kernels is not None
    experts = sum(tiles.nbytes for pair in whole.kernels.experts.values() for tiles in pair)
    others = whole.kernels.nbytes - experts
    expected = generate(whole, Request(prompts, artifact.generation, 192, seed=1, steps=4))
    part = artifact.load("cuda", vram=torch.cuda.memory_allocated() + others + experts // 2 + (1 << 16))
    assert part.kernels is not None and part.kernels.offload is not None and part.kernels.offload.copied
    for _ in range(2):
        assert generate(part, Request(prompts, artifact.generation, 192, seed=1, steps=4)).tokens == expected.tokens
