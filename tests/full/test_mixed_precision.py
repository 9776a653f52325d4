"""FP8 beside NVFP4, and alone, as modelopt and compressed-tensors export `tiny`: weights against the libraries' own
decoding, logits against the decoded weights. The remark on memory, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import FP8, FP8_DYNAMIC, NVFP4
from oracle_compressed_tensors import TINY, export
from oracle_modelopt import Oracle
from safetensors.torch import load_file, save_file
from test_compressed_tensors import check, modules

from dgq.convert.cli.__main__ import main
from dgq.convert.validation.losses import weight_errors
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.loading import for_kernels
from dgq.runtime.shape.names import DECODER

pytestmark = pytest.mark.xdist_group("modelopt")
LAYER = DECODER + "layers.0."


@pytest.fixture(scope="module", params=("mixed", "fp8"))
def theirs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, modelopt: Oracle
) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("modelopt") / request.param
    modelopt("export", TINY, path, request.param)
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, path / file.name)
    return request.param, path


def test_modelopt(theirs: tuple[str, Path]) -> None:
    recipe, path = theirs
    schemes = check(path, load_file(path / "decoded"))
    assert schemes[LAYER + "experts.down_proj"] == ("nvfp4" if recipe == "mixed" else "fp8")
    assert open_artifact(path).kind == ("nvfp4" if recipe == "mixed" else "fp8")
    assert {schemes[LAYER + f"{part}.weight"] for part in ("self_attn.q_proj", "mlp.down_proj")} == {"fp8"}
    assert ("input_scale" in open_artifact(path).weights[LAYER + "experts.down_proj"].parts) == (recipe == "mixed")


def test_modelopt_on_the_command_line(theirs: tuple[str, Path]) -> None:
    _, path = theirs
    weights = open_artifact(path).weights
    eights = [one for one in weights.everything().values() if one.scheme == "fp8"]
    numel = sum(one.numel for one in eights) / 2**20
    said = f"{len(eights)} weights are FP8, which dgq has no kernels for"
    memory = f"{2 * numel:,.1f} MiB of memory instead of {numel:,.1f}"
    for arguments in (["inspect", str(path), "--json"], ["run", str(path), "Sort: b a", "--steps", "1"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        told = " ".join(done.output.split())
        assert said in told and memory in told
    found = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout.splitlines()[-1])
    assert found["by_scheme"]["fp8"]["params"] == round(numel * 2**20)


def test_what_validate_says_of_each_weight(theirs: tuple[str, Path]) -> None:
    """Its relative error, against the library's own decoding."""
    _, path = theirs
    names = [LAYER + "self_attn.q_proj.weight", LAYER + "mlp.down_proj.weight", LAYER + "experts.down_proj"]
    source, decoded = open_artifact(TINY).weights, load_file(path / "decoded")
    found = weight_errors(source, open_artifact(path).weights, names, "cpu")
    for name in names:
        plain = source[name].dequantize()
        own = torch.cat([decoded[f"{base}.weight"] for base, _ in modules(name, plain)]).view(plain.shape).float()
        assert float(found[name][0]) == pytest.approx(float((own - plain).norm() / plain.norm()), rel=1e-3)


def test_for_the_kernels_it_is_bfloat16(theirs: tuple[str, Path]) -> None:
    _, path = theirs
    weights = open_artifact(path).weights
    names = [name for name in weights if name.startswith(LAYER + "self_attn.")]
    loaded = for_kernels(names, ((name, weights[name]) for name in names), "test", decode=False)
    q = loaded.linear(LAYER + "self_attn.qkv").parts[0]
    assert isinstance(q, torch.Tensor) and q.dtype == torch.bfloat16
    own = weights[LAYER + "self_attn.q_proj.weight"].dequantize(torch.bfloat16)
    assert torch.equal(q[: len(own)], own)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quant_algo": "W8A16"}, r"quant_algo 'W8A16' of .*q_proj is not opened"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size 32, NVFP4 has 16"),
    ],
)
def test_other_algorithms_of_modelopt_are_refused(
    theirs: tuple[str, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = shutil.copytree(theirs[1], tmp_path / "changed")
    (path / "hf_quant_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["quantized_layers"][LAYER + "self_attn.q_proj"] = change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        open_artifact(path)


def test_a_config_that_says_another(theirs: tuple[str, Path], tmp_path: Path) -> None:
    """FP8 where NVFP4 lies and the other way round, of one module and of all."""
    recipe, path = theirs[0], shutil.copytree(theirs[1], tmp_path / "changed")
    (path / "hf_quant_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    said = config["quantization_config"]
    layers, own, experts = said["quantized_layers"], said.copy(), LAYER + "experts"
    is_, other = ("NVFP4", "FP8") if recipe == "mixed" else ("FP8", "NVFP4")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"quantized_layers": layers | {experts: {"quant_algo": other}}}, rf"experts\.0\.\w+\.weight is {is_}"),
        ({"quantized_layers": layers | {LAYER + "mlp.up_proj": {"quant_algo": "NVFP4"}}}, r"up_proj\.weight is FP8"),
    ]
    if recipe == "mixed":
        changes.append(({"quantized_layers": {"q": {"quant_algo": "FP8"}}}, "is NVFP4, and said to be FP8; one"))
        changes.append(({"quant_algo": "FP8", "quantized_layers": None}, "is NVFP4, and said to be FP8; one"))
    for change, words in changes:
        config["quantization_config"] = own | change
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=words):
            open_artifact(path)


def test_damage_is_named(theirs: tuple[str, Path], tmp_path: Path) -> None:
    path, name = shutil.copytree(theirs[1], tmp_path / "damaged"), LAYER + "self_attn.q_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(torch.uint8)[2, 5] = 0xFF
    tensors[LAYER + "self_attn.k_proj.weight_scale"] *= -1
    del tensors[LAYER + "self_attn.o_proj.weight_scale"]
    gone = tensors | {LAYER + "self_attn.o_proj.weight_scale": torch.ones(())}
    save_file(gone, path / "model.safetensors")
    weights = open_artifact(path).weights
    with pytest.raises(InputError, match=r"q_proj\.weight is not a number at \[2, 5\]; damaged"):
        weights[name]
    with pytest.raises(InputError, match=r"k_proj\.weight_scale holds -.*, no scale; damaged"):
        weights[LAYER + "self_attn.k_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"o_proj\.weight_scale is missing"):
        open_artifact(path)


def test_transformers_are_told(theirs: tuple[str, Path]) -> None:
    """inspect's words are what happens: scales are left out and experts made up, with a warning; or an error."""
    name, code = LAYER + "self_attn.q_proj", "import sys, torch, transformers as t; torch.set_num_threads(1);"
    code += "m = t.DiffusionGemmaForBlockDiffusion.from_pretrained(sys.argv[1], dtype=torch.float32);"
    code += f"print('MEAN', float(m.get_submodule({name!r}).weight.abs().mean()))"
    done = subprocess.run([sys.executable, "-c", code, str(theirs[1])], capture_output=True, text=True, timeout=120)
    mean = float(done.stdout.partition("MEAN ")[2])
    assert mean > 100 * float(open_artifact(theirs[1]).weights[name + ".weight"].dequantize().abs().mean())
    assert "newly initialized" in done.stderr
    page = CliRunner().invoke(main, ["inspect", str(theirs[1])]).stdout
    assert "transformers gives it WRONG weights and only warns; after `import dgq.runtime.hf` it raises" in page
    import dgq.runtime.hf  # noqa: F401, I001
    from transformers import DiffusionGemmaForBlockDiffusion

    with pytest.raises(InputError, match="FP8 or mixed precision"):
        DiffusionGemmaForBlockDiffusion.from_pretrained(theirs[1], dtype=torch.bfloat16)


@pytest.mark.parametrize("mixed", (True, False))
def test_compressed_tensors(tmp_path: Path, mixed: bool) -> None:
    """Experts NVFP4, attention FP8 with one scale a matrix, the dense MLP with one a row; or all the latter."""
    path = tmp_path / "tiny"
    four = QuantizationScheme(**NVFP4, targets=["re:.*experts.*"])
    eights = QuantizationScheme(**FP8, targets=["re:.*self_attn.*"])
    rows = QuantizationScheme(**FP8_DYNAMIC, targets=["re:.*\\.mlp\\..*" if mixed else "Linear"])
    decoded = export(path, [four, eights, rows] if mixed else [rows])
    schemes = check(path, decoded)
    assert schemes[LAYER + "experts.gate_up_proj"] == ("nvfp4" if mixed else "fp8")
    assert schemes[LAYER + "self_attn.q_proj.weight"] == schemes[LAYER + "mlp.up_proj.weight"] == "fp8"
    config = json.loads((path / "config.json").read_text())
    said = config["quantization_config"]
    assert said["format"] == ("mixed-precision" if mixed else "float-quantized")
    (group,) = (name for name, one in said["config_groups"].items() if one["weights"]["strategy"] == "channel")
    if mixed:
        only = {"config_groups": {group: said["config_groups"][group]}}
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": said | only}))
        with pytest.raises(InputError, match=r"weight_packed is NVFP4, and said to be FP8"):
            open_artifact(path)
    for key, value in (("strategy", "block"), ("num_bits", 4), ("type", "int"), ("symmetric", False)):
        other = json.loads(json.dumps(said))
        other["config_groups"][group]["weights"][key] = value
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": other}))
        with pytest.raises(InputError, match=f"group '{group}' with {key} '{value}'"):
            open_artifact(path)
