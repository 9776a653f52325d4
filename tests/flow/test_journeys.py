"""One journey a format, through the commands as a user types them, from the model to the report of what it lost.

convert ──> inspect ──> verify ──> run ──> validate --quick
calibrate ──> inspect ──> convert --stats ──> verify ──> run
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kinds import write_kinds

from dgq.convert.cli.__main__ import main

TINY = ("--against", "tiny")


def dgq(*words: object) -> str:
    """What the command printed. It must succeed."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def last_object(printed: str) -> Any:
    """--json: one object, on the last line."""
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="session")
def reference(shared: Any) -> Path:
    """What `tiny` itself answers to a text and two tasks."""

    def ask(folder: Path) -> None:
        folder.mkdir()
        prompts = files("dgq.recipes").joinpath("prompts")
        texts, tasks = (prompts.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8") for kind in ("text", "tasks"))
        (folder / "prompts.jsonl").write_text("\n".join([texts.splitlines()[1], *tasks.splitlines()[:2]]))
        dgq("validate", *TINY, "--quick", "--prompts", folder / "prompts.jsonl", "--reference", folder / "reference")

    path: Path = shared.made("tiny-reference", ask)
    return path / "reference"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("recipe", "share"), [("nvfp4-w4a16", 0.6), ("bnb4", 0.9), ("q4_k_m", 0.98)])
def test_from_the_model_to_the_report(
    recipe: str, share: float, converted: Callable[[str], Path], reference: Path, tmp_path: Path
) -> None:
    artifact = converted(recipe)
    said = last_object(dgq("inspect", artifact, "--json"))
    assert said["provenance"]["recipe"] == recipe and said["provenance"]["effort"] == "fast"
    assert dgq("verify", artifact, *TINY, "--sample", 4)
    assert dgq("run", artifact, "--device", "cpu", "--chat", "Sort: wind apple king door") == "apple door king wind\n"
    report = last_object(
        dgq("validate", artifact, *TINY, "--quick", "--reference", reference, "-o", tmp_path / "report", "--json")
    )
    (one,) = report["artifacts"]
    assert report["ok"] and one["quantized_share"] > share and 0 < one["fixed"]["mean"]["kl"][0] < 0.05
    assert {"report.html", "report.json", "fixed.csv"} <= {file.name for file in (tmp_path / "report").iterdir()}


def test_calibrated(tmp_path: Path, few_steps: None) -> None:
    """On a model of two layers: what is calibrated here is the journey."""
    source = write_kinds(tmp_path / "source", ("normal", "outliers", "heavy-tailed", "ties"))
    (tmp_path / "prompts.txt").write_text("the dog runs over the red bridge and sees the king\n")
    stats, artifact = tmp_path / "model.stats", tmp_path / "artifact"
    dgq("calibrate", source, "--prompts", tmp_path / "prompts.txt", "--rounds", 1, "--device", "cpu", "-o", stats)
    assert dgq("inspect", stats)
    dgq("convert", source, "--to", "gguf", "--stats", stats, "--device", "cpu", "-o", artifact)
    document = json.loads((artifact / "dgq.json").read_text())
    assert document["effort"] == "standard" and document["calibration"]
    dgq("verify", artifact)
    assert dgq("run", artifact, "--device", "cpu", "--steps", 1, "the dog")
