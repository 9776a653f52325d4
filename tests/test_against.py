"""`dgq verify --against SRC`: an honest artifact passes; files that agree with their own hashes and were made from
something else, or by another recipe, do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from kinds import write_kinds
from safetensors.torch import load_file, save_file

from dgq.convert import provenance
from dgq.convert.cli import main
from dgq.convert.hashes import describe

HOW = {
    "nvfp4": ("--to", "nvfp4", "--input-scale", "0.01", "--effort", "fast"),
    "nvfp4-w4a16": ("--to", "nvfp4", "--recipe", "nvfp4-w4a16", "--effort", "stock"),
    "nvfp4-all": ("--to", "nvfp4", "--recipe", "nvfp4-all", "--effort", "fast"),
    "bnb4": ("--to", "bnb4", "--effort", "fast"),
    "bnb4-dq": ("--to", "bnb4", "--recipe", "bnb4-dq", "--effort", "stock"),
    "q4_k_m": ("--to", "gguf", "--effort", "stock"),
}


def dgq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, and an artifact of each recipe."""
    root = tmp_path_factory.mktemp("against")
    source = write_kinds(root / "source", ("normal", "outliers", "heavy-tailed", "ties"))
    for name, how in HOW.items():
        assert dgq("convert", source, *how, "-o", root / name).exit_code == 0
    return root


def seal(path: Path, **said: object) -> None:
    """Hash the files again and sign dgq.json, so that `dgq verify` is content."""
    content = json.loads((path / provenance.FILE).read_text()) | said
    del content["sha256"]
    content["files"] = {name: describe(path / name) for name in content["files"]}
    (path / provenance.FILE).write_text(provenance.text(provenance.sealed(content)))
    assert dgq("verify", path).exit_code == 0


def against(path: Path, source: Path, *more: str) -> Result:
    return dgq("verify", path, "--against", source, "--sample", "1000", *more)


@pytest.mark.parametrize("name", HOW)
def test_honest(name: str, root: Path) -> None:
    result = against(root / name, root / "source", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    said = json.loads((root / name / provenance.FILE).read_text())["tensors"]
    assert found["compared"] == list(said) and found["left_out"] == (["input_scale"] if name == "nvfp4" else [])
    few = json.loads(dgq("verify", root / name, "--against", root / "source", "--sample", 1, "--json").stdout)
    assert {said[tensor] for tensor in few["compared"]} == set(said.values())


@pytest.mark.parametrize("name", HOW)
def test_made_from_other_weights(name: str, root: Path, tmp_path: Path) -> None:
    """Routed experts that went through four bits before, as in a quant of a quant; dgq.json claims the source."""
    other = shutil.copytree(root / "source", tmp_path / "other")
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for key, value in tensors.items():
            if ".experts." in key:
                step = value.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
                tensors[key] = ((value.float() / step).round() * step).to(torch.bfloat16)
        save_file(tensors, file, {"format": "pt"})
    fake = tmp_path / name
    assert dgq("convert", other, *HOW[name], "-o", fake).exit_code == 0
    seal(fake, source=json.loads((root / name / provenance.FILE).read_text())["source"])
    result = against(fake, root / "source")
    assert result.exit_code == 1 and "exps" in result.stderr + result.stderr.replace("experts", "exps")


def test_another_recipe_or_effort(root: Path, tmp_path: Path) -> None:
    fake = shutil.copytree(root / "bnb4-dq", tmp_path / "fake")
    seal(fake, recipe="bnb4")
    assert against(fake, root / "source").exit_code == 1
    fast = shutil.copytree(root / "bnb4", tmp_path / "fast")
    seal(fast, effort="stock")
    assert against(fast, root / "source").exit_code == 1


def test_a_changed_tensor(root: Path, tmp_path: Path) -> None:
    fake = shutil.copytree(root / "nvfp4-w4a16", tmp_path / "fake")
    key = "model.decoder.layers.1.experts.2.down_proj.weight"
    file = next(file for file in fake.glob("*.safetensors") if key in load_file(file))
    tensors = load_file(file)
    tensors[key][0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    seal(fake)
    result = against(fake, root / "source")
    assert result.exit_code == 1 and f"{key} is not what" in result.stderr


def test_what_stats_made_is_not_proven(root: Path, tmp_path: Path) -> None:
    fake = shutil.copytree(root / "bnb4", tmp_path / "fake")
    seal(fake, effort="standard", calibration={})
    result = against(fake, root / "source")
    assert result.exit_code == 2 and "made with STATS" in result.stderr and result.stderr.count("\n") == 1


def test_another_source(root: Path, tmp_path: Path) -> None:
    """Files that are not those whose hashes the artifact names, though they give the same weights."""
    other = shutil.copytree(root / "source", tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt", "by": "someone"})
    result = against(root / "bnb4", other)
    assert result.exit_code == 1 and f"{file.name}: is not the file that dgq.json says" in result.stderr
