"""tinyA through the command line equals what llama.cpp's converter and llama-quantize made of it: every tensor's name,
order, shape, type and bytes, and every metadata key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from dgq.convert.cli.__main__ import main

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
PLAIN = TINY_A / "reference.Q4_K_M.gguf"
WEIGHTED = TINY_A / "reference.imatrix.Q4_K_M.gguf"
CHECKPOINT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json")  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "tinyA_96"
    path.mkdir()
    for name in CHECKPOINT:
        shutil.copyfile(TINY_A / name, path / name)
    return path


def convert(checkpoint: Path, out: Path, *options: str) -> Path:
    result = CliRunner().invoke(main, ["convert", str(checkpoint), "--to", "gguf", "-o", str(out), "--json", *options])
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.stdout.splitlines()[-1])["output"])


def assert_equal(ours: Path, reference: Path) -> None:
    """Read both with gguf-py and compare everything the reference has."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(reference)
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for mine, theirs in zip(a.tensors, b.tensors, strict=True):
        assert mine.tensor_type == theirs.tensor_type, mine.name
        assert mine.shape.tolist() == theirs.shape.tolist(), mine.name
        assert np.array_equal(mine.data.view(np.uint8), theirs.data.view(np.uint8)), mine.name
    for key, field in b.fields.items():
        if key not in ("GGUF.kv_count",):
            assert key in a.fields, key
            assert a.fields[key].types == field.types, key
            named = key in ("quantize.imatrix.file", "quantize.imatrix.dataset")  # ours without the path to them
            wanted = Path(field.contents()).name if named else field.contents()
            assert a.fields[key].contents() == wanted, key
    assert a.data_offset % 32 == 0 and a.alignment == b.alignment


def test_bytes_and_metadata_equal_llama_quantize(checkpoint: Path, tmp_path: Path) -> None:
    assert_equal(convert(checkpoint, tmp_path / "out"), PLAIN)


def test_config_saved_by_transformers_gives_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    before = convert(checkpoint, tmp_path / "before")
    shutil.copyfile(TINY_A / "config.transformers5.23.json", checkpoint / "config.json")
    after = convert(checkpoint, tmp_path / "after")
    assert_equal(after, PLAIN)
    assert before.read_bytes() == after.read_bytes()


def test_imatrix_gives_llama_quantize_s_weighted_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ref").mkdir()
    shutil.copyfile(TINY_A / "reference.imatrix.gguf", tmp_path / "ref" / "tinyA_96.imatrix.gguf")
    monkeypatch.chdir(tmp_path)
    weighted = convert(checkpoint, Path("out"), "--imatrix", "ref/tinyA_96.imatrix.gguf")
    assert_equal(weighted, WEIGHTED)
    document = json.loads((weighted.parent / "dgq.json").read_text())
    assert document["imatrix"]["name"] == "tinyA_96.imatrix.gguf" and len(document["imatrix"]["sha256"]) == 64


def test_bytes_do_not_depend_on_threads_or_slices(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = convert(checkpoint, tmp_path / "one", "--threads", "1")
    monkeypatch.setattr("dgq.convert.write.slices.SLICE", {"cpu": 1000, "cuda": 1000})
    many = convert(checkpoint, tmp_path / "many", "--threads", "7")
    assert one.read_bytes() == many.read_bytes()
    assert (one.parent / "dgq.json").read_bytes() == (many.parent / "dgq.json").read_bytes()


def test_directory_is_complete_and_accounts_for_itself(checkpoint: Path, tmp_path: Path) -> None:
    import hashlib

    file = convert(checkpoint, tmp_path / "out")
    names = {path.name for path in file.parent.iterdir()}
    files = {"dgq.json", "tinyA_96-Q4_K_M.gguf", "mmproj-tinyA_96-BF16.gguf"}
    assert names == {*CHECKPOINT, *files} - {"model.safetensors"}
    text = (file.parent / "dgq.json").read_text()
    document = json.loads(text)
    for name, entry in document["files"].items():
        data = (file.parent / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if name not in files:
            assert data == (checkpoint / name).read_bytes()
    assert set(document["files"]) == names - {"dgq.json"}
    source = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert document["source"]["files"]["model.safetensors"]["sha256"] == source
    own = document.pop("sha256")
    assert hashlib.sha256((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()).hexdigest() == own
    assert document["tensors"]["blk.0.ffn_down_exps.weight"] == "q5_0"
    assert document["tensors"]["v.blk.0.attn_q.weight"] == "bf16"
    text = document["params"] - 47264
    assert document["quantized_params"] / text == pytest.approx(0.995804), "of the text; the vision tower stays whole"
