"""The journal of an unfinished conversion, and the places of its files: what the next run may believe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dgq.convert.resume.journal import opened, paths
from dgq.quant.errors import InputError
from dgq.quant.files.places import Places

IDENTITY = {"recipe": "q4_k_m", "files": {"model.safetensors": 12}}


def run(out: Path, *weights: str) -> set[str]:
    """An interrupted conversion that finishes these weights; what it was told is done already."""
    with opened(out, dict(IDENTITY)) as journal:
        before = set(journal.done)
        for weight in weights:
            (paths(out)[0] / weight).write_bytes(b"12345678")
            journal.finish(weight)
            journal.flush()
    return before


def test_the_next_run_knows_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "a", "b") == set()
    assert run(out, "c") == {"a", "b"}
    assert run(out) == {"a", "b", "c"}


@pytest.mark.parametrize("weight", [b"x", b"\xff"])
def test_a_damaged_line_is_not_believed(weight: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, "a", "b")
    journal = paths(out)[1]
    first, second = journal.read_bytes().rsplit(b'"done": ["b"]', 1)
    journal.write_bytes(first + b'"done": ["' + weight + b'"]' + second)
    assert run(out) == {"a"}


def test_other_work_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, "a")
    with (
        pytest.raises(InputError, match="its recipe was q4_k_m, not q6_k"),
        opened(out, {**IDENTITY, "recipe": "q6_k"}),
    ):
        pass
    changed = {**IDENTITY, "files": {"model.safetensors": 13}}
    with pytest.raises(InputError, match=r"model\.safetensors has changed since"), opened(out, changed):
        pass
    assert run(out) == {"a"}


@pytest.mark.parametrize("content", [None, b"1234"])
def test_files_that_are_not_what_they_were_begin_anew(content: bytes | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, "a", "b")
    file = paths(out)[0] / "a"
    file.unlink() if content is None else file.write_bytes(content)
    assert run(out) == set()
    assert list(paths(out)[0].iterdir()) == []


def test_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        opened(out, dict(IDENTITY)),
        pytest.raises(InputError, match="another dgq convert is writing it"),
        opened(out, dict(IDENTITY)),
    ):
        pass


def test_what_a_failed_sync_lost_stays_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second fsync succeeds, and tells nothing of the bytes that the first could not write."""
    places = Places()
    file = places.open(tmp_path / "file", b"head", 8)
    places.add("a", file, 4, 8)
    places.append("a", torch.arange(4, dtype=torch.uint8))

    def failing(descriptor: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="no space left"):
            places.sync()
    with pytest.raises(OSError, match="no space left"):
        places.sync()
