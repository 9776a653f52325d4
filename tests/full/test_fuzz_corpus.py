"""What tests/tools/fuzz.py broke dgq with, kept: each ends at once in one line that names the file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from commands import error_of
from micro import write_micro

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.quant.files.hf_dir import MAX_JSON

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


@pytest.mark.parametrize("name", ("\x1b[31mred", "\ud800", "a\nb", "\x9b2J"))
def test_a_recipe_and_a_dgq_json_that_hold_control_codes(name: str, source: Path, tmp_path: Path) -> None:
    """They end in the page of `plan` and `inspect`, which a terminal reads, or in a line of JSON."""
    shown, artifact = ascii(name)[1:-1], tmp_path / "artifact"
    recipe = (Path(__file__).parents[2] / "recipes" / "nvfp4-w4a16.toml").read_text()
    text = recipe.replace('description = "', f"description = {json.dumps(name)[:-1]}", 1)
    if name != "\ud800":  # TOML has none
        (tmp_path / "mine.toml").write_text(text)
        page = printed("plan", str(source), "--to", "nvfp4", "--recipe", str(tmp_path / "mine.toml"), "--no-probe")
        assert f"({shown}" in page
    printed("convert", str(source), "--to", "nvfp4", "--recipe", "nvfp4-w4a16", "-o", str(artifact))
    document = json.loads((artifact / "dgq.json").read_text())
    (artifact / "dgq.json").write_text(json.dumps(document | {"recipe": name}))
    assert f"recipe {shown}, " in printed("inspect", str(artifact))
    assert json.loads(printed("inspect", str(artifact), "--json"))["provenance"]["recipe"] == name


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    return result.stdout


@pytest.mark.parametrize("label", ("../../outside", "/x", "x/../../../y", "", ".." * 40, "\x1b[31m", "a b", "a\n"))
def test_a_recipe_whose_label_is_no_part_of_a_file_name(label: str, source: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "q4_k_m.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('label = "Q4_K_M"', f"label = {json.dumps(label)}"))
    assert "mine.toml: label: " in error_of(
        "plan", str(source), "--to", "gguf", "--recipe", str(tmp_path / "mine.toml")
    )


def test_bf16_in_a_gguf(source: Path, tmp_path: Path) -> None:
    """The plan looked for the source's dtype under the artifact's name."""
    (tmp_path / "mine.toml").write_text(
        'name = "plain"\nformat = "gguf"\nlabel = "BF16"\ndescription = ""\nmax_16bit_share = 1\n'
        '[[rule]]\nmatch = "*"\nscheme = "bf16"\n'
    )
    recipe = ("--to", "gguf", "--recipe", str(tmp_path / "mine.toml"))
    printed("plan", str(source), *recipe, "--no-probe")
    printed("convert", str(source), *recipe, "-o", str(tmp_path / "out"))
    printed("verify", str(tmp_path / "out"))


def test_a_type_that_nobody_decodes_in_a_gguf(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "im.gguf", "imatrix")
    writer.add_tensor("x", np.zeros((2, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(tmp_path / "im.gguf")
    assert reader.shape("x") == (2, 128)
    with pytest.raises(InputError, match="x has ggml type Q1_0, which neither dgq nor gguf-py decodes"):
        reader["x"]
