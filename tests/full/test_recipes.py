"""nvfp4-all, q8_0 and q6_k: their bytes against modelopt's, gguf-py's and another ggml's; what says that only dgq opens
nvfp4-all, and what is refused of its layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from kinds import KINDS, write_kinds
from oracle_modelopt import Oracle
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.convert.write import slices
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import EMBEDDING, hf_name

TESTS = Path(__file__).parent.parent
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # which modelopt gives one weight_scale_2
pytestmark = pytest.mark.xdist_group("modelopt")


def dgq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def convert(source: Path, out: Path, to: str, recipe: object) -> Path:
    result = dgq("convert", source, "--to", to, "--recipe", recipe, "--effort", "stock", "-o", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of block in the experts; in matrices that modelopt gives one scale, the same largest weight."""
    path = write_kinds(tmp_path_factory.mktemp("recipes") / "source", [kind for kind in KINDS if kind != "zero"])
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if name.startswith("model.decoder.") and name.endswith(tuple(f"{p}.weight" for g in GROUPS for p in g)):
                weight[1, 2] = 0.5
        save_file(tensors, file)
    return path


@pytest.fixture(scope="module")
def everything(source: Path) -> Path:
    return convert(source, source.parent / "nvfp4-all", "nvfp4", "nvfp4-all")


@pytest.fixture(scope="module")
def modelopts(source: Path, modelopt: Oracle) -> Path:
    theirs = source.parent / "theirs"
    modelopt("export", source, theirs, "nvfp4-all")
    return theirs


def test_linears_are_modelopts(everything: Path, modelopts: Path) -> None:
    """Names, shapes and every byte, -0 aside, of experts, attention, MLP and self-conditioning."""
    theirs, ours = load_file(modelopts / "model.safetensors"), load_file(everything / "model.safetensors")
    assert theirs.keys() == ours.keys()
    quantised = {name for name, tensor in theirs.items() if tensor.dtype == torch.uint8}
    matrices = {name for name in quantised if ".experts." not in name}
    assert len(matrices) == 2 * 7 + 3 - 1, "two layers, one without v; self-conditioning"
    for name, expected in theirs.items():
        found = ours[name]
        if name == EMBEDDING:
            continue
        if name in quantised:
            low, high = expected & 15, expected >> 4
            expected = torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4
        assert found.dtype == expected.dtype and found.shape == expected.shape, name
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), name


def test_modelopts_own_linears_open(source: Path, everything: Path, modelopts: Path) -> None:
    """Its directory with attention and MLPs quantised, as others publish them."""
    theirs, ours = open_artifact(modelopts).weights, open_artifact(everything).weights
    for name in theirs:
        if name != EMBEDDING:
            assert torch.equal(theirs[name].dequantize(), ours[name].dequantize()), name
    assert theirs["model.decoder.layers.1.mlp.up_proj.weight"].scheme.name == "nvfp4"
    assert not theirs.only_dgq and ours.only_dgq


def test_the_embedding_is_gguf_pys(source: Path, everything: Path) -> None:
    weight = open_artifact(source).weights[EMBEDDING].dequantize().numpy()
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    stored = load_file(everything / "model.safetensors")[EMBEDDING]
    assert np.array_equal(stored.numpy(), expected)
    decoded = open_artifact(everything).weights[EMBEDDING].dequantize().numpy()
    assert np.array_equal(decoded, gguf.quants.dequantize(expected, gguf.GGMLQuantizationType.Q8_0))


def test_matrices_are_not_cut(source: Path, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a matrix share a scale: with slices far smaller than a matrix the bytes are the same."""
    monkeypatch.setitem(slices.SLICE, "cpu", 1 << 10)
    out = convert(source, tmp_path / "out", "nvfp4", "nvfp4-all")
    assert (out / "model.safetensors").read_bytes() == (everything / "model.safetensors").read_bytes()


def test_it_says_that_only_dgq_opens_it(source: Path, everything: Path) -> None:
    config = json.loads((everything / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "dgq" and config["q8_0"] == [EMBEDDING]
    assert config["opens_in"].startswith("dgq only: vLLM")
    assert not (everything / "hf_quant_config.json").exists()
    assert any("opens in dgq only" in line for line in json.loads((everything / "dgq.json").read_text())["notices"])
    options = ("--to", "nvfp4", "--recipe", "nvfp4-all", "--no-probe")
    assert "NVFP4-all-dgq opens in dgq only" in dgq("plan", source, *options).stderr
    said = dgq("inspect", everything).stdout
    assert "opens in dgq only: vLLM" in said and "dgq.runtime.hf" not in said
    assert json.loads(dgq("inspect", everything, "--json").stdout)["opens_in"] == config["opens_in"]


def test_transformers_refuses_it(everything: Path) -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    with pytest.raises((RuntimeError, ValueError)):
        DiffusionGemmaForBlockDiffusion.from_pretrained(everything)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version", 2, "dgq's layout in version 2; this dgq reads 1"),
        ("q8_0", None, "has no q8_0, a list of weights' names"),
        ("q8_0", [], "tensor model.decoder.embed_tokens.weight has shape"),
        ("q8_0", [EMBEDDING, "model.decoder.layers.0.mlp.up_proj.weight"], "layers.0.mlp.up_proj.weight"),
        ("quant_method", "modelopt", "modelopt's quant_algo 'None' is not opened"),
    ],
)
def test_configs_that_say_something_else(everything: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = shutil.copytree(everything, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))
    result = dgq("inspect", path)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_a_damaged_table_is_named(everything: Path, tmp_path: Path) -> None:
    path = shutil.copytree(everything, tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    tensors[EMBEDDING].view(torch.float16)[7, 17] = torch.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"embed_tokens\.weight holds a scale that is no number in row 7; damaged"):
        open_artifact(path).weights[EMBEDDING]


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_ggufs_are_llama_quantizes(kind: str, tmp_path: Path) -> None:
    """Types by its rules, file type by gguf-py's table, bytes by another build of ggml. Rows are of 96 to 512."""
    source = TESTS / "golden" / "tinyA"
    out = convert(source, tmp_path / "out", "gguf", kind.lower())
    reader = gguf.GGUFReader(next(out.glob(f"*-{kind}.gguf")))
    said = reader.fields["general.file_type"].contents()
    assert said == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    weights, seen = open_artifact(source).weights, set()
    for tensor in reader.tensors:
        seen.add(tensor.tensor_type.name)
        if len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name:
            assert tensor.tensor_type.name == "F32", tensor.name
            continue
        columns = int(tensor.shape[0])
        expected = "Q8_0" if columns % 256 else kind
        assert tensor.tensor_type.name == expected, tensor.name
        rows = weights[str(hf_name(tensor.name))].dequantize().reshape(-1, columns).numpy()
        made = np.asarray(libgguf.quantize_rows(rows, gguf.GGMLQuantizationType[expected])).view(np.uint8)
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8).flatten(), made.flatten()), tensor.name
    assert seen == {"F32", "Q8_0", kind}


def test_the_example_of_the_guide_works(source: Path, tmp_path: Path) -> None:
    """End to end, on a model of two layers: planned, converted, verified against its source, run."""
    text = (TESTS.parent / "recipes" / "examples" / "attention-8bit.toml").read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace("layers.29.", "layers.1."))
    kept = write_kinds(tmp_path / "source", ["normal", "outliers", "heavy-tailed", "ties"])
    out = convert(kept, tmp_path / "out", "nvfp4", mine)
    found = {name: stored.scheme for name, stored in open_artifact(out).weights.everything().items()}
    assert found["model.decoder.layers.0.experts.down_proj"] == "nvfp4"
    assert found["model.decoder.layers.1.experts.down_proj"] == found[EMBEDDING] == "q8_0"
    assert found["model.decoder.layers.0.self_attn.o_proj.weight"] == "q8_0"
    assert found["model.decoder.layers.0.mlp.up_proj.weight"] == "bf16"
    result = dgq("verify", out, "--against", kept, "--recipe", mine, "--sample", 1000)
    assert result.exit_code == 0, result.output
    assert dgq("run", out, "hi", "--max-new-tokens", 1, "--steps", 1, "--device", "cpu").exit_code == 0
