"""NVFP4 against nvidia-modelopt: the numbers, every byte of an exported checkpoint, and both config files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract_vllm
import pytest
import torch
from click.testing import CliRunner
from kinds import KINDS, block, write_kinds
from micro import two_steps
from oracle_modelopt import Oracle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.quant.formats.modelopt import Modelopt
from dgq.quant.schemes import nvfp4
from dgq.quant.schemes.dense import F32
from dgq.quant.schemes.nvfp4 import NVFP4, round_activations
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import open_artifact

TESTS = Path(__file__).parent.parent
TINY = TESTS.parent / "recipes" / "tiny"
NOT_ZERO = tuple(
    kind for kind in KINDS if kind != "zero"
)  # modelopt gives those NaN scales, and refuses to export them
pytestmark = pytest.mark.xdist_group("modelopt")


@dataclass
class Pair:
    """One checkpoint exported by modelopt and converted by us."""

    recipe: str
    source: Path
    theirs: Path
    ours: Path

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        return load_file(getattr(self, which) / "model.safetensors")

    def json(self, which: str, file: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((getattr(self, which) / file).read_text())
        for holder in (data, data.get("quantization_config", {})):
            holder.pop("producer", None)
        return data


def activations() -> dict[str, torch.Tensor]:
    """Rows whose largest values are below, at and beyond what the scale covers, ties and zeros among them."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(64, 96, generator=generator) * torch.logspace(-6, 2, 64).unsqueeze(1)
    x[3] = 0
    x[5, :16] = 0
    x[7] = torch.arange(96) * 0.25 - 6
    return {"x": x, "input_scale": torch.tensor(4.84 / 2688)}


@pytest.fixture(scope="module", params=["nvfp4", "nvfp4-w4a16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, modelopt: Oracle) -> Pair:
    """W4A4 of tiny, saved by today's transformers (its config style, so that the files can be compared whole); W4A16
    of every kind of block (a model that modelopt could not calibrate: its activations overflow)."""
    from transformers import DiffusionGemmaForBlockDiffusion

    recipe, folder = request.param, tmp_path_factory.mktemp("nvfp4")
    source = folder / "source"
    if recipe == "nvfp4":
        DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (source / name).write_bytes((TINY / name).read_bytes())
    else:
        write_kinds(source, NOT_ZERO)
    modelopt("export", source, folder / "theirs", recipe)
    arguments = [
        "convert",
        str(source),
        "--to",
        "nvfp4",
        "--recipe",
        recipe,
        "--effort",
        "stock",
        "-o",
        str(folder / "ours"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return Pair(recipe, source, folder / "theirs", folder / "ours")


def without_minus_zero(packed: torch.Tensor) -> torch.Tensor:
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


def test_both_hold_vllm_s_contract(pair: Pair) -> None:
    assert contract_vllm.weight_problems(pair.theirs) == [] == contract_vllm.weight_problems(pair.ours)


def test_names_dtypes_and_shapes(pair: Pair) -> None:
    described = []
    for which in ("ours", "theirs"):
        tensors = pair.tensors(which)
        described.append({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    assert described[0] == described[1]
    experts = [name for name in described[0] if ".experts." in name]
    per_projection = 4 if pair.recipe == "nvfp4" else 3
    assert len(experts) == (6 * 16 if pair.recipe == "nvfp4" else 2 * len(NOT_ZERO)) * 3 * per_projection
    with safe_open(pair.ours / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_byte(pair: Pair) -> None:
    """Codes (-0 aside), block scales and global scales of every expert; all other tensors whole."""
    theirs, ours = pair.tensors("theirs"), pair.tensors("ours")
    minus_zeros = codes = 0
    for name, expected in theirs.items():
        found = ours[name]
        if name.endswith("input_scale"):
            continue
        if expected.dtype == torch.uint8:
            assert torch.equal(found, without_minus_zero(expected)), name
            minus_zeros += int((found != expected).sum())
            codes += expected.numel()
        else:
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
            assert torch.equal(found.view(kind), expected.view(kind)), name
    assert codes and 0 < minus_zeros < codes / 4, "modelopt writes some -0, or this test proves little"


def test_a_matrix_of_zeros(tmp_path: Path) -> None:
    """scale_2 = 1, scales 1, codes 0, in the parts and in a file."""
    result = CliRunner().invoke(
        main, ["convert", str(write_kinds(tmp_path / "in")), "--to", "nvfp4", "--recipe", "nvfp4-w4a16",
               "--effort", "stock", "-o", str(tmp_path / "out")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ours = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in ours if f".experts.{KINDS.index('zero')}." in name]
    assert len(names) == 2 * 3 * 3
    for name in names:
        expected = 0.0 if name.endswith(".weight") else 1.0
        assert bool((ours[name].float() == expected).all()), name


def test_both_config_files(pair: Pair) -> None:
    assert pair.json("ours", "hf_quant_config.json") == pair.json("theirs", "hf_quant_config.json")
    ours, theirs = pair.json("ours", "config.json"), pair.json("theirs", "config.json")
    assert ours["quantization_config"] == theirs["quantization_config"]
    if pair.recipe == "nvfp4":  # the source is in the style that modelopt's transformers writes
        assert ours == theirs
    source = json.loads((pair.source / "config.json").read_text())
    assert {key: value for key, value in ours.items() if key != "quantization_config"} == source
    assert (pair.ours / "generation_config.json").read_bytes() == (pair.source / "generation_config.json").read_bytes()


def test_input_scales(pair: Pair) -> None:
    """One for each of a layer's two expert inputs, above modelopt's, which saw one random prompt."""
    theirs, ours = pair.tensors("theirs"), pair.tensors("ours")
    names = [name for name in ours if name.endswith("input_scale")]
    assert bool(names) == (pair.recipe == "nvfp4")
    for name in names:
        layer, projection = name.split(".experts.")[0], name.split(".")[-2]
        twin = "down_proj" if projection == "down_proj" else "gate_proj"
        assert ours[name] == ours[f"{layer}.experts.0.{twin}.input_scale"]
        assert 0.3 < float(ours[name] / theirs[name]) < 100
    document = json.loads((pair.ours / "dgq.json").read_text())
    if names:
        amax = document["input_scales"]["amax"]
        weight = "model.decoder.layers.2.experts.down_proj"
        largest = torch.tensor(2 * max(amax["encoder"][weight], amax["decoder"][weight]))
        assert ours["model.decoder.layers.2.experts.3.down_proj.input_scale"] == largest / torch.tensor(2688.0)
        assert amax["encoder"].keys() == amax["decoder"].keys() and len(amax["encoder"]) == 12
    else:
        assert document["input_scales"] is None


def test_modelopts_own_directory_opens(pair: Pair) -> None:
    """Written by modelopt, read by us: the weights are those of ours, bit for bit; tiny runs."""
    theirs, ours = open_artifact(pair.theirs), open_artifact(pair.ours)
    assert theirs.kind == "nvfp4" and theirs.config == ours.config
    decoded = {name: weight.dequantize() for name, weight in theirs.weights.items()}
    assert all(torch.equal(weight, ours.weights[name].dequantize()) for name, weight in decoded.items())
    if pair.recipe == "nvfp4":
        plain = {name: Packed(F32, tuple(weight.shape), {"": weight}) for name, weight in decoded.items()}
        found, expected = (two_steps(weights, theirs.config) for weights in (theirs.weights, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_our_decoder_gives_the_values_of_modelopts_bytes(pair: Pair) -> None:
    """Decoded by hand from modelopt's file, an expert at a time, in float64 and plain Python words."""
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    theirs = pair.tensors("theirs")
    weights = open_artifact(pair.ours).weights
    fused = {p: weights[f"model.decoder.layers.1.experts.{p}"].dequantize() for p in ("gate_up_proj", "down_proj")}
    rows = fused["gate_up_proj"].shape[1] // 2
    for expert in range(fused["down_proj"].shape[0]):
        base = f"model.decoder.layers.1.experts.{expert}."
        decoded = {}
        for projection in ("gate_proj", "up_proj", "down_proj"):
            packed = theirs[f"{base}{projection}.weight"].int()
            table = torch.tensor(values + tuple(-v for v in values))
            codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int64)
            codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
            scale = theirs[f"{base}{projection}.weight_scale"].float() * theirs[f"{base}{projection}.weight_scale_2"]
            decoded[projection] = table[codes] * scale.repeat_interleave(16, dim=1)
        assert torch.equal(fused["gate_up_proj"][expert, :rows], decoded["gate_proj"])
        assert torch.equal(fused["gate_up_proj"][expert, rows:], decoded["up_proj"])
        assert torch.equal(fused["down_proj"][expert], decoded["down_proj"])


def test_activations_round_as_modelopts(modelopt: Oracle, tmp_path: Path) -> None:
    save_file(given := activations(), tmp_path / "x")
    modelopt("round", tmp_path / "x", tmp_path / "y")
    expected = load_file(tmp_path / "y")["rounded"]
    found = round_activations(given["x"], given["input_scale"].view(1, 1))
    assert torch.equal(found, expected)
    assert not torch.equal(found, given["x"]) and found.abs().max() <= 6 * 448 * given["input_scale"] * 1.001


def test_rounding_is_to_even() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.1]])
    codes, scales = nvfp4.encode(x, torch.ones(1, 1))
    assert codes.tolist() == [[0, 2, 2, 4, 4, 6, 6, 7, 0, 10, 10, 12, 12, 14, 14, 0]]
    assert scales.float().tolist() == [[1.0]]


def test_matrices_of_many_pieces_in_every_dtype(tmp_path: Path, modelopt: Oracle) -> None:
    """NVFP4QTensor on every kind of block, alone and side by side, in 2^17 weights and more, 16 and 32 bits; blocks so
    small beside the largest that their scales are at E4M3's end; scale_2 subnormal."""
    generator = torch.Generator().manual_seed(11)
    alone = {kind: block(kind, 160, 1024, generator) for kind in NOT_ZERO}
    ordinary = [kind for kind in NOT_ZERO if kind not in ("huge", "outliers", "heavy-tailed")]
    mixed = torch.cat([alone[kind][:40] for kind in ordinary])
    fading = torch.randn(160, 1024, generator=generator) * torch.logspace(-9, 0, 160).unsqueeze(1)
    fading[::7, :512] = torch.tensor([0.0, -0.0]).repeat(256)
    given = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind, weight in {**alone, "mixed": mixed, "fading": fading, "faint": fading * 1e-37}.items():
            turned = (weight.float() * (1.1 if dtype == torch.float32 else 1)).to(dtype)
            if turned.isfinite().all() and turned.any():
                given[f"{kind} {dtype}"] = turned.contiguous()
    assert len(given) == 12 + 8 + 12
    save_file(given, tmp_path / "in")
    modelopt("quantise", tmp_path / "in", tmp_path / "out")
    theirs = load_file(tmp_path / "out")
    for name, weight in given.items():
        ours = NVFP4.quantize(weight)
        assert torch.equal(ours["weight_scale_2"], theirs[name + " scale_2"].expand(len(weight), 1)), name
        assert torch.equal(ours["weight_scale"].view(torch.uint8), theirs[name + " scale"]), name
        assert torch.equal(ours[""], without_minus_zero(theirs[name])), name


def test_the_gates_rows_come_first() -> None:
    """Of a fused weight: a layout that exchanged the halves would read back what it wrote, and nobody else would."""
    name, shape = "model.decoder.layers.0.experts.gate_up_proj", (2, 4, 16)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = Packed(NVFP4, shape, NVFP4.quantize(weight))
    split = dict(Modelopt(activations=False).split(name, shape, packed, 0))
    for expert in range(2):
        for part, rows in (("gate_proj", slice(0, 2)), ("up_proj", slice(2, 4))):
            written = split[f"{name.rpartition('.')[0]}.{expert}.{part}.weight"]
            assert torch.equal(written, packed.parts[""][expert, rows])


def test_parts_and_slices() -> None:
    """A fused weight is each expert alone; even columns lie in low nibbles; slices of rows decode to rows."""
    weight = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))
    packed = Packed(NVFP4, (3, 6, 64), NVFP4.quantize(weight))
    whole = packed.dequantize()
    for expert in range(3):
        alone = NVFP4.quantize(weight[expert])
        assert torch.equal(alone[""], packed.parts[""][expert])
        assert torch.equal(alone["weight_scale_2"], packed.parts["weight_scale_2"][expert])
        assert torch.equal(packed[expert].dequantize(), whole[expert])
        assert torch.equal(packed[expert][2:5].dequantize(), whole[expert, 2:5])
    assert packed.nbytes == NVFP4.nbytes((3, 6, 64)) == 3 * (6 * 32 + 6 * 4 + 4)
    low = torch.zeros(1, 16)
    low[0, 0] = 6.0
    assert NVFP4.quantize(low)[""].tolist() == [[7, 0, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="multiple of nvfp4's block of 16"):
        NVFP4.quantize(torch.zeros(4, 24))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_same_bytes(kind: str) -> None:
    weight = torch.stack([block(kind, 64, 256, torch.Generator().manual_seed(i)) for i in range(3)])
    expected = NVFP4.quantize(weight)
    for name, part in NVFP4.quantize(weight.cuda()).items():
        assert torch.equal(part.cpu().contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))
    decoded = NVFP4.dequantize({name: part.cuda() for name, part in expected.items()})
    assert torch.equal(decoded.cpu(), NVFP4.dequantize(expected))


def test_a_damaged_checkpoint_is_named_while_calibrating(tmp_path: Path) -> None:
    from micro import micro_config, micro_tensors, write_micro

    config = micro_config()
    tensors = micro_tensors(config)
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float("nan")
    source = write_micro(tmp_path / "in", config, tensors)
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "nvfp4", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"{name} holds values that are not finite" in result.stderr and result.stderr.count("\n") == 1
