"""Adapters beside the weights on a model of two layers: sides, single experts, choices of rows, names that strangers
write. What is right is arithmetic: the factors' products added to float32 weights, one model for each side. peft itself
is the oracle in tests/full/test_adapter_beside.py."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LINEARS, SCALE, write_adapter
from micro import micro_config, micro_tensors
from safetensors.torch import load_file, save_file

from dgq.convert.source.adapter import AdapterChoice, Merged
from dgq.quant.errors import InputError
from dgq.quant.schemes.dense import BF16, F32
from dgq.quant.types import Packed
from dgq.runtime.adapters.adapter import Adapter, open_adapter
from dgq.runtime.adapters.patterns import matches
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.engine.plain import Plain
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.session import Session
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, ENCODER, expected_tensors
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

RAW = micro_config() | {"canvas_length": 16}
CONFIG = ModelConfig.from_json(RAW, "config.json")
TENSORS = micro_tensors(RAW)
WEIGHTS = {name: Packed(BF16, tuple(value.shape), {"": value}) for name, value in TENSORS.items()}
SHAPES = expected_tensors(CONFIG)
IDS, CANVAS = (torch.randint(5, CONFIG.vocab, (1, n), generator=torch.Generator().manual_seed(n)) for n in (21, 16))


def model(*adapters: Adapter, active: tuple[str, ...] | None = None) -> Model:
    return Model(CONFIG, WEIGHTS, options=LoadOptions(adapters=adapters, active=active))


def logits(encoder: Model, decoder: Model | None = None) -> torch.Tensor:
    """Without and with self-conditioning. decoder: another model for the canvas, which reads the same cache."""
    decoder, cache = decoder or encoder, encoder.new_cache(1)
    encoder.encode(IDS, cache)
    first = decoder.decode(CANVAS, cache)
    return torch.cat((first, decoder.decode(CANVAS, cache, first / 0.7)))


def by_hand(path: Path) -> tuple[Model, Model]:
    """A model of the encoder's side and one of the decoder's: B A times the scale added to each weight, in float32."""
    tensors, models = load_file(path / "adapter_model.safetensors"), []
    for side in (ENCODER, DECODER):
        values = {name: value.float() for name, value in TENSORS.items()}
        for name in tensors:
            if ".lora_A." not in name or f"model.{side}" not in name:
                continue
            change = SCALE * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0].replace(side, DECODER)
            if (one := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", module)) is not None:
                weight = values[f"{one[1]}.{'down' if one[3] == 'down' else 'gate_up'}_proj"][int(one[2])]
                weight[len(weight) // 2 if one[3] == "up" else 0 :][: len(change)] += change
            else:
                values[module + ".weight"] += change
        packed = {name: Packed(F32, tuple(value.shape), {"": value}) for name, value in values.items()}
        models.append(Model(CONFIG, packed))
    return models[0], models[1]


EVERYTHING = (*LINEARS, ".experts.")


@pytest.mark.parametrize(
    ("modules", "sides"),
    [(EVERYTHING, (DECODER, ENCODER)), (LINEARS, (DECODER,)), ((".mlp.",), (ENCODER,)), ((".experts.",), (DECODER,))],
    ids=["both", "the decoder's", "the encoder's", "experts"],
)
def test_each_side_has_its_own_numbers(modules: tuple[str, ...], sides: tuple[str, ...], tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", CONFIG, 1, modules, sides)
    ours, right = logits(model(open_adapter(path, SHAPES))), logits(*by_hand(path))
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=0)
    assert float((right - logits(model())).abs().max()) > 0.02


def named(text: str) -> Callable[[str], str]:
    return lambda module: module.replace(".experts.", text) if ".experts." in text else module


def test_names_that_trainers_write(tmp_path: Path) -> None:
    """ ".default." of a state dict, experts below mlp or moe, and no prefix of peft's: the same numbers."""
    plain = write_adapter(tmp_path / "plain", CONFIG, 2, EVERYTHING)
    right = logits(model(open_adapter(plain, SHAPES)))
    state = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(plain / "adapter_model.safetensors").items()
    }
    for number, change in enumerate(
        (
            lambda name: name,
            lambda name: name.replace(".experts.", ".moe.experts."),
            lambda name: name.replace(".experts.", ".mlp.experts."),
            lambda name: name.removeprefix("base_model.model."),
        )
    ):
        path = tmp_path / str(number)
        path.mkdir()
        save_file({change(name): value for name, value in state.items()}, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text((plain / "adapter_config.json").read_text())
        assert torch.equal(logits(model(open_adapter(path, SHAPES))), right)


def test_rows_choose_among_adapters(tmp_path: Path) -> None:
    """A row of a batch gets what its prompt gets alone from a model with that adapter; on a growing cache and on slots,
    whose rows leave."""
    one, two = (
        open_adapter(write_adapter(tmp_path / name, CONFIG, seed, modules), SHAPES)
        for name, seed, modules in (("one", 3, LINEARS), ("two", 4, (".self_attn.", ".experts.")))
    )
    both = model(one, two, active=())
    settings = GenerationConfig(SamplerConfig(steps=3, confidence=0.0), (1,), 0)
    prompts = [[7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19, 20]]
    chosen = ["one", None, "two", "one+two"]
    alone = [model(), model(one), model(two), model(one, two)]
    result = generate(both, Request(prompts, settings, 32, seed=5, adapter=chosen))
    for row, its in enumerate((alone[1], alone[0], alone[2], alone[3])):
        right = generate(its, Request([prompts[row]], settings, 32, seed=5, rows=[row]))
        assert result.canvases[row].tolist() == right.canvases[0].tolist(), row
    tokens = [tuple(generate(its, Request([prompts[0]], settings, 32, seed=5)).tokens[0]) for its in alone]
    assert len(set(tokens)) == 4  # or the test says nothing

    session = Session(Plain(both), 4, 64, settings.sampler)
    assert both.choice is not None
    both.choice.set(both.choice.adapters.numbers(chosen, 4))
    session.start(prompts)
    keep = torch.tensor([1, 2, 3])
    session.keep(keep)
    both.choice.keep(keep)
    random = CounterRandom(1, [0, 1, 2, 3], CONFIG.canvas, CONFIG.vocab, both.device)
    session.state.begin(random, keep, 0)
    found = session.backend.decode(session.state, session._view())
    for row, its in enumerate((alone[0], alone[2], alone[3])):
        cache = its.new_cache(1)
        its.encode(torch.tensor([prompts[row + 1]]), cache)
        right = its.decode(session.state.canvas[row : row + 1], cache)
        torch.testing.assert_close(found[row : row + 1], right, atol=1e-4, rtol=0)


def test_a_batch_that_nobody_has_chosen_for(tmp_path: Path) -> None:
    """Rows of a pass without a request have the default, experts' factors too, whatever the batch before chose."""
    one, two = (
        open_adapter(write_adapter(tmp_path / name, CONFIG, seed, (".o_proj", ".experts.")), SHAPES)
        for name, seed in (("one", 3), ("two", 4))
    )
    both, alone = model(one, two, active=("one",)), model(one)
    ids, canvas = IDS.view(3, 7), CANVAS.expand(3, -1)
    for _ in range(2):
        caches = both.new_cache(3), alone.new_cache(3)
        for its, cache in zip((both, alone), caches, strict=True):
            its.encode(ids, cache)
        ours, right = both.decode(canvas, caches[0]), alone.decode(canvas, caches[1])
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=0)
        assert both.choice is not None
        both.choice.grow(4)
        both.choice.set([{1}, {0, 1}, set(), {1}])


def test_choices_that_are_not_there(tmp_path: Path) -> None:
    one = open_adapter(write_adapter(tmp_path / "one", CONFIG, 3, (".mlp.",)), SHAPES)
    settings = GenerationConfig(SamplerConfig(steps=1), (1,), 0)

    def refused(asked: Model, chosen: Any) -> str:
        with pytest.raises(InputError) as caught:
            generate(asked, Request([[5, 6]], settings, 16, adapter=chosen))
        return str(caught.value)

    assert "'three' is not loaded; there are one" in refused(model(one), "three")
    assert "2 names for 1 prompts" in refused(model(one), ["one", "one"])
    assert "load it with --adapter" in refused(model(), "one")
    with pytest.raises(InputError, match="two adapters are called one"):
        model(one, one)


def test_what_is_merged_for_both_sides(tmp_path: Path) -> None:
    """decoder, encoder and mean, of a two-sided adapter and of a one-sided one, whose other side is the base."""
    name = DECODER + "layers.0.mlp.down_proj.weight"
    base = TENSORS[name].double()
    for sides in ((DECODER, ENCODER), (DECODER,)):
        path = write_adapter(tmp_path / str(len(sides)), CONFIG, 5, (".mlp.",), sides)
        tensors = load_file(path / "adapter_model.safetensors")

        def of(side: str, tensors: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            module = f"base_model.model.{name.replace(DECODER, side).removesuffix('.weight')}.lora_"
            if module + "A.weight" not in tensors:
                return torch.zeros_like(base)
            return SCALE * tensors[module + "B.weight"].double() @ tensors[module + "A.weight"].double()

        adapter = AdapterChoice(path).open(SHAPES)
        means = {"decoder": of(DECODER), "encoder": of(ENCODER), "mean": (of(DECODER) + of(ENCODER)) / 2}
        for side, change in means.items():
            merged = Merged(adapter, side)  # type: ignore[arg-type]
            ours = merged.merged(name, base, 0) if name in merged.parts else base
            torch.testing.assert_close(ours, base + change)


@pytest.mark.parametrize("pattern", [r"([a-z._0-9]+)+X", r"(.*)*(.*)*X", r"(a|a|.)*Y", r"((\w{0,99}\.?){0,99}){0,99}X"])
def test_a_pattern_is_matched_in_bounded_time(pattern: str) -> None:
    """Python's re takes longer than anybody waits for the first of these."""
    began = time.monotonic()
    assert not matches(pattern, "model.encoder.language_model.layers.29.self_attn.q_proj")
    assert time.monotonic() - began < 2


def test_patterns_match_as_pefts_do() -> None:
    """peft: re.match(rf"(.*\\.)?({pattern})$", name), the first pattern that matches."""
    patterns = [
        "q_proj", r"layers\.1\.self_attn\.k_proj", "experts.down_proj", r".*\.mlp\..*", r"layers\.(0|1|2)\..*proj",
        r"[a-z]+_proj", r"[^.]+", r"layers\.\d+\.\w+\.q_proj", "a|b", "^model.*proj$", r"(?:layers\.)?q{0,2}_proj",
        r".*?attn.*", "", "q_proj|k_proj", r"a)|(model.*", r"((l|a|y)+ers\.)+1.*", "[-x._a-l]*", r"[^\W\d]+",
    ]  # fmt: skip
    names = [
        f"{side}.layers.{i}.{module}"
        for side in ("model.decoder", "model.encoder.language_model")
        for i in (0, 1, 12)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "experts.down_proj")
    ] + ["q_proj", "x.y", "_proj", "layers.qq_proj"]
    for pattern in patterns:
        for name in names:
            assert matches(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), (pattern, name)
    for pattern in (r"(?=q)q_proj", r"(q)\1.*|q_proj", "(", "x+" * 600):
        with pytest.raises(InputError):
            matches(pattern, "q_proj") or matches(pattern, "qq_proj")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", CONFIG, 1, (".mlp.",))
    tensors = load_file(path / "adapter_model.safetensors")

    def refused(changed: dict[str, torch.Tensor] | None = None) -> str:
        if changed is not None:
            save_file(changed, path / "adapter_model.safetensors")
        with pytest.raises(InputError) as caught:
            open_adapter(path, SHAPES)
        return str(caught.value)

    first = next(iter(tensors))
    twice = tensors | {first.replace(".weight", ".other.weight"): tensors[first].clone()}
    assert "two adapters' in one file" in refused(twice)
    vision = {f"base_model.model.model.encoder.vision_tower.x.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}
    save_file(tensors | vision, path / "adapter_model.safetensors")
    assert "1 layers of a vision tower are left out" in open_adapter(path, SHAPES).notice
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"(?=a)|(?<=b)x": 2}}))
    assert "name the modules plainly" in refused(tensors)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "is pickled" in refused() and "save_file" in refused()
