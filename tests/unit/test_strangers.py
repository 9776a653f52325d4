"""Checkpoints as trainers and exporters save them. Each opens with the same weights as the plain one, and says in a
notice what is odd about it; what is something else is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from micro import micro_config, micro_tensors, two_steps, write_micro
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.models import is_artifact, open_model
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
Tensors = dict[str, torch.Tensor]


def values(weights: Any) -> Tensors:
    return {name: weights[name].dequantize() for name in weights}


def checked(path: Path, tensors: Tensors, *words: str) -> Source:
    """The source, opened both ways, with these values; one of its notices has each word."""
    source, lines = open_source(str(path)), []
    opened = open_model(str(path), notice=lines.append)
    for weights in (source, opened.weights, open_artifact(path).weights):
        found = values(weights)
        assert found.keys() == source.text.keys()
        assert all(torch.equal(found[name], tensors[name].float()) for name in found)
    for word in words:
        for notices in (source.notices, lines, open_artifact(path).weights.remarks):
            assert any(word in line and "\n" not in line for line in notices), (word, notices)
    assert not is_artifact(str(path))
    return source


def edited(path: Path, change: Callable[[dict[str, Any]], None], file: str = "config.json") -> Path:
    raw = json.loads((path / file).read_text())
    change(raw)
    (path / file).write_text(json.dumps(raw))
    return path


def dgq(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refused(path: Path) -> str:
    """The one line that every way of opening a directory ends in."""
    lines = []
    for opened in (open_source, open_model, open_artifact):
        with pytest.raises(InputError) as error:
            opened(str(path))
        lines.append(str(error.value))
    assert "\n" not in lines[0] and len(set(lines)) == 1, lines
    return lines[0]


def nemo(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """NeMo AutoModel's export of a model, and the plain checkpoint with the same values."""
    plain = {name: tensor.float() for name, tensor in tensors.items()}
    for name in tensors:
        if name.endswith("per_expert_scale"):
            plain[name.replace("router.per_expert_scale", "experts.down_proj")] *= plain[name][:, None, None]
            plain[name] = torch.ones_like(plain[name])
        if name.startswith(ENCODER):
            plain[name] = plain[DECODER + name.removeprefix(ENCODER)].clone()
    return {name: tensor for name, tensor in plain.items() if not name.startswith("model.encoder.")}, plain


def test_nemo(tmp_path: Path) -> None:
    export, plain = nemo(micro_tensors(micro_config()))
    path = write_micro(tmp_path / "nemo", tensors=export)
    source = checked(path, plain, "the decoder's are taken for the encoder")
    other = open_source(str(write_micro(tmp_path / "plain", tensors=plain)))
    assert torch.equal(two_steps(source, source.config), two_steps(other, other.config))
    del export[DECODER + "layers.0.layer_scalar"]
    with pytest.raises(InputError, match="layer_scalar is missing"):  # damaged, not NeMo's
        open_source(str(write_micro(tmp_path / "damaged", tensors=export)))


def test_some_encoder_scalars_are_no_export(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    del tensors[ENCODER + "layers.0.layer_scalar"]
    with pytest.raises(InputError, match="layer_scalar is missing"):
        open_source(str(write_micro(tmp_path / "micro", tensors=tensors)))


def towerless(path: Path) -> Path:
    """`tiny` as NeMo exports it: the config has a vision_config, and the files no tower."""
    shutil.copytree(TINY, path)
    export, _ = nemo(load_file(TINY / "model.safetensors"))
    save_file(export, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_towerless(tmp_path: Path) -> None:
    path = towerless(tmp_path / "nemo")
    source = checked(path, nemo(load_file(TINY / "model.safetensors"))[1], "no vision tower: text only")
    assert not source.vision
    for opened in (open_model(str(path)), open_artifact(path)):
        with pytest.raises(InputError, match="has no vision tower, which images need"):
            _ = opened.vision


@pytest.mark.parametrize(("to", "recipe"), [("gguf", "q8_0")])
def test_towerless_becomes_a_text_model(tmp_path: Path, to: str, recipe: str, few_steps: None) -> None:
    path = edited(towerless(tmp_path / "nemo"), lambda raw: raw.update(quantization_config={}))
    out = tmp_path / to
    dgq("convert", path, "--to", to, "--recipe", recipe, "-o", out, "--effort", "fast", "--device", "cpu")
    config = json.loads((out / "config.json").read_text())
    assert "vision_config" not in config and config.get("quantization_config") != {}
    notices = json.loads((out / "dgq.json").read_text())["notices"]
    assert sum("text only" in line or "taken for the encoder" in line or "stale" in line for line in notices) == 3
    assert not list(out.glob("*mmproj*"))
    assert open_model(str(out)).weights[EMBEDDING].shape == (2048, 256)


STALE: dict[str, Any] = {
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb_off": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "mlx": {"group_size": 64, "bits": 4},
    "empty": {},
}


@pytest.mark.parametrize("kind", [*STALE, "hf_quant_config"])
def test_stale_declaration(tmp_path: Path, kind: str) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors)
    if kind == "hf_quant_config":
        (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    else:
        edited(path, lambda raw: raw.update(quantization_config=STALE[kind]))
    source = checked(path, tensors, "every tensor is plain: stale")
    assert "quantization_config" not in (source.plain_config() or {})


def test_a_quantised_checkpoint_is_refused_as_before(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    tensors[DECODER + "layers.0.mlp.up_proj.weight"] = torch.zeros(160, 32, dtype=torch.uint8)
    path = write_micro(tmp_path / "micro", tensors=tensors)
    edited(path, lambda raw: raw.update(quantization_config=STALE["modelopt"]))
    with pytest.raises(InputError, match=r"already quantised \('modelopt'\)"):
        open_source(str(path))
    assert is_artifact(str(path))
