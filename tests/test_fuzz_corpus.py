"""What tests/fuzz.py broke dgq with, kept: each ends in one line that names the file, at once, in little memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from micro import write_micro
from test_bad_input import error_of

from dgq.quant.hf_dir import MAX_JSON

SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", INDEX)


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """A hang fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took 5 seconds"))
    signal.alarm(5)
    yield
    signal.alarm(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_micro(tmp_path / "micro")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def hole(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(3 << 30)


def loop(file: Path) -> None:
    file.symlink_to(file.name)


def folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("change", (pipe, device, hole, loop, folder))
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_no_file_or_has_no_end(name: str, change: Callable[[Path], None], source: Path) -> None:
    (source / name).unlink()
    change(source / name)
    for command in (("plan", str(source), "--to", "gguf"), ("inspect", str(source))):
        line = error_of(*command)
        assert str(source) in line and (name in line or name == INDEX)


@pytest.mark.parametrize("change", (pipe, device, loop, folder))
def test_shards_that_are_no_files(change: Callable[[Path], None], source: Path) -> None:
    (source / SHARD).unlink()
    change(source / SHARD)
    assert SHARD in error_of("plan", str(source), "--to", "gguf")


@pytest.mark.parametrize("change", (pipe, device, hole, loop, folder))
def test_recipes_that_are_no_files(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    change(tmp_path / "mine.toml")
    line = error_of("plan", str(source), "--to", "gguf", "--recipe", str(tmp_path / "mine.toml"))
    assert "mine.toml" in line


def test_a_recipe_nested_without_end(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("name = " + "[" * 100_000)
    line = error_of("plan", str(source), "--to", "gguf", "--recipe", str(tmp_path / "mine.toml"))
    assert "mine.toml: not readable as TOML" in line


def test_json_of_the_longest_is_read(source: Path) -> None:
    file = source / "config.json"
    file.write_bytes(file.read_bytes().ljust(MAX_JSON + 1))
    assert f"{MAX_JSON + 1} bytes" in error_of("plan", str(source), "--to", "gguf")


@pytest.mark.parametrize("name", ("\x07", "\x1b[2J", "\x7f", "\0", "\x9b2J"))
def test_names_of_control_codes(name: str, source: Path) -> None:
    """A terminal must not do what a checkpoint tells it."""
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][f"a{name}b"] = SHARD
    (source / INDEX).write_text(json.dumps(index))
    assert error_of("inspect", str(source)).isprintable()
