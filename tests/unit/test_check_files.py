"""An artifact's files against its dgq.json: one change of each kind, and the line that it gets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dgq.convert.verification.files import check_files


@pytest.fixture
def artifact(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(converted("nvfp4-w4a16"), tmp_path / "artifact"))


def problems(path: Path) -> list[str]:
    return [line.removeprefix(f"{path}/") for line in check_files(path, 1, lambda size, name: None).problems]


def flipped(path: Path) -> None:
    """A bit of the last weight, at the same size."""
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def resaid(path: Path) -> None:
    """Another effort in dgq.json, in as many letters."""
    text = (path / "dgq.json").read_text("utf-8")
    (path / "dgq.json").write_text(text.replace('"effort": "fast"', '"effort": "fest"'), "utf-8")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: None, []),
        (flipped, ["model.safetensors: its SHA-256 is not dgq.json's; it was changed or damaged"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["tokenizer.json: is missing"]),
        (lambda path: (path / "more.txt").write_text("more"), ["more.txt: is not part of the artifact"]),
        (resaid, ["dgq.json: its SHA-256 of itself is wrong; it was changed or damaged"]),
    ],
    ids=["none", "a bit", "missing", "too many", "dgq.json"],
)
def test_a_change_is_named(change: Callable[[Path], object], expected: list[str], artifact: Path) -> None:
    change(artifact)
    assert problems(artifact) == expected
