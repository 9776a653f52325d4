"""bitsandbytes 4-bit as others save it, in our runtime: experts apart with a quant_state each, by bitsandbytes' own
functions; and what transformers saves of a model that it quantised, the encoder's quant_states with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, DiffusionGemmaForBlockDiffusion
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from dgq.quant.errors import InputError
from dgq.quant.formats.bnb import STATE
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.runtime.files.artifact import open_artifact

functional: Any = pytest.importorskip("bitsandbytes.functional")
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
WAYS: dict[str, Callable[[str, int], dict[str, list[str]]]] = {
    "Linears": lambda owner, e: {
        "gate_up_proj": [f"{owner}.{e}.gate_proj.weight", f"{owner}.{e}.up_proj.weight"],
        "down_proj": [f"{owner}.{e}.down_proj.weight"],
    },
    "a Linear of both": lambda owner, e: {
        "gate_up_proj": [f"{owner}.{e}.gate_up_proj.weight"],
        "down_proj": [f"{owner}.{e}.down_proj.weight"],
    },
    "lists": lambda owner, e: {
        "gate_up_proj": [f"{owner}.gate_up_projs.{e}.weight"],
        "down_proj": [f"{owner}.down_projs.{e}.weight"],
    },
}
pytestmark = pytest.mark.xdist_group("bitsandbytes")


def apart(
    source: dict[str, torch.Tensor], way: str, double: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's tensors with quantised experts; and they, by bitsandbytes' decoder."""
    tensors, decoded = {}, {}
    for name, weight in source.items():
        owner, _, last = name.rpartition(".")
        if not owner.endswith(".experts"):
            tensors[name] = weight
            continue
        values = []
        for expert, whole in enumerate(weight):
            linears = WAYS[way](owner, expert)[last]
            for linear, rows in zip(linears, whole.chunk(len(linears)), strict=True):
                rows = rows.contiguous()
                packed, state = functional.quantize_4bit(rows, quant_type="nf4", compress_statistics=double)
                tensors[linear] = packed
                tensors |= {f"{linear}.{key}": value for key, value in state.as_dict(packed=True).items()}
                state.dtype = torch.float32
                values.append(functional.dequantize_4bit(packed, state))
        decoded[name] = torch.cat(values).view(weight.shape)
    return tensors, decoded


def configured(double: bool, **more: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, **more)


def written(path: Path, way: str, double: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    config = micro_config()
    config["text_config"]["moe_intermediate_size"] = 64
    tensors, decoded = apart(micro_tensors(config), way, double)
    config["quantization_config"] = configured(double).to_dict()
    return write_micro(path, config, tensors, shards=0), decoded


@pytest.mark.parametrize("double", (False, True), ids=("single", "double"))
@pytest.mark.parametrize("way", WAYS)
def test_experts_apart(way: str, double: bool, tmp_path: Path) -> None:
    path, decoded = written(tmp_path / "apart", way, double)
    artifact = open_artifact(path)
    assert artifact.kind == "bnb4" and len(decoded) == 4
    for name, theirs in decoded.items():
        weight = artifact.weights[name]
        assert weight.scheme is NF4 and weight.shape == theirs.shape
        assert torch.equal(weight.dequantize(), theirs), name
        assert torch.equal(weight[1].dequantize(), theirs[1])
    assert len(artifact.weights.remarks) == double
    assert "RANDOM" in str(artifact.weights.without_import), "seen with transformers 5.23"
    stored = artifact.weights.everything()
    tensors = load_file(path / "model.safetensors")
    assert sum(s.nbytes for s in stored.values()) == sum(t.nbytes for t in tensors.values())
    assert sum(s.tensors for s in stored.values()) == len(tensors)
    model = artifact.load()
    model.encode(torch.arange(20, 30)[None], cache := model.new_cache(1))
    assert bool(model.decode(torch.arange(20, 36)[None], cache).isfinite().all())


def test_what_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "apart", "Linears", False)
    tensors = load_file(path / "model.safetensors")
    name = "model.decoder.layers.1.experts.2.up_proj.weight"
    lacking = {key: value for key, value in tensors.items() if key != name + ".absmax"}
    save_file(lacking, path / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.experts\.2\.up_proj\.weight\.absmax is missing"):
        open_artifact(path)
    tensors[name + ".absmax"][3] = float("nan")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"experts\.2\.up_proj\.weight\.absmax holds nan at \[3\]; damaged"):
        open_artifact(path).weights["model.decoder.layers.1.experts.gate_up_proj"]


@pytest.mark.parametrize("double", (False, True), ids=("single", "double"))
def test_saved_by_transformers(double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's Linears, experts in BF16, and quant_states on the encoder's side that belong to no weight there."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Bnb4BitHfQuantizer)  # as before dgq.runtime.hf
    skipped = ["lm_head", "model.encoder.vision_tower", "model.encoder.embed_vision", r".*\.router"]
    skipped += ["model.decoder.embed_tokens", "model.encoder.language_model.embed_tokens"]
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        TINY, dtype=torch.bfloat16, quantization_config=configured(double, llm_int8_skip_modules=skipped)
    )
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    orphans = [name for name in tensors if name.startswith("model.encoder.language_model.") and STATE in name]
    assert len(orphans) == 40, "transformers leaves them out: then what follows has nothing to show"
    weights, packed = open_artifact(tmp_path / "saved").weights, 0
    assert weights.without_import is None, "transformers does not open it, with or without"
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and name.startswith("model.decoder."):
            weight, state = weights[name + ".weight"], module.weight.quant_state
            assert weight.scheme is (NF4_DQ if double else NF4)
            state.dtype = torch.float32
            assert torch.equal(weight.dequantize(), functional.dequantize_4bit(module.weight.data, state)), name
            packed += 1
    assert packed == 43
    tensors[orphans[0]] = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
    save_file(tensors, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(InputError, match=r"is not a copy of model\.decoder"):
        weights = open_artifact(tmp_path / "saved").weights
        weights[orphans[0].removesuffix(STATE).replace("model.encoder.language_model.", "model.decoder.")]


@pytest.mark.parametrize("kind", ("fp4", "nf4", "double"))
def test_load_in_4bit_as_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' default: self-conditioning and the vision tower are packed, and of the text model nothing else.
    Every weight is what transformers holds, and the tower sees."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Bnb4BitHfQuantizer)  # as before dgq.runtime.hf
    config = BitsAndBytesConfig(load_in_4bit=True) if kind == "fp4" else configured(kind == "double")
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=config)
    path = tmp_path / "saved"
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, path / name)
    artifact, packed = open_artifact(path), 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            state.dtype, shape = torch.float32, state.shape
            state.shape = torch.Size((shape.numel(),))  # 0.50's CPU kernel is wrong for rows that no block divides
            expected = functional.dequantize_4bit(module.weight.data, state).view(shape)
            tower = name.startswith("model.encoder.")
            found = artifact.weights.vision_tensor(name + ".weight") if tower else None
            found = artifact.weights[name + ".weight"].dequantize() if found is None else found
            assert torch.equal(found, expected), name
            packed += 1
    assert packed == 12
    stored = artifact.weights.everything()
    tensors = load_file(path / "model.safetensors")
    assert sum(one.nbytes for one in stored.values()) == sum(tensor.nbytes for tensor in tensors.values())
    patches = artifact.vision.patches(PIL.Image.new("RGB", (96, 64), "red"))
    seen = artifact.vision.tower("cpu", torch.float32)(patches)
    assert seen.shape == (patches.soft_tokens, 256) and artifact.load("cpu")
