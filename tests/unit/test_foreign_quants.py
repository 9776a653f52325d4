"""NVFP4 directories as others' tools leave them: experts without input scales, weights alone under W4A4's label,
experts under vLLM's names. Values by arithmetic: E2M1 codes times their scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file, save_file
from test_strangers import Tensors, dgq, edited

from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import round_activations
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.layers import rounded
from dgq.runtime.shape.names import DECODER

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NUMBERS = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}


def declared(algo: str, inputs: Any = None) -> dict[str, Any]:
    """modelopt's quantization_config."""
    group = {"weights": NUMBERS, "input_activations": inputs, "targets": ["Linear"]}
    return {"quant_method": "modelopt", "quant_algo": algo, "config_groups": {"group_0": group}}


def packed(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Random NVFP4 experts with input scales in modelopt's layout, and what they are worth."""
    generator = torch.Generator().manual_seed(5)
    stored, values = {}, {}
    for name, weight in tensors.items():
        owner, _, last = name.rpartition(".")
        if not owner.endswith(".experts"):
            stored[name] = weight
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        fused = []
        for expert, whole in enumerate(weight):
            for part, rows in zip(parts, whole.chunk(len(parts)), strict=True):
                codes = torch.randint(0, 16, rows.shape, generator=generator)
                scales = torch.rand(rows.shape[0], rows.shape[1] // 16, generator=generator).add(0.5)
                scales = scales.to(torch.float8_e4m3fn)
                base = f"{owner}.{expert}.{part}."
                stored[base + "weight"] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
                stored[base + "weight_scale"] = scales
                stored[base + "weight_scale_2"] = torch.tensor(0.01 * (expert + 1))
                stored[base + "input_scale"] = torch.tensor(0.5)
                signed = E2M1[codes % 8] * torch.where(codes < 8, 1.0, -1.0)
                fused.append(signed * (scales.float() * (0.01 * (expert + 1))).repeat_interleave(16, 1))
        values[name] = torch.cat(fused).view(weight.shape)
    return stored, values


def written(path: Path, stored: Tensors, config: dict[str, Any]) -> Path:
    write_micro(path, micro_config() | {"quantization_config": config}, stored, shards=0)
    return path


def opened(path: Path, values: Tensors) -> Any:
    artifact = open_artifact(path)
    assert artifact.kind == "nvfp4"
    for name, expected in values.items():
        torch.testing.assert_close(artifact.weights[name].dequantize(), expected, rtol=1e-6, atol=0)
    return artifact


LACKING = (DECODER + "layers.0.experts.2.down_proj", DECODER + "layers.1.experts.0.gate_proj",
           DECODER + "layers.1.experts.0.up_proj", DECODER + "layers.1.experts.3.up_proj")  # fmt: skip


def test_experts_without_input_scale(tmp_path: Path) -> None:
    """Named by layer and expert; their inputs are not rounded, and those of the others are, by their scale."""
    stored, values = packed(micro_tensors(micro_config()))
    stored = {name: t for name, t in stored.items() if name.removesuffix(".input_scale") not in LACKING}
    path = written(tmp_path / "micro", stored, declared("NVFP4", NUMBERS))
    artifact = opened(path, values)
    (line,) = artifact.weights.remarks
    assert "layer 0 experts 2; layer 1 experts 0, 3;" in line and "vLLM does not check that" in line
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    gate_up = artifact.weights[DECODER + "layers.1.experts.gate_up_proj"]
    for expert in range(4):
        expected = x if expert in (0, 3) else round_activations(x, torch.tensor([[0.5]]))
        assert torch.equal(rounded(x, gate_up[expert]), expected)
    page = dgq("inspect", path)
    assert "layer 1 experts 0, 3" in page
    text = dgq("run", path, "word", "--steps", 2, "--max-new-tokens", 16, "--activations", "nvfp4", "--json")
    assert json.loads(text.splitlines()[-1])["tokens"]


def test_a_scale_that_is_no_number_is_damage_as_before(tmp_path: Path) -> None:
    stored, _ = packed(micro_tensors(micro_config()))
    stored[LACKING[0] + ".input_scale"] = torch.tensor(float("inf"))
    artifact = open_artifact(written(tmp_path / "micro", stored, declared("NVFP4", NUMBERS)))
    with pytest.raises(InputError, match=r"input_scale is inf, expected a positive number"):
        artifact.weights[DECODER + "layers.0.experts.down_proj"]


@pytest.mark.parametrize("inputs", [None, NUMBERS], ids=["null", "declared"])
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_weights_alone_under_the_label_of_w4a4(tmp_path: Path, inputs: Any, place: str) -> None:
    """vllm 54189: quant_algo says NVFP4, and there is no input scale anywhere."""
    stored, values = packed(micro_tensors(micro_config()))
    stored = {name: t for name, t in stored.items() if not name.endswith("input_scale")}
    path = written(tmp_path / "micro", stored, declared("NVFP4", inputs))
    if place != "config.json":
        edited(path, lambda raw: raw.pop("quantization_config"))
        (path / place).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    artifact = opened(path, values)
    assert "input_scale" not in artifact.weights[DECODER + "layers.0.experts.down_proj"].parts
    (line,) = artifact.weights.remarks
    assert "read as W4A16" in line and "set quant_algo to W4A16_NVFP4" in line
    with pytest.raises(InputError, match="holds no input scales"):
        artifact.load("cpu", activations="nvfp4")
    plain = written(tmp_path / "plain", stored, declared("W4A16_NVFP4"))
    assert not opened(plain, values).weights.remarks


NAMES = {
    "moe": (".experts.", ".moe.experts."),
    "block_sparse": (".experts.", ".block_sparse_moe.experts."),
    "inner model": ("model.", ""),
    "gemma": ("model.decoder.", "model.language_model."),
    "wrapped": ("model.", "module._orig_mod.model."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_quantised_experts_under_other_names(tmp_path: Path, kind: str) -> None:
    stored, values = packed(micro_tensors(micro_config()))
    old, new = NAMES[kind]
    path = written(tmp_path / "micro", {n.replace(old, new, 1): t for n, t in stored.items()}, declared("NVFP4"))
    artifact = opened(path, values)
    assert any("another program's names" in line for line in artifact.weights.remarks)


def test_a_quantised_tower_without_vision_config(tmp_path: Path) -> None:
    """Vision tensors that config.json knows nothing of are left out of a quantised directory, too."""
    stored, values = packed(micro_tensors(micro_config()))
    stored["model.encoder.vision_tower.std_bias"] = torch.zeros(4).bfloat16()
    artifact = opened(written(tmp_path / "micro", stored, declared("NVFP4")), values)
    assert not artifact.weights.sees and "1 vision tensors: left out" in artifact.weights.remarks[0]


def test_fp4_is_bitsandbytes(tmp_path: Path) -> None:
    """FP4, bitsandbytes' default type, with experts a state each: its own decoder's values."""
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    config = micro_config()
    config["text_config"]["moe_intermediate_size"] = 64
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    stored, values = {}, {}
    for name, weight in micro_tensors(config).items():
        if ".experts." in name:
            parts = 2 if name.endswith("gate_up_proj") else 1
            owner, decoded = name.rpartition(".")[0], []
            for expert, whole in enumerate(weight):
                for part, rows in zip(("gate", "up") if parts == 2 else ("down",), whole.chunk(parts), strict=True):
                    codes, state = functional.quantize_4bit(rows.contiguous(), quant_type="fp4")
                    linear = f"{owner}.{expert}.{part}_proj.weight"
                    stored[linear] = codes
                    stored |= {f"{linear}.{key}": one for key, one in state.as_dict(packed=True).items()}
                    state.dtype = torch.float32
                    decoded.append(functional.dequantize_4bit(codes, state))
            values[name] = torch.cat(decoded).view(weight.shape)
        else:
            stored[name] = weight
    artifact = open_artifact(write_micro(tmp_path / "micro", config, stored, shards=0))
    assert artifact.kind == "bnb4" and len(values) == 4
    for name, expected in values.items():
        assert artifact.weights[name].scheme.name == "fp4"
        assert torch.equal(artifact.weights[name].dequantize(), expected)
    assert "fp4" in dgq("inspect", tmp_path / "micro")
    tensors = load_file(tmp_path / "micro" / "model.safetensors")
    map_name = next(name for name in tensors if name.endswith("quant_map"))
    save_file(tensors | {map_name: tensors[map_name] * 2}, tmp_path / "micro" / "model.safetensors")
    with pytest.raises(InputError, match="is not the table of FP4"):
        [weight.shape for weight in open_artifact(tmp_path / "micro").weights.values()]
