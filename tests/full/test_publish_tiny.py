"""A real model's artifacts as they are published: every figure of the card against the report of `dgq validate`, and
`verify --against tiny`: the honest, one made from another quant, one of another recipe, one with a changed bit."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_against import seal
from test_card import check_page, numbers

from dgq.convert.cli.__main__ import main
from dgq.convert.publication.prepare import CardOptions, Ready, prepare
from dgq.runtime.files.artifact import open_artifact

pytestmark = pytest.mark.xdist_group("validate-page")
TINY = Path(str(files("dgq.recipes").joinpath("tiny")))


def dgq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("name", ["nvfp4", "gguf"])
def test_every_figure_of_a_real_card(tiny_report: Path, name: str) -> None:
    path, report = tiny_report.parent / name, tiny_report / "report.json"
    ready = prepare(path, "a/b", CardOptions([report], "apache-2.0"), lambda n, file: None)
    assert ready.problems == []
    check_page(ready)
    text = re.sub(r"SHA-256|BF16", "", ready.card.split("---\n", 2)[2])
    assert numbers(text) <= numbers(json.dumps(json.loads(ready.contents["manifest.json"])["card"]))
    check_rows(ready, json.loads(report.read_text()), name)
    said = dict(re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| `[0-9a-f]{64}` \|$", ready.card, re.M))
    sizes = {file.name: f"{file.stat().st_size:,}" for file in (*path.iterdir(), TINY / "model.safetensors")}
    assert said.items() <= sizes.items() and len(said) == len(ready.document["files"]) + (name == "gguf")
    gigabytes = float(re.findall(r"\| weights \| ([\d.]+) GB", ready.card)[0])
    assert abs(gigabytes - held(path) / 1e9) <= 0.0005


def held(path: Path) -> int:
    """Bytes of the weights, by the formats' own libraries."""
    total = 0
    for file in path.glob("*.gguf"):
        total += sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors if t.name != "rope_freqs.weight")
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(key).nbytes for key in tensors.offset_keys())
    return total


def check_rows(ready: Ready, report: dict[str, Any], name: str) -> None:
    """Each figure, its bounds and BF16's are the report's, rounded to the digits shown."""
    one = next(artifact for artifact in report["artifacts"] if artifact["name"] == name)
    mean, free, base = one["fixed"]["mean"], one["free"], report["reference"]["free"]
    levels = {level: row["both"]["kl"] for level, row in one["fixed"]["by_level"].items()}
    wanted = {
        "KL(BF16 ‖ this), nats a position": (mean["kl"], None, 1),
        **{f"the same at noise {level}": (kl, None, 1) for level, kl in levels.items()},
        "best token as BF16's": (mean["top1"], None, 100), "among BF16's five best": (mean["top5"], None, 100),
        "exact answers": (free["score"], base["score"], 100),
        "denoising steps a canvas": (free["steps"], base["steps"], 1),
        "the same over BF16's": (free["steps_ratio"], None, 1),
        "canvases that stop early": (free["early"], base["early"], 100),
    }  # fmt: skip
    table = ready.card.split("## Validation against BF16")[1].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {label: cells for label, *cells in rows}.keys() == wanted.keys()
    for label, figure, bounds, reference in rows:
        values, theirs, scale = wanted[label]
        shown = [figure, *(bounds.split(" to ") if bounds else [])]
        assert len(shown) == (3 if values[1] != values[2] else 1), label
        pairs = [*zip(shown, values, strict=False), *([(reference, theirs[0])] if theirs else [])]
        for said, value in pairs:
            digits = said.removesuffix(" %")
            last = float(re.sub(r"\d(?=[^e]*\d(e|$))", "0", re.sub(r"\d(?=(e|$))", "1", digits, count=1)))
            assert abs(float(digits) - scale * value) <= 0.51 * abs(last), (label, said, value)
        assert bool(reference) == bool(theirs), label


def against(path: Path, *more: object) -> Result:
    return dgq("verify", path, "--against", "tiny", "--seed", 1, *more)


def test_against_tiny(tiny_report: Path, tmp_path: Path) -> None:
    """Eight weights of some hundred, as by default."""
    changed = "is not what tiny gives"
    for name in ("nvfp4", "gguf"):
        honest = against(tiny_report.parent / name, "--json")
        assert honest.exit_code == 0, honest.output
        copy = shutil.copytree(tiny_report.parent / name, tmp_path / f"{name}-bit")
        flip(copy, json.loads(honest.stdout)["compared"][0])
        seal(copy)
        result = against(copy)
        assert result.exit_code == 1 and result.stderr.count(changed) == 1, result.output
    decoded = open_artifact(tiny_report.parent / "nvfp4").weights  # its experts only; the rest is BF16
    tensors = load_file(TINY / "model.safetensors")
    for key in tensors.keys() & set(decoded):
        tensors[key] = decoded[key].dequantize().to(tensors[key].dtype).reshape(tensors[key].shape).contiguous()
    other = shutil.copytree(TINY, tmp_path / "other")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    bnb4 = ("--to", "bnb4", "--effort", "stock")
    assert dgq("convert", other, *bnb4, "-o", tmp_path / "quant-of-quant").exit_code == 0
    source = json.loads((tiny_report.parent / "gguf" / "dgq.json").read_text())["source"]
    seal(tmp_path / "quant-of-quant", source=source)
    for seed in range(3):
        assert changed in against(tmp_path / "quant-of-quant", "--seed", seed).stderr
    assert dgq("convert", "tiny", *bnb4, "--recipe", "bnb4-dq", "-o", tmp_path / "recipe").exit_code == 0
    assert against(tmp_path / "recipe").exit_code == 0
    seal(tmp_path / "recipe", recipe="bnb4")
    result = against(tmp_path / "recipe")
    assert result.exit_code == 1 and "by the name bnb4" in result.stderr


def flip(path: Path, name: str) -> None:
    """One bit in the middle of a tensor."""
    file = max(path.iterdir(), key=lambda file: file.stat().st_size)
    if file.suffix == ".gguf":
        found = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
        place = int(found.data_offset + found.n_bytes // 2)
    else:
        raw = file.read_bytes()
        length = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:length])
        stem = name.removesuffix(".weight")
        start, end = next(said["data_offsets"] for key, said in entries.items() if key.startswith(stem))
        place = length + (start + end) // 2
    with file.open("r+b") as out:
        out.seek(place)
        byte = out.read(1)[0]
        out.seek(place)
        out.write(bytes([byte ^ 1]))
