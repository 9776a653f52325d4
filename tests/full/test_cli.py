"""The commands as a person or a program meets them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from forked import forked
from micro import write_micro
from rich.console import Console

from dgq.convert.cli.__main__ import main
from dgq.convert.cli.terminal.canvas import CanvasView
from dgq.convert.estimate import forecast
from dgq.runtime.engine.engine import Step
from dgq.runtime.files.tokenizer import Tokenizer

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro(tmp_path_factory.mktemp("cli") / "micro", shards=0)


@pytest.fixture(scope="module")
def artifact(source: Path) -> Path:
    out = source.parent / "deep" / "er" / "out"
    assert CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "-o", str(out)]).exit_code == 0
    return out


def last_json(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "one JSON object and nothing else"
    found = json.loads(lines[0])
    assert isinstance(found, dict)
    return found


def test_plan_and_inspect_agree(source: Path, artifact: Path) -> None:
    planned, found = last_json("plan", str(source), "--to", "gguf"), last_json("inspect", str(artifact))
    schemes = {name: tensor["scheme"] for name, tensor in planned["tensors"].items() if name != "rope_freqs.weight"}  # type: ignore[attr-defined]
    assert found["tensors"] == schemes
    assert found["params"] == planned["params"] and found["quantized_share"] == planned["quantized_share"]
    assert found["provenance"]["recipe"] == "q4_k_m"  # type: ignore[index]
    bare = last_json("inspect", str(artifact / "micro-Q4_K_M.gguf"))
    assert bare["tensors"] == schemes and bare["sampler"].items() >= {"steps": 48, "stability": 1}.items()  # type: ignore[attr-defined]


def test_pages_for_people(source: Path, artifact: Path) -> None:
    page = CliRunner().invoke(main, ["plan", str(source), "--to", "gguf"]).stdout
    for words in (
        "routed experts",
        "q5_0",
        "bits a weight",
        "of the parameters lie in rows that no K-quant fits",
        "VRAM",
    ):
        assert words in " ".join(page.split()), page
    page = CliRunner().invoke(main, ["inspect", str(artifact)]).stdout
    for words in ("origin", "recipe q4_k_m, effort fast, no imatrix", "entropy_bound 0.1", "experts 4"):
        assert words in " ".join(page.split()), page


def test_run_prints_plain_text_to_a_pipe(artifact: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dgq.convert.cli",
        "run",
        str(artifact),
        "-",
        "--max-new-tokens",
        "5",
        "--steps",
        "2",
    ]
    done = subprocess.run(command, input="hello", capture_output=True, text=True, check=True)
    assert done.stderr == "" and "\x1b" not in done.stdout
    same = last_json("run", str(artifact), "hello", "--max-new-tokens", "5", "--steps", "2")
    assert done.stdout == f"{same['text']}\n"
    assert len(same["tokens"]) <= 5 and same["steps"] == [2]  # type: ignore[arg-type]


def test_a_bare_gguf_and_its_directory_write_the_same(artifact: Path) -> None:
    options = ("--chat", "--max-new-tokens", "20", "--steps", "3", "--seed", "4")
    bare, whole = (last_json("run", str(p), "copy: a b", *options) for p in (artifact / "micro-Q4_K_M.gguf", artifact))
    assert bare["tokens"] == whole["tokens"] and bare["prompt_tokens"] == whole["prompt_tokens"]


def test_the_seed_decides(source: Path) -> None:
    def tokens(seed: str) -> object:
        return last_json("run", str(source), "hi", "--steps", "2", "--seed", seed)["tokens"]

    assert tokens("1") == tokens("1") != tokens("2")


def test_help_and_usage() -> None:
    for command in ("plan", "convert", "inspect", "run"):
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["plan", "tiny", "--to", "floppy"]).exit_code == 2
    assert CliRunner().invoke(main, ["run", "tiny", "x", "--max-new-tokens", "0"]).exit_code == 2


def test_a_command_under_nohup_outlives_its_terminal(source: Path) -> None:
    """SIGHUP, inherited as ignored, reaches `plan` in the middle of its work."""
    make = forecast.make_plan

    def work(inherited: signal.Handlers) -> None:
        signal.signal(signal.SIGHUP, inherited)
        forecast.make_plan = lambda *a, **k: (os.kill(os.getpid(), signal.SIGHUP), make(*a, **k))[1]
        main(["plan", str(source), "--to", "gguf", "--no-probe", "--json"])

    codes = [forked(partial(work, inherited)).returncode for inherited in (signal.SIG_DFL, signal.SIG_IGN)]
    assert codes == [128 + signal.SIGHUP, 0]


def test_the_canvas_takes_shape() -> None:
    """Accepted tokens bold, the rest dim; nothing after an end-of-sequence token; committed blocks stay in front."""
    tokenizer = Tokenizer.from_dir(TINY_A)
    ids = tokenizer.encode("the cat and the dog")[1:]
    canvas, eos = torch.tensor([[*ids, 357, 12, 12]]), [357]
    accepted = torch.zeros_like(canvas, dtype=torch.bool)
    accepted[0, :4] = True
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with CanvasView(tokenizer, eos, console) as view:
        step = Step(0, 3, 48, canvas, accepted, torch.tensor([0.25]))
        view.step(step)
        picture = view.picture(step)
        assert picture.plain.startswith("the cat and the dog\n\nblock 1  step 3/48  accepted 4/")
        assert "0.250 nats" in picture.plain
        styles = {str(span.style): picture.plain[span.start : span.end] for span in picture.spans}
        assert styles["bold"] + styles["dim cyan"] == "the cat and the dog" and styles["bold"]
        view.step(Step(1, 1, 48, canvas, accepted, torch.tensor([0.5])))
        assert view.picture(Step(1, 1, 48, canvas, accepted, torch.tensor([0.5]))).plain.count("the cat") == 2
    assert "the cat and the dog" in console.file.getvalue()  # type: ignore[attr-defined]
