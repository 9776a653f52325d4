"""`dgq verify --against SRC`: an honest artifact passes; files that agree with their own hashes and were made from
something else, or by another recipe, do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy
import pytest
from click.testing import CliRunner, Result
from kinds import write_kinds
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.convert.plans.recipe import Recipe, load_recipe
from dgq.convert.source.hashes import describe
from dgq.convert.write import provenance
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.files.artifact import open_artifact

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


REQUANTISED = [
    ("q4_k_m", "bnb4"),
    ("q4_k_m", "nvfp4"),
    ("nvfp4-w4a16", "q4_k_m"),
    ("nvfp4", "bnb4-dq"),
    ("bnb4", "nvfp4-w4a16"),
]


@pytest.mark.parametrize(("quant", "name"), REQUANTISED)
def test_a_quant_of_a_quant(quant: str, name: str, root: Path, tmp_path: Path) -> None:
    """Another artifact decoded and quantised again, as published files have been; dgq.json claims the source."""
    decoded = open_artifact(root / quant).weights
    other = shutil.copytree(root / "source", tmp_path / "other")
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors.keys() & set(decoded):
            tensors[key] = decoded[key].dequantize().to(tensors[key].dtype).reshape(tensors[key].shape).contiguous()
        save_file(tensors, file, {"format": "pt"})
    fake = tmp_path / name
    assert dgq("convert", other, *HOW[name], "-o", fake).exit_code == 0
    seal(fake, source=json.loads((root / name / provenance.FILE).read_text())["source"])
    result = against(fake, root / "source")
    assert result.exit_code == 1 and "exps" in result.stderr + result.stderr.replace("experts", "exps")
    assert "is not what source gives" in result.stderr


RECIPE = """
name = "mine"
format = "bnb4"
label = "mine"
description = "dense parts in BF16"
max_16bit_share = 0.9
[[rule]]
match = "*.experts.*"
scheme = "nf4"
[[rule]]
match = "*"
scheme = "bf16"
"""


def test_somebody_s_own_recipe(root: Path, tmp_path: Path) -> None:
    """Its rules lie in dgq.json; --recipe holds it to a file. Other rules, or dgq's name for them, are noticed."""
    file = tmp_path / "mine.toml"
    file.write_text(RECIPE)
    made = tmp_path / "made"
    assert dgq("convert", root / "source", "--to", "bnb4", "--recipe", file, "-o", made).exit_code == 0
    rules = json.loads((made / provenance.FILE).read_text())["recipe_rules"]
    assert Recipe.model_validate(rules) == load_recipe(file)
    assert against(made, root / "source").exit_code == 0
    assert against(made, root / "source", "--recipe", str(file)).exit_code == 0
    other = tmp_path / "other.toml"
    other.write_text(RECIPE.replace("*.experts.*", "*.experts.down_proj"))
    result = against(made, root / "source", "--recipe", str(other))
    assert result.exit_code == 1 and "recipe_rules are not those of" in result.stderr and "gate_up" in result.stderr
    seal(made, recipe="bnb4")
    result = against(made, root / "source")
    assert result.exit_code == 1 and "by the name bnb4" in result.stderr
    for wrong in (None, {}, rules | {"rule": 3}, rules):
        seal(made, recipe="other", recipe_rules=wrong)
        result = against(made, root / "source")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
    gone = made / "gone"
    seal(made, recipe="../bnb4", recipe_rules=rules)
    assert against(made, root / "source").exit_code == 2 and not gone.exists()


def test_an_imatrix(root: Path, tmp_path: Path) -> None:
    """The weighted bytes are proven with the very file that made them, and with no other."""
    plain = GGUFReader(next((root / "q4_k_m").glob("[!m]*.gguf")))
    rng = numpy.random.default_rng(5)
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.imatrix.gguf")
        writer = gguf.GGUFWriter(files[-1], "diffusion-gemma")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["made up"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 512)
        for name in (name for name in plain if "_exps.weight" in name):
            experts, _, columns = plain.shape(name)
            sums = rng.uniform(0.01, 9, (experts, columns)).astype("float32") ** 2
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", numpy.full((experts, 1), 512, "float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    made = tmp_path / "made"
    result = dgq("convert", root / "source", "--to", "gguf", "--imatrix", files[0], "-o", made)
    assert result.exit_code == 0, result.stderr
    assert against(made, root / "source", "--imatrix", str(files[0])).exit_code == 0
    for more, said in ((), "give it with --imatrix"), (("--imatrix", str(files[1])), "is not the file whose SHA-256"):
        result = against(made, root / "source", *more)
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    seal(made, imatrix=None)
    assert against(made, root / "source").exit_code == 1, "bytes weighed by a matrix are not the plain ones"
    seal(made, imatrix={"name": files[1].name, "datasets": ["made up"], **describe(files[1])})
    result = against(made, root / "source", "--imatrix", str(files[1]))
    assert result.exit_code == 1 and "exps.weight is not what" in result.stderr


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
