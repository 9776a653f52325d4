"""Effort fast of a .gguf: ggml's own bytes, weighed by the gain of the norm before a weight; and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file

from dgq.convert.cli import main
from dgq.runtime.names import gguf_name

BEFORE = {  # the norm that feeds it, by GGUF's names, without "blk.N." and ".weight"
    "attn_q": "attn_norm",
    "attn_k": "attn_norm",
    "attn_v": "attn_norm",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
    "ffn_gate_up_exps": "pre_ffw_norm_2",
    "self_cond_gate": "self_cond_pre_norm",
    "self_cond_up": "self_cond_pre_norm",
}


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows fit K-quants, with gains of a wide range: one is 0, one norm says nothing; its GGUF."""
    folder = tmp_path_factory.mktemp("gains")
    config = micro_config()
    config["text_config"]["hidden_size"] = 256
    tensors = micro_tensors(config)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") or name.endswith("norm_2.weight"):
            tensor.mul_((tensor.float() - 1).mul(40).exp().bfloat16())
            tensor[7] = 0
            tensor[8] *= -1
    tensors["model.decoder.layers.1.input_layernorm.weight"].zero_()
    write_micro(folder / "model", config, tensors)
    for name, effort in (("out", "fast"), ("stock", "stock")):
        done = dgq("convert", folder / "model", "--to", "gguf", "--effort", effort, "-o", folder / name)
        assert done.exit_code == 0, done.output
    return folder


def read(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors}


def test_ggml_s_bytes_with_the_norms_gains(made: Path) -> None:
    """ggml's C, told |gain| / max |gain|, at least 1/256, of the norm as the .gguf itself stores it."""
    weights = {}
    for file in (made / "model").glob("*.safetensors"):
        weights |= {gguf_name(name): tensor.float().numpy() for name, tensor in load_file(file).items()}
    ours, stock = read(made / "out"), read(made / "stock")
    changed = set()
    for name, tensor in ours.items():
        assert tensor.tensor_type == stock[name].tensor_type and tensor.data.shape == stock[name].data.shape
        prefix, part = name.rsplit(".", 2)[:-2], name.split(".")[-2]
        same = np.array_equal(tensor.data, stock[name].data)
        norm = ".".join([*prefix, BEFORE[part], "weight"]) if part in BEFORE else None
        gain = np.abs(np.array(ours[norm].data)) if norm else np.zeros(1, np.float32)
        if tensor.tensor_type.name == "F32" or not gain.any():
            assert same, name
            continue
        columns = np.maximum(gain / gain.max(), np.float32(1 / 256))
        rows = np.ascontiguousarray(weights[name].reshape(-1, len(columns)))
        wanted = np.asarray(libgguf.quantize_rows(rows, tensor.tensor_type, imatrix=columns)).view(np.uint8)
        assert np.array_equal(wanted.reshape(-1), tensor.data.reshape(-1)), name
        if not same:
            changed.add(part)
    assert changed >= {"attn_q", "attn_k", "ffn_gate", "ffn_gate_up_exps", "self_cond_up"}, changed


def test_verify_makes_it_again(made: Path) -> None:
    checked = dgq("verify", made / "out", "--against", made / "model")
    assert checked.exit_code == 0, checked.output
    assert dgq("verify", made / "stock", "--against", made / "model").exit_code == 0
