"""Headers of safetensors files: bytes that belong to two tensors, or to none, are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_header


def written(path: Path, *spans: tuple[int, int]) -> Path:
    """A file of tensors of bytes, named a, b, c, at these spans of its payload."""
    entries = {"abc"[i]: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(max(stop for _, stop in spans)))
    return path


def test_tensors_side_by_side(tmp_path: Path) -> None:
    specs = read_header(written(tmp_path / "good", (0, 4), (4, 8), (8, 12)))
    assert [specs[name].stop - specs[name].start for name in "abc"] == [4, 4, 4]


@pytest.mark.parametrize("spans", [((0, 4), (2, 6), (6, 8)), ((0, 4), (0, 4), (4, 8)), ((0, 4), (6, 8))], ids=str)
def test_overlaps_and_gaps(spans: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b starts at byte \d+, not \d+ where the tensor before it ends"):
        read_header(written(tmp_path / "odd", *spans))
