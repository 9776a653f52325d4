"""`dgq validate` on `tiny`: against itself, with a reference file, on two ranks, resumed; every real fault caught."""

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
from safetensors.torch import load_file, save_file
from test_bad_input import error_of

from dgq.convert.cli.__main__ import main
from dgq.convert.source.models import open_model
from dgq.convert.validation import free, questions
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
    """An artifact, prompts, and the reference of both in a file, made by a process of its own; and `small`, a
    reference of two questions."""
    path = tmp_path_factory.mktemp("validate")
    shutil.copytree(converted("nvfp4-w4a16"), path / "good")
    (path / "prompts.jsonl").write_text(prompts())
    (path / "few.jsonl").write_text("\n".join(prompts().splitlines()[1:3]))
    result = dgq("validate", *QUICK, "--prompts", path / "few.jsonl", "--reference", path / "small")
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "dgq.convert.cli", "validate", "--against", "tiny", "--quick", "--prompts",
               path / "prompts.jsonl", "--reference", path / "reference"]  # fmt: skip
    subprocess.run([*map(str, command)], check=True, timeout=300)
    return path


def prompts() -> str:
    """Two texts, three tasks, and a prompt that only the reference answers."""
    folder = files("dgq.recipes").joinpath("prompts")
    texts, tasks = (
        folder.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8").splitlines() for kind in ("text", "tasks")
    )
    return "\n".join([*texts[:2], *tasks[:3], json.dumps({"prompt": "Copy: dog sun river"})]) + "\n"


@pytest.fixture(scope="module")
def whole(room: Path) -> dict[str, Any]:
    """The good artifact's report, made in one run."""
    arguments = ("--against", "tiny", "--quick", "--prompts", room / "prompts.jsonl", "-o", room / "whole")
    return validated(room / "good", *arguments)


@pytest.fixture(scope="module")
def few(room: Path, converted: Callable[[str], Path]) -> dict[str, Any]:
    """The report, of two questions, of the good artifact, of W4A4, and of every real fault."""
    paths = [broken.write(room / "good", room, names) for names in broken.TOGETHER]
    with (paths[0] / "chat_template.jinja").open("a") as template:
        template.write("{# of another day #}")
    w4a4 = shutil.copytree(converted("nvfp4"), room / "w4a4")
    return validated(*paths, room / "good", w4a4, *QUICK, "--reference", room / "small", "-o", room / "few", code=1)


def test_bf16_against_itself_loses_nothing(room: Path, tmp_path: Path) -> None:
    found = validated("tiny", "--against", "tiny", "--reference", room / "small", "-o", tmp_path / "out", code=1)
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
    assert own["free"]["tokens_per_second"] * seconds == pytest.approx(own["free"]["tokens"])
    assert all(row["written"]["tiny"] == row["reference"] for row in found["texts"]) and len(found["texts"]) == 2
    assert all(row["error"] == 0 for row in own["weights"]) and len(own["weights"]) == 142
    assert all(row["output"] == row["accumulated"] == 0 and row["router_overlap"] == 1 for row in own["layers"])
    assert own["sensitivity"] == []


def test_a_good_artifact_passes_and_everything_is_written(room: Path, whole: dict[str, Any]) -> None:
    one = whole["artifacts"][0]
    assert whole["ok"] and one["ok"] and all(line["ok"] for line in one["gate"]), one["gate"]
    assert 1e-5 < one["fixed"]["mean"]["kl"][0] < 0.01
    groups = {group: row["questions"] for group, row in one["fixed"]["by_group"].items()}
    assert groups["text"] == 2 and groups["chat"] == 1 and sum(groups.values()) == 6
    assert {row["part"] for row in one["sensitivity"]} == {f"experts {i}" for i in range(6)}
    recovered = sum(row["recovered"][0] for row in one["sensitivity"])
    assert 0.3 < recovered / one["fixed"]["by_level"]["0.75"]["both"]["kl"][0] < 2
    assert {file.stem for file in (room / "whole").glob("*.csv")} == CSV
    assert all(len(file.read_text().splitlines()) > 1 for file in (room / "whole").glob("*.csv"))
    written = json.loads((room / "whole" / "report.json").read_text())
    assert list(differences(written, whole)) == []
    assert not [entry.name for entry in room.iterdir() if entry.name.startswith(".")], "nothing is left behind"


def test_a_reference_from_elsewhere_gives_the_same_report(room: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    arguments = (room / "good", "--reference", room / "reference")
    again = validated(*arguments, "--against", "tiny", "--quick", "-o", tmp_path / "out")
    assert list(differences(whole, again)) == []
    alone = validated(*arguments, "-o", tmp_path / "alone")  # without SRC
    for section in ("fixed", "free"):
        assert list(differences(whole["artifacts"][0][section], alone["artifacts"][0][section])) == []
    unchecked = {line["limit"].split(".")[0] for line in alone["artifacts"][0]["gate"] if line["ok"] is None}
    assert unchecked == {"structure", "weights", "layers"} and alone["ok"]


def test_without_quick_all_levels_are_asked(room: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """By parts put back, and of more questions by layers; what is asked of fixed canvases is the same."""
    more = ("--against", "tiny", "--reference", room / "reference", "-o", tmp_path / "out")
    (full,), (quick,) = validated(room / "good", *more)["artifacts"], whole["artifacts"]
    assert list(differences(full["fixed"], quick["fixed"])) == []
    recovered = [sum(row["recovered"][0] for row in one["sensitivity"]) for one in (full, quick)]
    assert 0.3 < recovered[0] / full["fixed"]["mean"]["kl"][0] < 2 and recovered[0] != recovered[1]
    assert full["layers"] != quick["layers"]


def test_two_ranks_give_the_numbers_of_one(
    room: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two questions, so that both have some."""
    code = (
        "from dgq.convert.validation import free, questions; questions.ROWS = free.ROWS = 2\n"
        "import matplotlib.figure; matplotlib.figure.Figure.savefig = lambda *a, **k: None\n"
        "from dgq.convert.cli.__main__ import main; main()"
    )
    (tmp_path / "small.py").write_text(code)
    arguments = [room / "good", "--against", "tiny", "--quick", "--prompts", room / "prompts.jsonl"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, tmp_path / "small.py"]
    command = [*map(str, [*launch, "validate", *arguments, "-o", tmp_path / "of2"])]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    two = json.loads((tmp_path / "of2" / "report.json").read_text())
    for module in (free, questions):
        monkeypatch.setattr(module, "ROWS", 2)
    one = validated(*arguments, "-o", tmp_path / "of1")
    assert list(differences(one, two)) == []
    means = [report["artifacts"][0]["fixed"]["mean"]["kl"][0] for report in (whole, two)]
    assert means[0] == pytest.approx(means[1], rel=1e-4), "nor do batches matter"
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_goes_on_after_a_kill(room: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dgq.convert.cli", "validate", room / "good", "--against", "tiny", "--quick",
               "--prompts", room / "prompts.jsonl", "-o", out, "--json"]  # fmt: skip
    work = tmp_path / ".out.validation"
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work / "good-free-00000.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (work / "reference-fixed-00000.safetensors").exists()
    done = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
    assert len(done) >= 5
    said = error_of("validate", str(room / "good"), "--against", "tiny", "-o", str(out))
    assert "an unfinished validation lies in" in said and "its options was" in said
    half = sorted(done)[0]
    (work / half).write_bytes(b"torn")  # a power cut in the midst of it
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
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
    said = error_of("validate", str(bad), "--reference", str(room / "reference"), "-o", str(tmp_path / "out"))
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


def test_w4a4_is_judged_by_its_rounded_inputs(room: Path, few: dict[str, Any], tmp_path: Path) -> None:
    more = (*QUICK, "--reference", room / "small", "-o", tmp_path / "out", "--activations", "nvfp4")
    with_, other = validated(room / "w4a4", room / "good", *more)["artifacts"]
    same, without = few["artifacts"][-2:]
    assert (with_["activations"], other["activations"], without["activations"]) == ("nvfp4", None, None)
    assert with_["fixed"]["mean"]["kl"][0] > 1.2 * without["fixed"]["mean"]["kl"][0]
    assert with_["layers"][3]["experts"] > 1.2 * without["layers"][3]["experts"]
    assert list(differences(other, same)) == [], "which has no input scales"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{good}"], "nothing to write: give -o REPORT"),
        (["{good}", "-o", "{out}"], "--against SRC is needed"),
        (["{good}", "-o", "{out}", "--reference", "{good}/config.json"], "no reference of dgq validate, or damaged"),
        (["{good}", "-o", "{out}", "--reference", "{reference}", "--seed", "3"], "was made with seed 0"),
        (["{good}", "-o", "{out}", "--reference", "{reference}", "--prompts", "x"], "has its own; leave it out"),
        (["{good}", "-o", "{out}", "--against", "tiny", "--prompts", "{bad}"], 'bad.jsonl, line 2: expected {"prompt"'),
        (["{good}", "-o", "{out}", "--against", "tiny", "--gate", "{gate}"], "gate.toml: fixed.kl_meen: Extra inputs"),
        (["{good}", "-o", "{good}", "--against", "tiny"], "exists"),
        (["{good}", "-o", "{out}", "--against", "tiny", "--activations", "nvfp8"], "nvfp8"),
    ],
)
def test_what_is_wrong_ends_in_one_line(room: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "' + "one two three " * 60 + '"}\n{"question": "?"}\n')
    (tmp_path / "gate.toml").write_text("[fixed]\nkl_meen = 1\n")
    names = {"good": room / "good", "out": tmp_path / "out", "reference": room / "reference",
             "bad": tmp_path / "bad.jsonl", "gate": tmp_path / "gate.toml"}  # fmt: skip
    result = dgq("validate", *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not isinstance(result.exception, AssertionError | torch.OutOfMemoryError)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_another_models_reference_is_refused(room: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(str(files("dgq.recipes").joinpath("tiny")), tuned)
    found = load_file(tuned / broken.FILE)
    found["model.decoder.norm.weight"][0] += 1
    save_file(found, tuned / broken.FILE)
    arguments = ("--against", str(tuned), "--reference", str(room / "reference"), "-o", str(tmp_path / "out"))
    assert "was made from other weights" in error_of("validate", str(room / "good"), *arguments)


def test_the_gate_is_the_users(room: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text('[fixed]\nkl = { "0.5" = 1e-6, "0.6" = 1 }\n[cost]\nvram_gib = 24\n')
    arguments = ("--reference", room / "small", "--gate", tmp_path / "gate.toml", "-o", tmp_path / "out")
    found = validated(room / "good", *arguments, code=1)
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
