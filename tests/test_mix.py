"""`dgq mix`: trials beside whole models, the choice beside all choices, and bytes beside what is written."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from micro import micro_config, write_micro
from safetensors import safe_open
from torch.nn import functional

from dgq.convert import mix, trials
from dgq.convert.cli import main
from dgq.convert.mix import Option, choose
from dgq.convert.plan import make_plan
from dgq.convert.recipes import find_recipe
from dgq.convert.samples import chunks, documents
from dgq.convert.source import open_source
from dgq.convert.trials import Meter
from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.artifact import open_artifact
from dgq.runtime.model import Model
from dgq.runtime.names import DECODER, EMBEDDING

DOCUMENTS = [
    {"text": "the king went to the wind and the apple of the door was in the house of the king for a day " * 2},
    {"messages": [{"role": "user", "content": "say apple"}, {"role": "assistant", "content": "apple"}]},
]


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that every scheme divides, and rows that super-blocks do not."""
    config = micro_config()
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 64,
                              "head_dim": 64, "sliding_window": 8}  # fmt: skip
    path = write_micro(tmp_path_factory.mktemp("mix") / "model", config)
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    return path


def mixed(micro: Path, to: str, size: int, out: Path, *more: object) -> dict[str, Any]:
    options = ("--prompts", micro / "prompts.jsonl", "--device", "cpu", "--threads", 1, "--json")
    result = dgq("mix", micro, "--to", to, "--bytes", f"{size}B", "-o", out, *options, *more)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def random_parts(rng: random.Random, parts: int, options: int) -> list[list[Option]]:
    return [
        [Option(str(i), rng.randrange(1, 60), rng.choice((0.0, rng.random(), rng.random()))) for i in range(options)]
        for _ in range(parts)
    ]


def test_no_choice_is_better() -> None:
    """Every choice there is, tried."""
    rng = random.Random(0)
    for _ in range(150):
        parts = random_parts(rng, rng.randint(1, 5), rng.randint(1, 4))
        least = sum(min(option.bytes for option in each) for each in parts)
        room = least + rng.randrange(0, 120)
        picked = choose(parts, room)
        bytes_and_loss = [
            (sum(option.bytes for option in every), sum(option.kl for option in every))
            for every in itertools.product(*parts)
        ]
        best = min(loss for size, loss in bytes_and_loss if size <= room)
        chosen = [each[i] for each, i in zip(parts, picked, strict=True)]
        assert sum(option.bytes for option in chosen) <= room
        assert sum(option.kl for option in chosen) == pytest.approx(best, abs=1e-12)


def test_thinned_choices_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as the best one with a cell less for each part; and what just fits is found."""
    rng = random.Random(1)
    for _ in range(20):
        parts = random_parts(rng, 12, 4)
        room = sum(min(option.bytes for option in each) for each in parts) + 200
        exact = choose(parts, room - 12 * -(-room // 64))
        monkeypatch.setattr(mix, "STATES", 64)
        thinned, tight = choose(parts, room), choose(parts, room - 200)
        monkeypatch.undo()
        losses = [sum(each[i].kl for each, i in zip(parts, found, strict=True)) for found in (thinned, exact)]
        assert losses[0] <= losses[1] + 1e-12
        sizes = [sum(each[i].bytes for each, i in zip(parts, found, strict=True)) for found in (thinned, tight)]
        assert sizes[0] <= room and sizes[1] == room - 200


def test_a_trial_is_the_model_with_these_weights(micro: Path, tmp_path: Path) -> None:
    """The whole model with ggml's own bytes in their place, on the same canvases, plain and on BF16's logits."""
    source = open_source(str(micro))
    made = chunks(documents(source, micro / "prompts.jsonl")[0], 3, 0, source)
    changed = [
        {f"{DECODER}layers.0.experts.gate_up_proj": "q4_k"},
        {f"{DECODER}layers.1.self_attn.k_proj.weight": "q5_0", f"{DECODER}layers.1.mlp.down_proj.weight": "q8_0"},
        {f"{DECODER}self_conditioning.up_proj.weight": "q4_k", f"{DECODER}layers.0.mlp.up_proj.weight": "q4_k"},
        {EMBEDDING: "q6_k"},
    ]
    asked = [{name: SCHEMES[scheme] for name, scheme in trial.items()} for trial in changed]
    plan, steps = make_plan(source, find_recipe("gguf")), []
    with Meter(plan, made, tmp_path, "cpu", 1) as meter:
        meter.prepare(lambda: None)
        found = meter.kl(asked, lambda: steps.append(1))
        assert len(steps) == meter.steps(asked)
    assert not list(tmp_path.iterdir())
    weights = {name: source[name] for name in source}
    models = [Model(source.config, weights, "cpu", torch.float32)]
    models += [Model(source.config, weights | _ggmls(weights, trial), "cpu", torch.float32) for trial in changed]
    lost = [[] for _ in changed]
    for chunk in made:
        for canvas, owner in zip(chunk.canvases, chunk.owner, strict=True):
            caches = [model.new_cache(1) for model in models]
            for model, cache in zip(models, caches, strict=True):
                model.encode(torch.tensor([chunk.prompts[owner]]), cache)
            plain = models[0].decode(canvas[None], caches[0])
            for given in (None, plain):
                wanted, *others = [m.decode(canvas[None], c, given) for m, c in zip(models, caches, strict=True)]
                for kept, other in zip(lost, others, strict=True):
                    logs = [side.double().log_softmax(-1)[0] for side in (other, wanted)]
                    kept.append(float(functional.kl_div(*logs, reduction="batchmean", log_target=True)))
    for kl, several in zip(found, lost, strict=True):
        assert kl == pytest.approx(sum(several) / len(several), rel=1e-3) and kl > 1e-6


def _ggmls(weights: dict[str, Packed], trial: dict[str, str]) -> dict[str, Packed]:
    found = {}
    for name, scheme in trial.items():
        kind = gguf.GGMLQuantizationType[scheme.upper()]
        values = weights[name].dequantize().numpy()
        packed = libgguf.quantize_rows(np.ascontiguousarray(values.reshape(-1, values.shape[-1])), kind)
        rows = gguf.quants.dequantize(
            np.asarray(packed).view(np.uint8).reshape(values.size // values.shape[-1], -1), kind
        )
        found[name] = Packed(SCHEMES["f32"], values.shape, {"": torch.from_numpy(rows.reshape(values.shape))})
    return found


def test_the_recipe_writes_what_was_promised(micro: Path, tmp_path: Path) -> None:
    size = make_plan(open_source(str(micro)), find_recipe("gguf")).nbytes
    found = mixed(micro, "gguf", size + 50_000, tmp_path / "mine.toml")
    assert size < found["bytes"] <= size + 50_000 and found["default"]["bytes"] == size
    assert found["kl"]["measured"] < found["default"]["kl"]
    result = dgq("convert", micro, "--to", "gguf", "--recipe", tmp_path / "mine.toml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").glob("*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    assert sum(tensor.n_bytes for tensor in tensors) == found["bytes"]
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
    chosen = {part["part"]: part["chosen"] for part in found["parts"]}
    assert kinds["token_embd.weight"] == chosen["embedding"]
    assert kinds["blk.1.attn_k.weight"] == chosen["self_attn.k_proj 1"]
    assert len(set(chosen.values())) > 2
    again = mixed(micro, "gguf", size + 50_000, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "mine.toml").read_bytes()
    assert {**again, "seconds": 0, "output": 0} == {**found, "seconds": 0, "output": 0}


@pytest.mark.parametrize("to", ["bnb4", "nvfp4"])
def test_directories_mix_too(micro: Path, tmp_path: Path, to: str) -> None:
    """One group of both layers; parts in 16 bits are among the choices, and the artifact opens."""
    found = mixed(micro, to, 1_200_000, tmp_path / "mine.toml", "--groups", 1)
    chosen = {part["part"]: part["chosen"] for part in found["parts"]}
    assert {"bf16", *mix.LADDERS[to]} >= set(chosen.values()) and len(set(chosen.values())) > 1
    assert "experts.down_proj 0-1" in chosen and ("embedding" in chosen) == (to == "nvfp4")
    result = dgq("convert", micro, "--to", to, "--recipe", tmp_path / "mine.toml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in stored.values()) == found["bytes"] <= 1_200_000
    weights = open_artifact(tmp_path / "out").weights
    for part in found["parts"]:
        assert {weights[name].scheme.name for name in part["weights"]} == {part["chosen"]}


@pytest.mark.parametrize(
    ("size", "out", "said"),
    [
        ("1KB", "mine.toml", "gguf takes 626,864 at least"),
        ("3MB", "mine.toml", "hold everything in BF16; there is nothing to choose"),
        ("1MB", "mine.txt", "a recipe's name ends in .toml"),
        ("1MB", "none/mine.toml", "there is no directory"),
        ("1MB", "there.toml", "exists already"),
    ],
)
def test_what_is_wrong_ends_in_one_line(micro: Path, tmp_path: Path, size: str, out: str, said: str) -> None:
    (tmp_path / "there.toml").touch()
    result = dgq("mix", micro, "--to", "gguf", "--bytes", size, "-o", tmp_path / out)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.output
    assert [file.name for file in tmp_path.iterdir()] == ["there.toml"]


def test_a_full_disk_is_known_before(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    options = ("--prompts", micro / "prompts.jsonl", "--device", "cpu", "-o", tmp_path / "mine.toml")
    result = dgq("mix", micro, "--to", "gguf", "--bytes", "1MB", *options)
    assert result.exit_code == 2 and "GiB of disk while it measures" in result.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_without_an_answer_are_nothing_to_measure_on(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "say wind"}]}))
    options = ("--bytes", "1MB", "-o", tmp_path / "mine.toml", "--prompts", tmp_path / "open.jsonl")
    result = dgq("mix", micro, "--to", "gguf", *options)
    assert result.exit_code == 2 and "holds no text and no chat with an answer" in result.stderr
