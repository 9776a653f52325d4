"""A GGUF in several files, as gguf-split and gguf-py cut them: opened by the first, the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from click.testing import CliRunner
from commands import error_of

from dgq.convert.cli.__main__ import main
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.files.artifact import open_artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, converted: Callable[[str, str], Path]) -> tuple[Path, list[Path]]:
    """tiny as one file, and as gguf-py's writer cuts it, in a directory with the same config and tokenizer."""
    folder = converted("q4_k_m", "stock")
    whole, parts = folder / "tiny-Q4_K_M.gguf", shutil.copytree(folder, tmp_path_factory.mktemp("split") / "parts")
    (parts / whole.name).unlink()
    (parts / "dgq.json").unlink()
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(parts / "tiny.gguf", "diffusion-gemma", split_max_tensors=60)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return whole, sorted(parts.glob("tiny-*.gguf"))


def test_same_weights_from_the_directory_and_the_first_part(made: tuple[Path, list[Path]]) -> None:
    whole, parts = made
    assert len(parts) > 2 and parts[0].name.startswith("tiny-00001-of-0000")
    before = open_artifact(whole).weights
    for path in (parts[0], parts[0].parent):
        after = open_artifact(path).weights
        assert set(before) == set(after) and [file for file in after.files if "mmproj" not in file.name] == parts
        assert all(torch.equal(before[name].parts[""], after[name].parts[""]) for name in before)
    for command in (["inspect"], ["run", "Sort: b a", "--steps", "1"]):
        done = CliRunner().invoke(main, [command[0], str(parts[0].parent), *command[1:]])
        assert done.exit_code == 0, done.output


def test_parts_that_do_not_belong_together(made: tuple[Path, list[Path]], tmp_path: Path) -> None:
    first, second, third = (shutil.copyfile(part, tmp_path / part.name) for part in made[1][:3])
    for part in made[1][3:]:
        shutil.copyfile(part, tmp_path / part.name)
    count = len(made[1])
    assert len(GGUFReader(first)) == len(GGUFReader(made[0]))
    assert f"is part 2 of {count}; name the first, {first.name}" in error_of("inspect", str(second))
    shutil.copyfile(first, tmp_path / "renamed.gguf")
    assert "give it its name back" in error_of("inspect", str(tmp_path / "renamed.gguf"))
    shutil.copyfile(third, second)
    assert f"{second.name}: is not part 2 of {count}" in error_of("inspect", str(first))
    second.unlink()
    assert f"{second.name}: no such file" in error_of("inspect", str(first))
