"""`dgq mix`: trials beside whole models, the choice beside all choices, and bytes beside what is written."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from forked import forked
from micro import micro_config, write_micro
from safetensors import safe_open
from sparse26b import write_sparse_26b
from test_budget import peak, shaped
from torch.nn import functional

from dgq.convert.cli.__main__ import main
from dgq.convert.layerwise.budget import Budget
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.estimate import Sizes
from dgq.convert.layerwise.samples import chunks, documents
from dgq.convert.mixture import choice, parts, trials
from dgq.convert.mixture.choice import Option, choose
from dgq.convert.mixture.trials import Meter, TrialNeeds
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.sizes import shown
from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import DECODER, EMBEDDING, layer_of

Command = Callable[..., Result]
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
        monkeypatch.setattr(choice, "STATES", 64)
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
        order = [number for together in trials.batches(asked) for number in together]
        found = meter.kl(asked, lambda: steps.append(1))
        assert sorted(order) == [0, 1, 2, 3] and order[2:] == [0, 1], "those before the layers first"
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
    assert {"bf16", *parts.LADDERS[to]} >= set(chosen.values()) and len(set(chosen.values())) > 1
    assert "experts.down_proj 0-1" in chosen and ("embedding" in chosen) == (to == "nvfp4")
    result = dgq("convert", micro, "--to", to, "--recipe", tmp_path / "mine.toml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in stored.values()) == found["bytes"] <= 1_200_000
    weights = open_artifact(tmp_path / "out").weights
    for part in found["parts"]:
        assert {weights[name].scheme.name for name in part["weights"]} == {part["chosen"]}
    source = open_source(str(micro))
    made = chunks(documents(source, micro / "prompts.jsonl")[0], 0, 0, source)
    chosen = {n: weights[n].scheme for part in found["parts"] for n in part["weights"] if part["chosen"] != "bf16"}
    with Meter(make_plan(source, find_recipe(to)), made, tmp_path, "cpu", 1) as meter:
        for name, measured in meter._quantised(chosen).items():
            assert torch.equal(measured.dequantize(), weights[name].dequantize()), (
                "what was measured is what is written"
            )


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


def test_each_option_has_its_own_loss(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trials went through the model with it."""
    monkeypatch.setattr(trials, "BATCH", 3)
    found = mixed(micro, "bnb4", 1_200_000, tmp_path / "mine.toml")
    source = open_source(str(micro))
    made = chunks(documents(source, micro / "prompts.jsonl")[0], 0, 0, source)
    with Meter(make_plan(source, find_recipe("bnb4")), made, tmp_path, "cpu", 1) as meter:
        meter.prepare(lambda: None)
        for part in reversed(found["parts"]):
            told = {option["scheme"]: option["kl"] for option in part["options"]}
            (alone,) = meter.kl([dict.fromkeys(part["weights"], SCHEMES["nf4"])], lambda: None)
            assert told == {"nf4": pytest.approx(alone, rel=1e-9), "bf16": 0}


@pytest.fixture
def short(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Few trials, some batches of them: dgq mix with --bytes and more."""
    monkeypatch.setitem(parts.LADDERS, "gguf", ("q4_k", "q8_0"))
    monkeypatch.setattr(trials, "BATCH", 5)
    options = ("--prompts", micro / "prompts.jsonl", "--device", "cpu", "--threads", 1, "--to", "gguf")
    return lambda out, size, *more: dgq("mix", micro, *options, "-o", tmp_path / out, "--bytes", size, *more)


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_broken_off_it_goes_on(short: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first batch of trials, a later one, the last look at the whole: the rest is done, and no more."""
    real, seen = Meter.kl, []

    def kl(self: Meter, asked: Any, step: Any, stop: int = 0) -> list[float]:
        seen.append(len(asked))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return real(self, asked, step)

    monkeypatch.setattr(Meter, "kl", kl)
    assert short("whole.toml", "1MB").exit_code == 0
    whole = seen[:]
    for done in (1, 4, len(whole)):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "kl", lambda *given, stop=done: kl(*given, stop=stop))
            assert short("mine.toml", "1MB").exit_code == 130
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == ([".mine.toml.mix", "whole.toml"] if done > 1 else ["whole.toml"])
        if done > 1:
            other = short("mine.toml", "1MB", "--seed", 1)
            assert other.exit_code == 2 and "an unfinished mix lies in" in other.stderr
            assert "its seed was" in other.stderr
        seen.clear()
        result = short("mine.toml", "1MB")
        assert result.exit_code == 0 and ("going on with an unfinished mix" in result.stderr) == (done > 1)
        assert seen == whole[done - 1 :]
        assert _same(tmp_path / "mine.toml", tmp_path / "whole.toml")
        assert len(list(tmp_path.iterdir())) == 2
        (tmp_path / "mine.toml").unlink()


def test_killed_it_goes_on(micro: Path, tmp_path: Path) -> None:
    """By SIGKILL, in the middle of a batch: the 2 before it, of 2 and 5 trials, are kept."""

    def mix(out: str, kill: int) -> None:
        parts.LADDERS["gguf"], trials.BATCH = ("q8_0",), 5
        real, seen = Meter._lost, []

        def lost(*given: Any) -> Any:
            seen.append(1)
            if len(seen) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        Meter._lost = lost
        arguments = ("mix", micro, "--to", "gguf", "--bytes", "1.2MB", "-o", tmp_path / f"{out}.toml", "--threads", 1)
        main([*map(str, arguments), "--prompts", str(micro / "prompts.jsonl"), "--device", "cpu"])

    for out, kill in (("whole", 0), ("mine", 8), ("mine", 0)):
        done = forked(lambda out=out, kill=kill: mix(out, kill))
        assert done.returncode == (-9 if kill else 0), done.stderr
    assert "going on with an unfinished mix: 2 results" in done.stderr
    assert _same(tmp_path / "mine.toml", tmp_path / "whole.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml", "whole.toml"]


def test_the_recipe_does_not_depend_on_the_budget(short: Command, micro: Path, tmp_path: Path) -> None:
    """What just holds it, and a byte less: one line, before any work."""
    source = open_source(str(micro))
    made = chunks(documents(source, micro / "prompts.jsonl")[0], 0, 0, source)
    plan = make_plan(source, find_recipe("gguf"))
    floor = max(sum(n.values()) for n in TrialNeeds(plan, "cpu", Sizes.of(made)).moments().values())
    result = short("less.toml", "1MB", "--ram", f"{floor - 1}B")
    assert result.exit_code == 2 and f"needs {shown(floor)} at least" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "measuring" in result.stderr and not list(tmp_path.iterdir())
    assert short("free.toml", "1MB").exit_code == 0
    assert short("held.toml", "1MB", "--ram", f"{floor}B").exit_code == 0
    assert _same(tmp_path / "held.toml", tmp_path / "free.toml")


def test_threads_by_the_budget(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for beside a layer and a trial's weights."""
    gib = 1 << 30
    monkeypatch.setattr(trials, "slices_ram", lambda plan: (0, gib))
    source = open_source(str(micro))
    plan, made = (
        make_plan(source, find_recipe("gguf")),
        chunks(documents(source, micro / "prompts.jsonl")[0], 0, 0, source),
    )
    one = sum(TrialNeeds(plan, "cpu", Sizes.of(made)).moments()["quantising"].values())
    pools: list[int] = []
    monkeypatch.setattr(trials, "ThreadPoolExecutor", lambda n: pools.append(n) or ThreadPoolExecutor(n))
    for more in (0, gib - 1, 2 * gib, 99 * gib):
        with Meter(plan, made, tmp_path, "cpu", 8, Budget(ram=one + more)):
            pass
    assert pools == [1, 1, 3, 8]
    with pytest.raises(InputError, match=r"measuring \(quantising\) needs .* slices of a thread 1.0 GiB"):
        Meter(plan, made, tmp_path, "cpu", 8, Budget(ram=one - 1))


@pytest.mark.parametrize("shape", ["experts", "attention", "vocabulary"])
def test_what_is_counted_is_allocated(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of the table, of a layer's experts, and of everything at once."""
    monkeypatch.setattr(trials, "POSITIONS", 16)  # of HEAD_TOKENS an eighth, too
    source = shaped(shape, tmp_path / "micro", monkeypatch, intermediate_size=256)
    chunk = Chunk(((5,) * 100, (6,) * 64), torch.zeros(4, 64, dtype=torch.int64), (0, 0, 1, 1), torch.ones(4).long())
    plan = make_plan(source, find_recipe("gguf"))
    counted = TrialNeeds(plan, "cpu", Sizes.of([chunk])).moments()
    every = {n: SCHEMES["q8_0"] for n, s in source.text.items() if len(s.shape) > 1 and ".router." not in n}
    asked = [{n: s for n, s in every.items() if part in n} for part in ("embed_tokens", "experts", "")]
    with Meter(plan, [chunk], tmp_path, "cpu", 1) as meter:
        allocated = peak(lambda: (meter.prepare(lambda: None), meter.kl(asked, lambda: None)))
    most = max(sum(n for part, n in moment.items() if "slices" not in part) for moment in counted.values())
    print(f"{shape}: {most:,} counted, {allocated:,} allocated, {most / allocated:.2f}", counted)
    assert allocated <= most <= 2 * allocated


def test_what_the_26b_costs(tmp_path: Path) -> None:
    """As --help says it: passes with two for BF16 and one each for what was chosen and the default recipe; GiB of disk.
    And the floors: a card of 24 GB, 8 GiB of RAM."""
    source = open_source(str(write_sparse_26b(tmp_path / "real")), weights=False)
    layers, told = len(source.config.layers), " ".join(dgq("mix", "--help").stdout.split())
    passes, counts = {}, {}
    for to, groups in (("gguf", 5), ("nvfp4", 5), ("bnb4", 5), ("gguf", 3), ("gguf", 2), ("gguf", 1), ("gguf", 30)):
        asked = [trial for part in parts.parts(source, to, groups) for trial in part.trials.values()]
        first = [min(-1 if (i := layer_of(name)) is None else i for name in trial) for trial in asked]
        passes[to, groups] = sum(layers - max(0, i) for i in first) // layers + 4
        counts[to, groups] = len(asked)
    assert f"{counts['gguf', 5]} trials to gguf, {passes['gguf', 5]} passes" in told
    assert f"nvfp4 {counts['nvfp4', 5]} and {passes['nvfp4', 5]}" in told
    assert f"bnb4 {counts['bnb4', 5]} and {passes['bnb4', 5]}" in told
    several = [passes["gguf", groups] for groups in (3, 2, 1, 30)]
    assert "in 3 groups {}, in 2 groups {}, in one {}, each layer for itself {};".format(*several) in told
    disk = 4 * source.config.hidden * 8192 * (layers + 2 + trials.BATCH)
    assert f"{disk / 2**30:.1f} GiB a chunk" in told
    plan = make_plan(source, find_recipe("gguf"))
    for device, most in (("cpu", 8), ("cuda", 12)):
        moments = TrialNeeds(plan, device, Sizes.most(source.config)).moments()
        sums = {moment: sum(parts.values()) / 2**30 for moment, parts in moments.items()}
        print(device, {moment: round(n, 2) for moment, n in sums.items()})
        assert 4 < max(sums.values()) < most
        assert moments["layer"]["a trial's"] > 4 * 3 * 128 * 704 * 2816


def test_a_full_disk_is_known_before(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    options = ("--prompts", micro / "prompts.jsonl", "--device", "cpu", "-o", tmp_path / "mine.toml")
    result = dgq("mix", micro, "--to", "gguf", "--bytes", "1MB", *options)
    assert result.exit_code == 2 and "GiB of disk while it measures" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_there_whole_or_not_at_all(short: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the end: the same command goes on, and no half of a recipe is in its way."""
    real = Path.write_text

    def full(self: Path, text: str, *given: Any) -> int:
        if text.startswith("# Made by dgq mix"):
            real(self, text[:20], *given)
            raise OSError("no space left")
        return real(self, text, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        result = short("mine.toml", "1MB")
    assert result.exit_code == 2 and "cannot be written (no space left)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".mine.toml.mix"]
    assert short("mine.toml", "1MB").exit_code == 0 and (tmp_path / "mine.toml").stat().st_size > 1000


def test_prompts_without_an_answer_are_nothing_to_measure_on(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "say wind"}]}))
    options = ("--bytes", "1MB", "-o", tmp_path / "mine.toml", "--prompts", tmp_path / "open.jsonl")
    result = dgq("mix", micro, "--to", "gguf", *options)
    assert result.exit_code == 2 and "holds no text and no chat with an answer" in result.stderr
