"""Importance matrices both ways: what `dgq calibrate` writes is what llama.cpp's loader asks for, gguf-py reads and
ggml quantises with; what llama.cpp writes is read, in its GGUF, its older binary and what it makes of that."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract_llamacpp as llamacpp
import gguf
import libgguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.quant.files.imatrix import read_imatrix, write_imatrix

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
THEIRS = TINY_A / "reference.imatrix.gguf"
TEXT = "the king went to the wind and the apple of the door was in the house of the king for a day"


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a checkpoint, whose first layer never asks its last expert, its STATS, its imatrix and the GGUF."""
    folder = tmp_path_factory.mktemp("imatrix")
    config = micro_config()
    config["text_config"] |= {"hidden_size": 256, "head_dim": 64}
    tensors = micro_tensors(config)
    tensors["model.decoder.layers.0.router.proj.weight"][-1] = 0
    tensors["model.decoder.layers.0.router.proj.weight"][:-1] = 0
    tensors["model.decoder.layers.0.router.scale"][:] = 0  # all equal: the first two are chosen
    write_micro(folder / "model", config, tensors)
    (folder / "prompts.jsonl").write_text(json.dumps({"text": TEXT}))
    arguments = ("--prompts", folder / "prompts.jsonl", "--rounds", 1, "--device", "cpu")
    done = dgq("calibrate", folder / "model", "-o", folder / "stats", "--imatrix", folder / "im.gguf", *arguments)
    assert done.exit_code == 0, done.output
    done = dgq("convert", folder / "model", "--to", "gguf", "--imatrix", folder / "im.gguf", "-o", folder / "out")
    assert done.exit_code == 0, done.output
    (folder / "said").write_text(done.stderr)
    return folder


def matrices(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in llamacpp.held(gguf.GGUFReader(file)).items() if len(shape) > 1}


def test_llama_cpp_takes_ours_as_it_takes_its_own(made: Path) -> None:
    ours = gguf.GGUFReader(made / "im.gguf")
    weights = matrices(next((made / "out").glob("*.gguf")))
    assert llamacpp.imatrix_problems(ours, weights) == []
    reference = matrices(TINY_A / "reference.Q4_K_M.gguf")
    assert llamacpp.imatrix_problems(gguf.GGUFReader(THEIRS), reference) == []
    assert [key for key in ours.fields if not key.startswith("GGUF.")] == [
        key for key in gguf.GGUFReader(THEIRS).fields if not key.startswith("GGUF.")
    ]
    named = {tensor.name.rpartition(".")[0] for tensor in ours.tensors}
    assert set(weights) - named == {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(2)}, "kept in F32"


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "no chunk size": (lambda keys, t: keys.pop("imatrix.chunk_size"), "chunk_size"),
    "counts alone": (lambda keys, t: t.pop("blk.0.attn_q.weight.in_sum2"), "mismatched"),
    "another shape": (lambda keys, t: t.update({"blk.0.attn_q.weight.in_sum2": np.ones(128, np.float32)}), "128 sums"),
    "one count for all": (
        lambda keys, t: t.update({"blk.0.ffn_down_exps.weight.counts": np.ones(1, np.float32)}), "1 counts"
    ),
    "a name of transformers": (
        lambda keys, t: t.update({f"x.q_proj.{part}": np.ones(1, np.float32) for part in ("in_sum2", "counts")}),
        "no tensor of the model",
    ),
    "half precision": (lambda keys, t: t.update({"blk.0.attn_q.weight.counts": np.ones(1, np.float16)}), "not F32"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_llama_cpp_would_stumble_over(damage: str, made: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(made / "im.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change, expected = DAMAGE[damage]
    change(keys, tensors)
    write(tmp_path / "broken.gguf", keys, tensors)
    wrong = llamacpp.imatrix_problems(
        gguf.GGUFReader(tmp_path / "broken.gguf"), matrices(next((made / "out").glob("*.gguf")))
    )
    assert wrong and any(expected in line for line in wrong), wrong


def write(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for key, value in keys.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sums_are_the_stats_under_llama_cpp_s_names(made: Path) -> None:
    theirs = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(made / "im.gguf").tensors}
    stats = load_file(made / "stats")
    for name, source in (
        ("blk.1.ffn_gate_up_exps.weight", "model.decoder.layers.1.experts.gate_up_proj"),
        ("blk.0.attn_v.weight", "model.decoder.layers.0.self_attn.q_proj.weight"),
        ("blk.1.ffn_up.weight", "model.decoder.layers.1.mlp.gate_proj.weight"),
        ("self_cond_down.weight", "model.decoder.self_conditioning.down_proj.weight"),
        ("token_embd.weight", "model.decoder.embed_tokens.weight"),
    ):
        both, count = stats[source + ".sum2"], stats[source + ".count"].sum(-1)
        np.testing.assert_allclose(theirs[name + ".in_sum2"], both.sum(-2).numpy(), rtol=1e-6)
        assert theirs[name + ".counts"].reshape(-1).tolist() == count.reshape(-1).tolist()


def test_ggml_s_bytes_with_our_imatrix(made: Path) -> None:
    """llama-quantize's rule (sums / counts, 1 where there was no token) over gguf-py's reading, ggml's quantiser an
    expert at a time: the bytes of `dgq convert --imatrix`."""
    theirs = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(made / "im.gguf").tensors}
    weights = micro_source(made)
    weighed = 0
    for tensor in gguf.GGUFReader(next((made / "out").glob("*.gguf"))).tensors:
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        sums, counts = theirs[tensor.name + ".in_sum2"], theirs[tensor.name + ".counts"]
        sums, counts = sums.reshape(-1, sums.shape[-1]), counts.reshape(-1, 1)
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        rows = weights[tensor.name].reshape(len(mean), -1, sums.shape[-1])
        wanted = [
            np.asarray(libgguf.quantize_rows(np.ascontiguousarray(one), tensor.tensor_type, imatrix=column))
            for one, column in zip(rows, mean, strict=True)
        ]
        wanted = np.concatenate([one.view(np.uint8).reshape(-1) for one in wanted])
        assert np.array_equal(wanted, tensor.data.reshape(-1)), tensor.name
        weighed += len(mean)
    assert weighed == 4 + 2 * (4 + 4 + 4 + 3) - 1, (
        "self-conditioning, embedding; experts, attention and MLP of both layers"
    )
    assert "4 experts or weights saw no token" in " ".join((made / "said").read_text().split())


def micro_source(made: Path) -> dict[str, np.ndarray[Any, Any]]:
    """GGUF name -> float32 weight, by tinyA's pair of names: the same in every model of the architecture."""
    from dgq.runtime.shape.names import gguf_name

    found = {}
    for file in (made / "model").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if known := gguf_name(name):
                found[known] = tensor.float().numpy()
    return found


@pytest.fixture(scope="module")
def tiny_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tinyA") / "tinyA_96"
    path.mkdir()
    for name in TINY_A.iterdir():
        if name.suffix in (".json", ".safetensors") and "logits" not in name.name and "5.23" not in name.name:
            shutil.copyfile(name, path / name.name)
    return path


def means() -> dict[str, np.ndarray[Any, Any]]:
    """What llama-quantize makes of the reference."""
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(THEIRS).tensors}
    found = {}
    for name in (name.removesuffix(".counts") for name in tensors if name.endswith(".counts")):
        sums, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"].reshape(-1, 1)
        sums = sums.reshape(len(counts), -1)
        found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    return found


def old_file(path: Path, dataset: bytes = b"calib.txt") -> Path:
    """The binary kind, field by field as llama.cpp's loader reads it: one call of each, so that sums are means."""
    data = struct.pack("<i", len(means()))
    for name, mean in means().items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, mean.size) + mean.tobytes()
    path.write_bytes(data + struct.pack("<ii", 12, len(dataset)) + dataset)
    return path


def flat_file(path: Path) -> Path:
    """What llama-imatrix makes of the binary kind: one count a tensor, all experts' columns in a row."""
    keys = {"general.type": "imatrix", "imatrix.datasets": ["/data/calib.txt"], "imatrix.chunk_count": 12,
            "imatrix.chunk_size": 128}  # fmt: skip
    tensors = {}
    for name, mean in means().items():
        tensors |= {name + ".in_sum2": mean.reshape(-1), name + ".counts": np.ones(1, np.float32)}
    return write(path, keys, tensors)


@pytest.mark.parametrize("make", [old_file, flat_file])
def test_older_kinds_give_llama_quantize_s_bytes(make: Callable[[Path], Path], tiny_a: Path, tmp_path: Path) -> None:
    file = make(tmp_path / "im")
    done = dgq("convert", tiny_a, "--to", "gguf", "--imatrix", file, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    ours = gguf.GGUFReader(tmp_path / "out" / "tinyA_96-Q4_K_M.gguf")
    reference = gguf.GGUFReader(TINY_A / "reference.imatrix.Q4_K_M.gguf")
    for mine, theirs in zip(ours.tensors, reference.tensors, strict=True):
        assert np.array_equal(mine.data.view(np.uint8), theirs.data.view(np.uint8)), mine.name
    for key, field in reference.fields.items():
        if key.startswith("quantize.imatrix.") and not key.endswith(".file"):
            assert ours.fields[key].contents() == field.contents()
    assert ours.fields["quantize.imatrix.file"].contents() == "im", "its name, and no path of this machine"
    said = " ".join(done.stderr.split())
    assert "no entry for 4 of 56 quantised weights (self_cond_down.weight, …): quantised unweighed" in said
    if make is old_file:  # the other one's weights are the same, as the bytes say
        checked = dgq("verify", tmp_path / "out", "--against", tiny_a, "--imatrix", file)
        assert checked.exit_code == 0, checked.output


def test_an_older_file_without_its_end(tmp_path: Path) -> None:
    """Chunks and dataset came later to the format."""
    whole = old_file(tmp_path / "im")
    short = tmp_path / "short"
    short.write_bytes(whole.read_bytes()[: -8 - len("calib.txt")])
    found = read_imatrix(short)
    assert found.datasets == () and found.chunks == 0
    assert all(torch.equal(found.weights[name], value) for name, value in read_imatrix(whole).weights.items())


def test_every_cut_of_an_older_file_is_noticed(tmp_path: Path) -> None:
    data = old_file(tmp_path / "im", b"").read_bytes()
    for length in (*range(1, 120, 3), 5000, len(data) // 2, len(data) - 20, len(data) - 5, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_imatrix(tmp_path / "cut")
    for count in (-1, 0, 1 << 30):
        (tmp_path / "cut").write_bytes(struct.pack("<i", count) + data[4:])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_imatrix(tmp_path / "cut")
    (tmp_path / "cut").write_text("hello, this is no imatrix")
    for other in (tmp_path / "cut", TINY_A / "model.safetensors"):
        with pytest.raises(InputError, match="neither a GGUF nor a whole binary imatrix"):
            read_imatrix(other)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            read_imatrix(missing)


@pytest.mark.parametrize(
    ("name", "values", "kind", "expected"),
    [
        ("blk.0.attn_q.weight.counts", None, np.float32, "comes without"),
        ("blk.0.attn_q.weight.in_sum2", None, np.float32, "comes without"),
        ("blk.0.attn_q.weight.counts", [1], np.float16, "not F32"),
        ("blk.0.attn_q.weight.in_sum2", [1] * 64, np.float32, "has importance [64] for a weight of [128, 256]"),
        ("blk.0.ffn_down_exps.weight.counts", [1, 1], np.float32, "has 2 counts"),
    ],
)
def test_partial_files_are_refused_where_llama_cpp_refuses_them(
    name: str, values: list[float] | None, kind: type, expected: str, made: Path, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(made / "im.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    tensors |= {name: np.array(values, kind)} if values else {}
    if values is None:
        del tensors[name]
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    write(tmp_path / "im.gguf", keys, tensors)
    done = dgq("convert", made / "model", "--to", "gguf", "--imatrix", tmp_path / "im.gguf", "-o", tmp_path / "out")
    assert done.exit_code == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["im.gguf"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        write_imatrix(tmp_path / "im.gguf", {"a": (torch.ones(1, 4), torch.ones(1))}, "a", 1, 1)
    assert not list(tmp_path.iterdir())
