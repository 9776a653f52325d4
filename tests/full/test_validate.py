"""`dgq validate`: against itself, with a reference file, on two ranks, resumed; every real fault of `tiny` caught.

What is said of any model is tried on `little`, a random one whose report takes a second; `tiny` has figures to judge.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import broken
import pytest
import torch
from click.testing import CliRunner, Result
from commands import error_of
from forked import Child, forked
from micro import micro_config, write_micro
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.convert.source.models import open_model
from dgq.convert.validation import free, judge, questions
from dgq.convert.validation.judge import LazyModel, RunSettings
from dgq.runtime.engine.plain import Plain
from dgq.runtime.model.model import Model
from dgq.runtime.model.session import Session

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.usefixtures("no_pictures")]
MEASURED = {"seconds", "tokens_per_second", "load_s", "step_ms", "peak_bytes"}  # what no two runs have in common
QUICK = ("--against", "tiny", "--quick")
CSV = {"fixed", "positions", "free", "tasks", "steps", "weights", "layers", "experts", "sensitivity", "gate", "texts"}


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def validated(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = dgq("validate", *arguments, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - MEASURED:
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}.{i}")
    elif a != b:
        yield path, a, b


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, converted: Callable[[str], Path]) -> Path:
    """Of `tiny`: an artifact, and `small`, a reference of two questions."""
    path = tmp_path_factory.mktemp("validate")
    shutil.copytree(converted("nvfp4-w4a16"), path / "good")
    (path / "few.jsonl").write_text("\n".join(prompts().splitlines()[1:3]))
    result = dgq("validate", *QUICK, "--prompts", path / "few.jsonl", "--reference", path / "small")
    assert result.exit_code == 0, result.output
    return path


def prompts() -> str:
    """Two texts, three tasks, and a prompt that only the reference answers."""
    folder = files("dgq.recipes").joinpath("prompts")
    texts, tasks = (
        folder.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8").splitlines() for kind in ("text", "tasks")
    )
    return "\n".join([*texts[:2], *tasks[:3], json.dumps({"prompt": "Copy: dog sun river"})]) + "\n"


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, an artifact of it, prompts, and the reference of both in a file, made by another process."""
    path = tmp_path_factory.mktemp("little")
    config = micro_config()
    config["text_config"] |= {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
    write_micro(path / "model", config)
    generation = json.loads((path / "model" / "generation_config.json").read_text())
    generation["max_denoising_steps"] = 4  # a random model is never sure of its canvas, and would take all 48
    (path / "model" / "generation_config.json").write_text(json.dumps(generation))
    (path / "prompts.jsonl").write_text(prompts())
    for name, more in (("good", ("--recipe", "nvfp4-w4a16")), ("w4a4", ("--input-scale", "0.05"))):
        result = dgq("convert", path / "model", "--to", "nvfp4", *more, "-o", path / name)
        assert result.exit_code == 0, result.output
    command = ("validate", "--against", path / "model", "--quick", "--prompts", path / "prompts.jsonl")
    done = forked(lambda: main([str(word) for word in (*command, "--reference", path / "reference")]))
    assert done.returncode == 0, done.stderr
    return path


def asked(little: Path) -> tuple[object, ...]:
    return little / "good", "--against", little / "model", "--quick", "--prompts", little / "prompts.jsonl"


@pytest.fixture(scope="module")
def whole(little: Path) -> dict[str, Any]:
    """The report of the random model's artifact, made in one run."""
    return judged(*asked(little), "-o", little / "whole")


def judged(*arguments: object) -> dict[str, Any]:
    """A report whose verdict does not matter: a random model's losses are no gate's business."""
    result = dgq("validate", *arguments, "--json")
    assert result.exit_code in (0, 1), (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["ok"] == (result.exit_code == 0)
    return found


@pytest.fixture(scope="module")
def few(room: Path) -> dict[str, Any]:
    """The report, of two questions, of the good artifact and of every real fault. No fault is told by what its artifact
    writes freely, or by the parts that are put back: the first is the reference's here; of the second there are none.
    """
    paths = [broken.write(room / "good", room, names) for names in broken.TOGETHER]
    with (paths[0] / "chat_template.jinja").open("a") as template:
        template.write("{# of another day #}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge.Judge, "free_run", property(lambda self: self.base_run))
        patch.setattr(judge, "parts", lambda artifact: ())
        return validated(*paths, room / "good", *QUICK, "--reference", room / "small", "-o", room / "few", code=1)


def test_bf16_against_itself_loses_nothing(little: Path, tmp_path: Path) -> None:
    source = ("--against", little / "model", "--reference", little / "reference")
    found = validated(little / "model", *source, "-o", tmp_path / "out", code=1)
    own = found["artifacts"][0]
    broken_ = {line["limit"].split()[0] for line in own["gate"] if line["ok"] is False}
    assert broken_ == {"structure.quantized_share", "structure.experts_share", "cost.size_ratio"}, "it is not quantised"
    mean = own["fixed"]["mean"]
    assert all(mean[name] == [0, 0, 0] for name in ("kl", "reverse_kl", "entropy"))
    assert all(mean[name] == [1, 1, 1] for name in ("top1", "top5", "accepted_ratio", "accepted_same"))
    assert own["free"]["steps_ratio"] == [1, 1, 1] and own["free"]["agreement"][0] == 1
    assert own["free"]["histogram"] == found["reference"]["free"]["histogram"]
    passes = sum(
        (int(steps) + 1) * count for steps, count in own["free"]["histogram"].items()
    )  # each ends in a commitment
    seconds = passes * own["cost"]["step_ms"] / 1000
    assert own["free"]["tokens_per_second"] * seconds == pytest.approx(own["free"]["tokens"]) and own["free"]["tokens"]
    assert all(row["written"]["model"] == row["reference"] for row in found["texts"]) and len(found["texts"]) == 6
    names = open_model(str(little / "model")).weights
    assert all(row["error"] == 0 for row in own["weights"]) and len(own["weights"]) == len(names) > 40
    assert all(row["output"] == row["accumulated"] == 0 and row["router_overlap"] == 1 for row in own["layers"])
    assert own["sensitivity"] == []


def test_a_good_artifact_passes_and_everything_is_written(tiny_report: Path) -> None:
    report = json.loads((tiny_report / "report.json").read_text())
    one = next(artifact for artifact in report["artifacts"] if artifact["name"] == "nvfp4")
    assert report["ok"] and one["ok"] and all(line["ok"] for line in one["gate"]), one["gate"]
    assert 1e-5 < one["fixed"]["mean"]["kl"][0] < 0.01
    groups = {group: row["questions"] for group, row in one["fixed"]["by_group"].items()}
    assert groups["text"] == 1 and groups["chat"] == 1 and sum(groups.values()) == 4
    assert {row["part"] for row in one["sensitivity"]} == {f"experts {i}" for i in range(6)}
    recovered = sum(row["recovered"][0] for row in one["sensitivity"])
    assert 0.3 < recovered / one["fixed"]["by_level"]["0.75"]["both"]["kl"][0] < 2
    assert {file.stem for file in tiny_report.glob("*.csv")} == CSV
    assert all(len(file.read_text().splitlines()) > 1 for file in tiny_report.glob("*.csv"))


def test_what_is_printed_is_what_is_written(little: Path, whole: dict[str, Any]) -> None:
    written = json.loads((little / "whole" / "report.json").read_text())
    assert list(differences(written, whole)) == []
    assert not [entry.name for entry in little.iterdir() if entry.name.startswith(".")], "nothing is left behind"


def test_a_reference_from_elsewhere_gives_the_same_report(little: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    arguments = (little / "good", "--reference", little / "reference")
    again = judged(*arguments, "--against", little / "model", "--quick", "-o", tmp_path / "out")
    assert list(differences(whole, again)) == []
    alone = judged(*arguments, "-o", tmp_path / "alone")  # without SRC
    for section in ("fixed", "free"):
        assert list(differences(whole["artifacts"][0][section], alone["artifacts"][0][section])) == []
    unchecked = {line["limit"].split(".")[0] for line in alone["artifacts"][0]["gate"] if line["ok"] is None}
    assert {"structure", "weights", "layers"} <= unchecked
    assert alone["ok"] == all(line["ok"] is not False for line in alone["artifacts"][0]["gate"])


def test_without_quick_all_levels_are_asked(little: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """By parts put back, and of more questions by layers; what is asked of fixed canvases is the same."""
    more = ("--against", little / "model", "--reference", little / "reference", "-o", tmp_path / "out")
    (full,), (quick,) = judged(little / "good", *more)["artifacts"], whole["artifacts"]
    assert list(differences(full["fixed"], quick["fixed"])) == []
    recovered = [sum(row["recovered"][0] for row in one["sensitivity"]) for one in (full, quick)]
    assert 0.3 < recovered[0] / full["fixed"]["mean"]["kl"][0] < 2 and recovered[0] != recovered[1]
    assert full["layers"] != quick["layers"]


def test_two_ranks_give_the_numbers_of_one(
    little: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two questions, so that both have some."""
    code = (
        "from dgq.convert.validation import free, questions; questions.ROWS = free.ROWS = 2\n"
        "import matplotlib.figure; matplotlib.figure.Figure.savefig = lambda *a, **k: None\n"
        "from dgq.convert.cli.__main__ import main; main()"
    )
    (tmp_path / "small.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, tmp_path / "small.py"]
    command = [*map(str, [*launch, "validate", *asked(little), "-o", tmp_path / "of2"])]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)  # the gate may be broken
    two = json.loads((tmp_path / "of2" / "report.json").read_text())
    for module in (free, questions):
        monkeypatch.setattr(module, "ROWS", 2)
    one = judged(*asked(little), "-o", tmp_path / "of1")
    assert list(differences(one, two)) == []
    means = [report["artifacts"][0]["fixed"]["mean"]["kl"][0] for report in (whole, two)]
    assert means[0] == pytest.approx(means[1], rel=1e-4), "nor do batches matter"
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_goes_on_after_a_kill(
    little: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = tmp_path / ".out.validation"

    def killed() -> None:
        """Where the artifact's weights would be compared."""
        judge.Judge._weights = lambda self: (print("so far", flush=True), time.sleep(60))  # type: ignore[method-assign, assign, func-returns-value]
        main([*map(str, ("validate", *asked(little), "-o", out))])

    child = Child(killed)
    assert child.line() == "so far"
    child.kill(signal.SIGKILL)
    assert child.ended().returncode == -signal.SIGKILL
    assert not out.exists() and (work / "reference-fixed-00000.safetensors").exists()
    done = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
    assert len(done) >= 5 and "good-free-00000.safetensors" in done
    said = error_of("validate", str(little / "good"), "--against", str(little / "model"), "-o", str(out))
    assert "an unfinished validation lies in" in said and "its options was" in said
    half = sorted(done)[0]
    (work / half).write_bytes(b"torn")  # a power cut in the midst of it
    result = dgq("validate", *asked(little), "-o", out, "--json")
    assert f"going on with an unfinished validation: {len(done)} results are there" in result.stderr
    assert list(differences(whole, json.loads(result.stdout.splitlines()[-1]))) == []
    assert not work.exists()


def test_every_real_fault_is_caught_and_named(room: Path, few: dict[str, Any], tmp_path: Path) -> None:
    by_name = {one["name"]: one for one in few["artifacts"]}
    for name, (_, says) in broken.FAULTS.items():
        one = by_name[next(names[0] for names in broken.TOGETHER if name in names).replace(" ", "-")]
        lines = [f"{line['limit']}: {line['said']}" for line in one["gate"] if line["ok"] is False]
        assert not one["ok"] and all(any(word in line for line in lines) for word in says), (name, lines)
    assert by_name["good"]["ok"], "and nothing else"
    remarks = {name: one["remarks"] for name, one in by_name.items() if one["remarks"]}
    first = broken.TOGETHER[0][0].replace(" ", "-")
    assert list(remarks) == [first] and "chat template" in remarks[first][0]
    assert f"{first}</b>: its chat template" in (room / "few" / "report.html").read_text()
    result = dgq("validate", room / first, "--reference", room / "small", "-o", tmp_path / "again")
    assert result.exit_code == 1 and re.search(r"^nibbles-swapped: fixed\.\S+.*KL", result.stdout, re.MULTILINE)


def test_a_dropped_tensor_is_named(room: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(room / "good", bad)
    found = load_file(bad / broken.FILE)
    del found[broken.SCALAR]
    save_file(found, bad / broken.FILE)
    said = error_of("validate", str(bad), "--reference", str(room / "small"), "-o", str(tmp_path / "out"))
    assert broken.SCALAR in said and "missing" in said


def test_a_router_in_4_bit_is_named(room: Path, tmp_path: Path) -> None:
    recipe = files("dgq.recipes").joinpath("q4_k_m.toml").read_text("utf-8")
    wrong = re.sub(r'(match = "\*\.ffn_gate_inp\.weight"\nscheme = )"f32"', r'\1"q4_k"', recipe)
    assert wrong != recipe
    (tmp_path / "wrong.toml").write_text(wrong)
    result = dgq("convert", "tiny", "--to", "gguf", "--recipe", tmp_path / "wrong.toml", "-o", tmp_path / "bad")
    assert result.exit_code == 0, result.output
    found = validated(tmp_path / "bad", "--reference", room / "small", "-o", tmp_path / "out", code=1)
    lines = [line["said"] for line in found["artifacts"][0]["gate"] if line["ok"] is False]
    assert lines == ["model.decoder.layers.0.router.proj.weight is in q4_k (6 such)"]


def test_a_runtime_that_skips_self_conditioning_is_caught(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Model._conditioned
    monkeypatch.setattr(Model, "_conditioned", lambda self, x, logits: own(self, x, None))
    arguments = ("--reference", room / "small", "-o", tmp_path / "out")
    found = validated(room / "good", *arguments, code=1)
    lines = {line["limit"].split()[0]: line["said"] for line in found["artifacts"][0]["gate"] if line["ok"] is False}
    assert lines["fixed.conditioned_ratio"].startswith("self-conditioning: KL ")


def test_w4a4_is_judged_by_its_rounded_inputs(little: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    more = ("--against", little / "model", "--quick", "--reference", little / "reference", "-o")
    paths = (little / "w4a4", little / "good")
    with_, other = judged(*paths, *more, tmp_path / "with", "--activations", "nvfp4")["artifacts"]
    without, same = judged(*paths, *more, tmp_path / "without")["artifacts"]
    assert (with_["activations"], other["activations"], without["activations"]) == ("nvfp4", None, None)
    assert with_["fixed"]["mean"]["kl"][0] > 1.2 * without["fixed"]["mean"]["kl"][0]
    assert with_["layers"][1]["experts"] > 1.2 * without["layers"][1]["experts"]
    assert list(differences(other, same)) == [] == list(differences(whole["artifacts"][0], same)), "no input scales"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{good}"], "nothing to write: give -o REPORT"),
        (["{good}", "-o", "{out}"], "--against SRC is needed"),
        (["{good}", "-o", "{out}", "--reference", "{good}/config.json"], "no reference of dgq validate, or damaged"),
        (["{good}", "-o", "{out}", "--reference", "{reference}", "--seed", "3"], "was made with seed 0"),
        (["{good}", "-o", "{out}", "--reference", "{reference}", "--prompts", "x"], "has its own; leave it out"),
        (["{good}", "-o", "{out}", "--against", "{model}", "--prompts", "{bad}"], 'line 2: expected {"prompt"'),
        (["{good}", "-o", "{out}", "--against", "{model}", "--gate", "{gate}"], "toml: fixed.kl_meen: Extra inputs"),
        (["{good}", "-o", "{good}", "--against", "{model}"], "exists"),
        (["{good}", "-o", "{out}", "--against", "{model}", "--activations", "nvfp8"], "nvfp8"),
    ],
)
def test_what_is_wrong_ends_in_one_line(little: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "' + "one two three " * 60 + '"}\n{"question": "?"}\n')
    (tmp_path / "gate.toml").write_text("[fixed]\nkl_meen = 1\n")
    names = {"good": little / "good", "out": tmp_path / "out", "reference": little / "reference",
             "model": little / "model", "bad": tmp_path / "bad.jsonl", "gate": tmp_path / "gate.toml"}  # fmt: skip
    result = dgq("validate", *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not isinstance(result.exception, AssertionError | torch.OutOfMemoryError)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_another_models_reference_is_refused(little: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(little / "model", tmp_path / "tuned")
    (file,) = (file for file in tuned.glob("*.safetensors") if "model.decoder.norm.weight" in load_file(file))
    found = load_file(file)
    found["model.decoder.norm.weight"][0] += 1
    save_file(found, file)
    arguments = ("--against", str(tuned), "--reference", str(little / "reference"), "-o", str(tmp_path / "out"))
    assert "was made from other weights" in error_of("validate", str(little / "good"), *arguments)


def test_the_gate_is_the_users(little: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text('[fixed]\nkl = { "0.5" = 1e-6, "0.6" = 1 }\n[cost]\nvram_gib = 24\n')
    arguments = ("--reference", little / "reference", "--gate", tmp_path / "gate.toml", "-o", tmp_path / "out")
    found = validated(little / "good", *arguments, code=1)
    lines = [(line["limit"], line["ok"]) for line in found["artifacts"][0]["gate"]]
    assert lines == [
        ("fixed.kl at noise 0.5 <= 1e-06", False), ("fixed.kl.0.6", None), ("cost.vram_gib <= 24", None)
    ]  # fmt: skip


def test_a_dropped_model_is_gone() -> None:
    """At once: a GPU that holds one BF16 model has no room for the next beside it. A session and its model hold each
    other, so counting references alone frees neither."""
    settings = RunSettings(None, 0, True, "cpu", None, None)
    lazy = LazyModel(open_model("tiny"), settings, None)
    gc.disable()
    try:
        model = lazy.model
        model.keep_session(Session(Plain(model), 1, 512, lazy._artifact.generation.sampler))  # as on a GPU
        gone = weakref.ref(model)
        del model
        lazy.drop()
        left = gone() is not None  # outside assert, which would keep what it looked at
        assert not left
    finally:
        gc.enable()
