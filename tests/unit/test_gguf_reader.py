"""dgq's GGUF reader against the gguf package's: every key, every tensor, every byte."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"


@pytest.mark.parametrize("file", sorted(TINY_A.glob("*.gguf")), ids=lambda path: path.name)
def test_it_reads_what_gguf_py_reads(file: Path) -> None:
    ours, theirs = GGUFReader(file), gguf.GGUFReader(file)
    assert ours.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert type(ours.metadata[key]) is type(field.contents()), key
    assert list(ours) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        packed = ours[tensor.name]
        assert packed.shape == tuple(reversed(tensor.shape.tolist()))
        assert packed.scheme.name == tensor.tensor_type.name.lower()
        assert np.array_equal(packed.parts[""].numpy().view(np.uint8).ravel(), tensor.data.view(np.uint8).ravel())


def test_every_kind_of_value(tmp_path: Path) -> None:
    types = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "x")
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -5, "float32": 0.5,
              "bool": True, "string": "ä▁", "uint64": 2**63, "int64": -(2**40), "float64": 0.1}  # fmt: skip
    for kind, value in values.items():
        writer.add_key_value(kind, value, types[kind.upper()])
        writer.add_key_value(f"{kind}s", [value] * 3, types.ARRAY, types[kind.upper()])
    writer.add_custom_alignment(64)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(tmp_path / "a.gguf")
    for kind, value in values.items():
        assert reader.metadata[kind] == value and reader.metadata[f"{kind}s"] == [value] * 3
    assert reader["t"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A file cut anywhere, in the header or the data, is refused."""
    data = (TINY_A / "reference.imatrix.gguf").read_bytes()
    for length in (*range(0, 600, 7), 3000, 9000, len(data) // 2, len(data) - 64):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InputError, match="truncated or damaged"):
            GGUFReader(tmp_path / "cut.gguf")
