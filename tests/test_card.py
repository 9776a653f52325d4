"""The model card: drawn by a Markdown renderer, every number of it in the JSON it came from, and the same bytes, of
artifact and card, from two processes with other threads and in other directories."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from kinds import write_kinds
from markdown_it import MarkdownIt
from test_publish import report

FORMATS = {"bnb4": "bnb4", "bnb4-dq": "bnb4", "nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "q4_k_m": "gguf"}
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
CONVERT = """
import sys; from pathlib import Path; from click.testing import CliRunner; from dgq.convert.cli import main
root, threads = Path(sys.argv[1]), sys.argv[2]
for name, to in {formats}.items():
    words = ["convert", str(root / "source"), "--to", to, "--recipe", name, "--threads", threads]
    words += ["-o", str(root / name)]
    if name == "nvfp4": words += ["--input-scale", "0.01"]
    result = CliRunner().invoke(main, words); assert result.exit_code == 0, result.output
    words = ["publish", str(root / name), "--repo", "a/b", "--dry-run", "--force", "--json"]
    result = CliRunner().invoke(main, words); assert result.exit_code == 0, result.output
    (root / (name + ".card.json")).write_text(result.stdout)
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    roots = [tmp_path_factory.mktemp(name) for name in ("one", "another-directory")]
    for root, threads in zip(roots, ("1", "3"), strict=True):
        write_kinds(root / "source", ("normal", "outliers", "heavy-tailed", "ties"))
        code = CONVERT.replace("{formats}", repr(FORMATS))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", code, str(root), threads], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return roots


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bytes_from_two_processes(twice: list[Path], name: str) -> None:
    one, other = ({file.name: file.read_bytes() for file in (root / name).iterdir()} for root in twice)
    assert one == other and "dgq.json" in one
    cards = [(root / f"{name}.card.json").read_text() for root in twice]
    assert cards[0] == cards[1] and "## Proof" in cards[0]


def numbers(text: str) -> set[str]:
    return set(re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d{3})", "", text)))


def test_every_number_is_in_its_json(twice: list[Path]) -> None:
    from dgq.convert.publish import Asked, prepare

    root = twice[0]
    for name in FORMATS:
        ready = prepare(root / name, "a/b", Asked([report(root, name)], "apache-2.0"), lambda n, file: None)
        head, text = ready.card.split("---\n", 2)[1:]
        text = re.sub(r"SHA-256|BF16", "", text)
        said = json.loads(ready.contents["manifest.json"])["card"]
        assert numbers(text) <= numbers(json.dumps(said)), name
        document = json.loads((root / name / "dgq.json").read_text())
        sums = {part: sum(row[part] for row in said["parts"]) for part in ("params", "megabytes")}
        assert sums["params"] == document["params"] and abs(sums["megabytes"] / 1000 - said["gigabytes"]) < 0.002
        figures = {row["label"]: row["figure"] for row in said["validation"]["rows"]}
        assert figures["KL(BF16 ‖ this), nats a position"] == "0.0123" and figures["the same over BF16's"] == "1.020"
        card = ModelCard(ready.card)
        assert card.data.license == "apache-2.0" and "dgq" in card.data.tags and head
        page = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.text)
        assert page.count("<table>") == text.count("\n|---") + text.count("\n| ---") and "{{" not in page
        assert page.count("<img") == 4 and "<li>" in page and "|---" not in page
