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
from hub_writable import metadata
from huggingface_hub import ModelCard, ModelCardData
from kinds import write_kinds
from markdown_it import MarkdownIt
from test_publish import report

from dgq.convert.publication.prepare import CardOptions, Ready, prepare

pytestmark = pytest.mark.xdist_group("card")
FORMATS = {"bnb4": "bnb4", "nvfp4": "nvfp4", "q4_k_m": "gguf",
           "nvfp4-stats": "nvfp4", "bnb4-max": "bnb4", "q4_k_m-max": "gguf"}  # fmt: skip
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
CONVERT = """
import sys; from pathlib import Path
from click.testing import CliRunner; from dgq.convert.cli.__main__ import main
from dgq.convert.write import refine
from dgq.convert.layerwise import steady; from dgq.quant.feedback import feedback
root, threads = Path(sys.argv[1]), sys.argv[2]
steady.PIECE, refine.FEW = 1 << 16, 1 << 14  # so that these small products are shared out, and experts
stats = root / "its.stats"
said = CliRunner().invoke(main, ["calibrate", str(root / "source"), "--prompts", str(root / "prompts.jsonl"),
                                 "-o", str(stats), "--device", "cpu"])
assert said.exit_code == 0, said.output
for name, to in {formats}.items():
    words = ["convert", str(root / "source"), "--to", to, "--recipe", name, "--threads", threads]
    words += ["-o", str(root / name)]
    if name == "nvfp4": words += ["--input-scale", "0.01"]
    recipe, _, how = name.partition("-")
    if how in ("stats", "max"):
        feedback.ROW_GROUPS = 16 if how == "stats" else 4  # what depended on threads shows; and quicker
        words[5] = recipe
        words += ["--stats", str(stats), "--device", "cpu", "--effort", "max" if how == "max" else "standard"]
    result = CliRunner().invoke(main, words); assert result.exit_code == 0, result.output
    words = ["publish", str(root / name), "--repo", "a/b", "--dry-run", "--force", "--json"]
    result = CliRunner().invoke(main, words); assert result.exit_code == 0, result.output
    (root / (name + ".card.json")).write_text(result.stdout)
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    roots = [tmp_path_factory.mktemp(name) for name in ("one", "another-directory")]
    running = []
    for root, threads in zip(roots, ("1", "3"), strict=True):
        write_kinds(root / "source", ("normal", "outliers", "heavy-tailed", "ties"))
        (root / "prompts.jsonl").write_text('{"text": "the dog runs over the red bridge and sees the king"}\n')
        command = [sys.executable, "-c", CONVERT.replace("{formats}", repr(FORMATS)), str(root), threads]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    return roots


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bytes_from_two_processes(twice: list[Path], name: str) -> None:
    one, other = ({file.name: file.read_bytes() for file in (root / name).iterdir()} for root in twice)
    assert one == other
    assert (twice[0] / "its.stats").read_bytes() == (twice[1] / "its.stats").read_bytes()
    said = json.loads(one["dgq.json"])
    effort = {"stats": "standard", "max": "max"}.get(name.partition("-")[2])
    how = (effort, "cpu") if effort else ("fast", None)
    assert (said["effort"], said["made_on"]) == how
    cards = [(root / f"{name}.card.json").read_text() for root in twice]
    assert cards[0] == cards[1] and "## Proof" in cards[0]


def numbers(text: str) -> set[str]:
    return set(re.findall(NUMBER, re.sub(r"(?<=\d),(?=\d{3})", "", text)))


@pytest.mark.usefixtures("no_pictures")
def test_every_number_is_in_its_json(twice: list[Path]) -> None:
    root = twice[0]
    for name in FORMATS:
        ready = prepare(root / name, "a/b", CardOptions([report(root, name)], "apache-2.0"), lambda n, file: None)
        text = ready.card.split("---\n", 2)[2]
        text = re.sub(r"SHA-256|BF16", "", text)
        said = json.loads(ready.contents["manifest.json"])["card"]
        assert numbers(text) <= numbers(json.dumps(said)), name
        document = json.loads((root / name / "dgq.json").read_text())
        sums = {part: sum(row[part] for row in said["parts"]) for part in ("params", "megabytes")}
        assert sums["params"] == document["params"] and abs(sums["megabytes"] / 1000 - said["gigabytes"]) < 0.002
        figures = {row["label"]: row["figure"] for row in said["validation"]["rows"]}
        assert figures["KL(BF16 ‖ this), nats a position"] == "0.0123" and figures["the same over BF16's"] == "1.020"
        check_page(ready)


def check_page(ready: Ready) -> None:
    """Its head is what the Hub's client reads back and accepts; a Markdown renderer finds every table, list and
    picture, the pictures are published, and nothing of the mark-up is left in the text."""
    card = ModelCard(ready.card)
    assert isinstance(card.data, ModelCardData)
    assert metadata(ready.card)[0] == 200, metadata(ready.card)
    again = ModelCardData(**card.data.to_dict())
    assert again.to_yaml() == card.data.to_yaml() == ready.card.split("---\n")[1].strip()
    assert {"dgq", "diffusion-gemma", "4-bit"} < set(card.data.tags) and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name in ("dgq", "gguf")
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(card.text)
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    opened = [token.type for token in tokens]
    assert opened.count("table_open") == sum(line.startswith(("|---", "| ---")) for line in lines) >= 5
    assert opened.count("tr_open") == len(lines) - opened.count("table_open"), "every line is a row"
    assert opened.count("list_item_open") == len(re.findall("^(?:> )?- ", card.text, re.M)) > 3
    inside = [child for token in tokens for child in token.children or ()]
    pictures = {str(child.attrs["src"]) for child in inside if child.type == "image"}
    assert pictures == {name for name in ready.files if name.endswith(".png")} and len(pictures) == 4
    text = "".join(child.content for child in inside if child.type == "text")
    assert not re.search(r"[`|]|\*\*|\{\{|%\}|\[\w", text), text
