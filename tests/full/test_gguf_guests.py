"""GGUF files of every type that gguf-py decodes, quantised by another build of ggml (libgguf) and written by gguf-py:
weights equal gguf's own decode, the files run, and what is decoded says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from micro import micro_config, micro_tensors, two_steps, write_micro

import dgq.runtime
from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.quant.schemes.gguf_guests import guest, received, stays_packed
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import hf_name

PACKED = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q5_K", "IQ4_NL", "NVFP4")  # the others are decoded
DECODED = ("Q5_1", "Q4_0", "Q4_1", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4", "IQ3_S", "IQ3_XXS", "IQ2_XXS",
           "TQ2_0", "TQ1_0")  # fmt: skip
SLOW = ("IQ2_S", "IQ2_XS", "IQ1_M", "IQ1_S")  # decoded too; ggml's encoders make their tables for seconds
Change = Callable[[gguf.ReaderTensor], tuple[str, np.ndarray, gguf.GGMLQuantizationType]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 file whose every row is a multiple of 256."""
    path = tmp_path_factory.mktemp("guests")
    config = micro_config()
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
    config["text_config"] |= {"head_dim": 128, "global_head_dim": 128}
    write_micro(path / "micro", config, micro_tensors(config))
    (path / "plain.toml").write_text(
        'name = "plain"\nformat = "gguf"\nlabel = "BF16"\ndescription = ""\nmax_16bit_share = 1\n'
        '[[rule]]\nmatch = "*"\nscheme = "bf16"\n'
    )
    recipe = ("--to", "gguf", "--recipe", str(path / "plain.toml"))
    result = CliRunner().invoke(main, ["convert", str(path / "micro"), *recipe, "-o", str(path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.stdout.splitlines()[-1])["output"])


def rewritten(plain: Path, to: Path, change: Change) -> Path:
    """The file written anew by gguf-py, each tensor as change() has it: name, bytes or float32, type."""
    writer = gguf.GGUFWriter(to, "diffusion-gemma")
    reader = gguf.GGUFReader(plain)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        name, data, kind = change(tensor)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def float_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    shape = tuple(reversed(tensor.shape.tolist()))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)


def quantised(kind: gguf.GGMLQuantizationType) -> Change:
    def change(tensor: gguf.ReaderTensor) -> tuple[str, np.ndarray, gguf.GGMLQuantizationType]:
        values = float_of(tensor)
        if values.ndim < 2:
            return tensor.name, values, gguf.GGMLQuantizationType.F32
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
        importance = np.ones(values.shape[-1], np.float32)  # some types want one
        data = np.asarray(libgguf.quantize_rows(rows, kind, imatrix=importance)).view(np.uint8)
        data = data.reshape(*values.shape[:-1], -1)
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        return tensor.name, data.view(plain) if plain else data, kind

    return change


def decoded(path: Path, bf16: bool) -> dict[str, np.ndarray]:
    """gguf-py's own reading of a file, matrices rounded to BF16 if asked, as float32."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(float_of(tensor))
        found[tensor.name] = (values.bfloat16().float() if bf16 and values.dim() > 1 else values).numpy()
    return found


def logits(path: Path) -> torch.Tensor:
    artifact = open_artifact(path)
    return two_steps(artifact.weights, artifact.config)


def test_no_type_is_forgotten() -> None:
    known = {*PACKED, *DECODED, *SLOW}
    assert {kind.name for kind in gguf.quants._type_traits} == known - {"F32", "F16"}
    for name in SLOW:
        kind = guest(name)
        assert kind is not None and not stays_packed(kind)


@pytest.mark.parametrize("name", (*PACKED, *DECODED))
def test_a_file_of_each_type(name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgq.quant.schemes.gguf_guests.SLICE", 9000)
    kind = gguf.GGMLQuantizationType[name]
    path = rewritten(plain, tmp_path / "x.gguf", quantised(kind))
    theirs, artifact = decoded(path, name in DECODED), open_artifact(path)
    everything = artifact.weights.everything()
    assert {stored.scheme for n, stored in everything.items() if ".experts." in n} == {name.lower()}
    assert sum(stored.nbytes for stored in everything.values()) == sum(
        int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "rope_freqs.weight"
    )
    for own, values in theirs.items():
        if own != "rope_freqs.weight":
            weight = artifact.weights[str(hf_name(own))]
            assert torch.equal(weight.dequantize(), torch.from_numpy(values)), own
            if values.ndim > 1:
                assert weight.scheme.name == ("bf16" if name in DECODED else name.lower())
    assert len(artifact.weights.remarks) == (name in DECODED)
    if name in DECODED[1:]:
        return  # weights that equal those are run as the first type's are
    f32 = gguf.GGMLQuantizationType.F32
    same = rewritten(plain, tmp_path / "same.gguf", lambda tensor: (tensor.name, theirs[tensor.name], f32))
    torch.testing.assert_close(logits(path), logits(same), atol=1e-4, rtol=0)


def test_what_is_decoded_is_said_once(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "x.gguf", quantised(gguf.GGMLQuantizationType.Q4_1))
    wide = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1]
    stored, taken = sum(int(t.n_bytes) for t in wide), sum(2 * int(t.n_elements) for t in wide)
    said = (
        f"x.gguf: {len(wide)} tensors are Q4_1, which dgq has no kernels for: decoded to BF16 when loaded, they take "
        f"{taken / 2**20:,.1f} MiB of memory instead of the file's {stored / 2**20:,.1f}"
    )
    run = CliRunner().invoke(
        main, ["run", str(path), "abc", "--max-new-tokens", "16", "--steps", "1", "--device", "cpu"]
    )
    assert run.exit_code == 0, run.output
    assert run.stderr.splitlines().count(f"note: {said}") == 1 and said not in run.stdout
    page = CliRunner().invoke(main, ["inspect", str(path)])
    assert page.stdout.count(said) == 1 and "q4_1" in page.stdout
    found: dict[str, Any] = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout)
    assert found["remarks"] == [said] and found["quantized_share"] > 0.9
    with pytest.warns(UserWarning, match="x.gguf: .* decoded to BF16"):
        dgq.runtime.load(path, "cpu")


def test_both_names_of_the_self_conditioning_norm(plain: Path, tmp_path: Path) -> None:
    def renamed(tensor: gguf.ReaderTensor) -> tuple[str, np.ndarray, gguf.GGMLQuantizationType]:
        name = tensor.name.replace("self_cond_pre_norm", "self_cond_norm")
        return name, float_of(tensor), gguf.GGMLQuantizationType.F32

    path = rewritten(plain, tmp_path / "x.gguf", renamed)
    assert torch.equal(logits(path), logits(plain))
    found = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout)
    assert "self_cond_norm.weight" in found["tensors"] and "self_cond_pre_norm.weight" not in found["tensors"]

    def twice(tensor: gguf.ReaderTensor) -> tuple[str, np.ndarray, gguf.GGMLQuantizationType]:
        name = "self_cond_norm.weight" if tensor.name == "output_norm.weight" else tensor.name
        return name, float_of(tensor), gguf.GGMLQuantizationType.F32

    with pytest.raises(InputError, match="are two names of one tensor"):
        open_artifact(rewritten(plain, tmp_path / "y.gguf", twice))


@pytest.mark.parametrize(("name", "byte"), [("Q4_1", 0xFF), ("NVFP4", 0x80)])
def test_damaged_scales_are_refused(name: str, byte: int, plain: Path, tmp_path: Path) -> None:
    whole = quantised(gguf.GGMLQuantizationType[name])

    def damaged(tensor: gguf.ReaderTensor) -> tuple[str, np.ndarray, gguf.GGMLQuantizationType]:
        own, data, kind = whole(tensor)
        if own == "blk.1.ffn_up.weight":
            data = data.copy()
            data[3, :4] = byte
        return own, data, kind

    path = rewritten(plain, tmp_path / "x.gguf", damaged)
    with pytest.raises(InputError, match=r"x\.gguf: blk\.1\.ffn_up\.weight holds .*damaged"):
        open_artifact(path).load()


def test_every_scale_of_nvfp4_is_repacked_exactly() -> None:
    """All that a ggml file may hold, 0x7F among the scales, which ggml reads as 0."""
    raw = torch.randint(0, 256, (6, 128, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    raw[..., :4] = torch.arange(128, dtype=torch.uint8)[:, None]
    kind = guest("NVFP4")
    assert kind is not None
    packed = received(kind, (6, 128, 64), raw, "x")
    theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType.NVFP4)
    assert packed.scheme.name == "nvfp4" and torch.equal(packed.dequantize(), torch.from_numpy(theirs))
    assert torch.equal(packed[2].dequantize(), torch.from_numpy(theirs[2]))
