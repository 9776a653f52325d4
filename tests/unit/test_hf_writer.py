"""Directories we write, read by the safetensors library: shards, index, alignment, completeness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dgq.quant.files.hf_dir import HFDir, read_header
from dgq.quant.files.hf_writer import HFWriter, entry_bytes, shards
from dgq.quant.types import Entry

TENSORS = {
    "a.weight": torch.arange(21, dtype=torch.uint8).view(7, 3),
    "a.scale": torch.linspace(1, 2, 6).to(torch.float8_e4m3fn),
    "a.number": torch.tensor(2.5),
    "b": torch.randn(3, 5).bfloat16(),
    "c.codes": torch.arange(9, dtype=torch.uint8),
    "c.absmax": torch.randn(4),
}
DTYPES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}


def entries(*names: str) -> dict[str, Entry]:
    return {name: (DTYPES[TENSORS[name].dtype], tuple(TENSORS[name].shape)) for name in names}


WEIGHTS = [entries("a.weight", "a.scale", "a.number"), entries("b"), entries("c.codes", "c.absmax")]


def write(path: Path, limit: int) -> list[Path]:
    path.mkdir()
    writer = HFWriter(path, shards(WEIGHTS, limit))
    for name in reversed(TENSORS):  # any order
        tensor = TENSORS[name]
        for piece in tensor.split(2) if tensor.dim() else (tensor,):
            writer.places.append(name, piece)
    writer.close()
    return sorted(path.glob("*.safetensors"))


@pytest.mark.parametrize(("limit", "count"), [(10**9, 1), (60, 2), (1, 3)])
def test_another_reader_finds_every_tensor(limit: int, count: int, tmp_path: Path) -> None:
    files = write(tmp_path / "out", limit)
    assert len(files) == count
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                found[name] = (file.name, opened.get_tensor(name))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        raw = [t.flatten().view(torch.uint8) for t in (found[name][1], tensor)]
        assert torch.equal(*raw) and found[name][1].shape == tensor.shape
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (count > 1)
    if count > 1:
        said = json.loads(index.read_text())
        assert said["weight_map"] == {name: file for name, (file, _) in sorted(found.items())}
        assert said["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
        assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert HFDir(tmp_path / "out").specs.keys() == TENSORS.keys()


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """Odd lengths come last; a reader may map each tensor in place."""
    for file in write(tmp_path / "out", 10**9):
        for name, spec in read_header(file).items():
            assert spec.start % TENSORS[name].element_size() == 0, name


def test_a_weight_stays_in_one_file() -> None:
    for limit in (1, 30, 60, 70, 1000):
        files = shards(WEIGHTS, limit)
        assert [name for file in files for name in file] == list(TENSORS)
        for weight in WEIGHTS:
            assert sum(not file.keys().isdisjoint(weight) for file in files) == 1


@pytest.mark.parametrize("limit", [1, 30, 60, 70, 1000])
def test_a_file_holds_no_more_than_the_limit_unless_one_weight_does(limit: int) -> None:
    for file in shards(WEIGHTS, limit):
        inside = [weight for weight in WEIGHTS if not file.keys().isdisjoint(weight)]
        assert len(inside) == 1 or sum(map(entry_bytes, file.values())) <= limit


def test_what_is_missing_or_too_much(tmp_path: Path) -> None:
    writer = HFWriter(tmp_path, shards(WEIGHTS))
    writer.places.append("b", TENSORS["b"][:2])
    with pytest.raises(RuntimeError, match="room for 10"):
        writer.places.append("b", TENSORS["b"][:2])
    with pytest.raises(RuntimeError, match="6 tensors are incomplete"):
        writer.close()
