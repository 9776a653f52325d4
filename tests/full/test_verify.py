"""`dgq verify` notices everything that is not as dgq wrote it: a bit in any file, a file too many or too few, experts
that changed places, a dgq.json that lies. One line each, and never a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kinds import write_kinds

import dgq.convert.verification.files as checking
import dgq.convert.write.artifact_files as artifact_files
from dgq.convert.cli.__main__ import main
from dgq.convert.source.hashes import describe
from dgq.convert.write import provenance
from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.quant.files.hf_dir import read_header
from dgq.quant.files.hf_writer import shards

RECIPES = {
    "nvfp4": ("--to", "nvfp4", "--input-scale", "0.01"),
    "nvfp4-w4a16": ("--to", "nvfp4", "--recipe", "nvfp4-w4a16"),
    "nvfp4-all": ("--to", "nvfp4", "--recipe", "nvfp4-all"),
    "bnb4": ("--to", "bnb4"),
    "bnb4-dq": ("--to", "bnb4", "--recipe", "bnb4-dq"),
    "q4_k_m": ("--to", "gguf"),
}
SEAL = "its SHA-256 of itself is wrong"
EXPERTS = 4


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of each recipe, safetensors in several files. Not to be changed, or put back."""
    root = tmp_path_factory.mktemp("verify")
    source = write_kinds(root / "kinds", ("normal", "outliers", "heavy-tailed", "ties"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact_files, "shards", partial(shards, limit=250_000))
        for recipe, how in RECIPES.items():
            result = CliRunner().invoke(main, ["convert", str(source), *how, "-o", str(root / recipe)])
            assert result.exit_code == 0, result.output
    yield root


@pytest.fixture(params=RECIPES)
def artifact(artifacts: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    path = shutil.copytree(artifacts / str(request.param), tmp_path / str(request.param))
    assert problems(path) == []
    return path


@pytest.fixture
def copy(artifacts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifacts / "nvfp4-w4a16", tmp_path / "copy")


def problems(path: Path) -> list[str]:
    checked = checking.check_files(path, 1, lambda n, name: None)
    assert checked.ok == (not checked.problems)
    return list(checked.problems)


def command(path: Path, *more: str) -> Result:
    """The command: exit code 1 and problems, or 2 and one line; nothing else."""
    result = CliRunner().invoke(main, ["verify", str(path), *more])
    assert isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code == 2:
        assert result.stdout == "" and result.stderr.startswith("dgq: error: ") and result.stderr.count("\n") == 1
    elif result.exit_code == 1:
        assert more or result.stderr
    else:
        assert result.exit_code == 0 and result.stderr == ""
    return result


def noticed(path: Path) -> bool:
    try:
        return bool(problems(path))
    except InputError:
        return True


def flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))


# --- bits -------------------------------------------------------------------------------------------------------------


def header_length(file: Path) -> int:
    if file.suffix == ".safetensors":
        return 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return min(tensor.start for tensor in GGUFReader(file)._tensors.values())


def test_a_bit_in_any_file(artifact: Path) -> None:
    """The first and last byte, some between; in a header, at its end and right behind it. One problem, by file; but a
    file that dgq.json names otherwise is missing under one name and too much under the other."""
    rng = random.Random(7)
    for file in sorted(artifact.iterdir()):
        size = file.stat().st_size
        places = {0, size - 1, *(rng.randrange(size) for _ in range(6))}
        if file.suffix in (".safetensors", ".gguf"):
            length = header_length(file)
            places |= {8, length // 2, length - 1, length, length + 1}
        for at in sorted(places):
            bit = rng.randrange(8)
            flip(file, at, bit)
            try:
                found = problems(artifact)
                assert file.name in found[0], (file, at, bit, found)
                assert len(found) == 1 or file.name == provenance.FILE, "a hash in it may have been hit"
            except InputError as error:
                assert file.name == provenance.FILE, error
            flip(file, at, bit)


def test_a_bit_in_padding(artifacts: Path) -> None:
    """GGUF leaves zeros between tensors, which no reader looks at."""
    file = next((artifacts / "q4_k_m").glob("*.gguf"))
    tensors = sorted(GGUFReader(file)._tensors.values(), key=lambda tensor: tensor.start)
    gaps = [a.stop for a, b in pairwise(tensors) if a.stop < b.start]
    assert gaps
    flip(file, gaps[0], 0)
    assert noticed(artifacts / "q4_k_m")
    flip(file, gaps[0], 0)
    assert not noticed(artifacts / "q4_k_m")


def test_a_bit_in_any_byte_of_dgq_json(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte, one bit each. The other files are whole, and so are not read again."""
    monkeypatch.setattr(checking, "_differs", lambda file, said, links: [])
    for recipe, step in (("q4_k_m", 1), ("nvfp4", 11), ("bnb4-dq", 11)):
        file = artifacts / recipe / provenance.FILE
        whole = file.read_bytes()
        for at in range(0, len(whole), step):
            broken = bytearray(whole)
            broken[at] ^= 1 << at % 8
            file.write_bytes(broken)
            assert noticed(artifacts / recipe), (at, bytes(broken[at - 20 : at + 20]))
        file.write_bytes(whole)
        assert not noticed(artifacts / recipe)


@pytest.mark.parametrize(
    "change",
    (
        lambda data: data + b"\n",
        lambda data: data[:-1],
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.decode().encode("utf-16"),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.replace(b'"dgq": ', b'"dgq": "9", "dgq": ', 1),
        lambda data: provenance.text({"sha256": ""} | json.loads(data)).encode(),
        lambda data: json.dumps(dict(sorted(json.loads(data).items())), indent=1).encode() + b"\n",
    ),
)
def test_dgq_json_in_other_words(change: Callable[[bytes], bytes], copy: Path) -> None:
    """The same content, written otherwise."""
    file = copy / provenance.FILE
    file.write_bytes(change(file.read_bytes()))
    assert command(copy).exit_code in (1, 2)


# --- experts ----------------------------------------------------------------------------------------------------------


def expert_spans(path: Path) -> tuple[Path, tuple[int, int], tuple[int, int]]:
    """Where in a file two experts' weights lie: bytes of the same number."""
    for file in sorted(path.glob("*.gguf")):
        tensor = GGUFReader(file)._tensors["blk.1.ffn_down_exps.weight"]
        step = (tensor.stop - tensor.start) // EXPERTS
        return file, (tensor.start, tensor.start + step), (tensor.start + 2 * step, tensor.start + 3 * step)
    for file in sorted(path.glob("*.safetensors")):
        specs = read_header(file)
        one, two = (f"model.decoder.layers.1.experts.{i}.down_proj.weight" for i in (0, 2))
        if one in specs and two in specs:
            return file, (specs[one].start, specs[one].stop), (specs[two].start, specs[two].stop)
        if (packed := specs.get("model.decoder.layers.1.experts.down_proj")) is not None:
            step = (packed.stop - packed.start) // EXPERTS
            return file, (packed.start, packed.start + step), (packed.start + 2 * step, packed.start + 3 * step)
    raise AssertionError("no experts")


def test_two_experts_that_changed_places(artifact: Path) -> None:
    file, one, two = expert_spans(artifact)
    whole = file.read_bytes()
    swapped = bytearray(whole)
    swapped[slice(*one)], swapped[slice(*two)] = whole[slice(*two)], whole[slice(*one)]
    assert swapped != whole and len(swapped) == len(whole) and one[1] - one[0] > 1000
    file.write_bytes(swapped)
    assert CliRunner().invoke(main, ["inspect", str(artifact)]).exit_code == 0, "headers are fine"
    result = command(artifact)
    assert result.exit_code == 1 and f"{file}: its SHA-256 is not dgq.json's" in result.stderr
    file.write_bytes(whole)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_removed_added_renamed(artifact: Path) -> None:
    for file in sorted(artifact.iterdir()):
        whole = file.read_bytes()
        file.unlink()
        result = command(artifact)
        expected = ("no such file", 2) if file.name == provenance.FILE else ("is missing", 1)
        assert (f"{file}: {expected[0]}" in result.stderr, result.exit_code) == (True, expected[1])
        other = file.with_name(f"x{file.name}")
        other.write_bytes(whole)
        if file.name != provenance.FILE:
            assert problems(artifact) == [f"{file}: is missing", f"{other}: is not part of the artifact"]
        file.write_bytes(whole)
        assert problems(artifact) == [f"{other}: is not part of the artifact"]
        other.unlink()
    for name in (".hidden", "model.safetensors.index.json.bak", "[b]", "more"):
        (artifact / name).mkdir() if name == "more" else (artifact / name).write_text("")
        assert problems(artifact) == [f"{artifact / name}: is not part of the artifact"]
        (artifact / name).rmdir() if name == "more" else (artifact / name).unlink()


def test_two_files_that_changed_names(artifacts: Path) -> None:
    one, two = sorted((artifacts / "nvfp4").glob("*.safetensors"))[:2]
    for _ in range(2):
        one.rename(one.with_name("x"))
        two.rename(one)
        one.with_name("x").rename(two)
        assert noticed(artifacts / "nvfp4") == (_ == 0)


def test_what_is_no_plain_file(artifact: Path) -> None:
    """A link, to the very bytes even; a directory; a pipe, which must not be waited for."""
    for file in sorted(artifact.iterdir()):
        aside = file.parent.parent / "aside"
        file.rename(aside)
        for make in (
            lambda file: file.symlink_to(aside),  # noqa: B023
            lambda file: file.symlink_to("nowhere"),
            lambda file: file.symlink_to(file.name),
            Path.mkdir,
            os.mkfifo,
        ):
            make(file)
            result = command(artifact)
            assert result.exit_code == (2 if file.name == provenance.FILE else 1), result.stderr
            assert f"{file}: is no plain file" in result.stderr
            file.rmdir() if file.is_dir() else file.unlink()
        aside.rename(file)


def test_names_that_no_terminal_should_see(copy: Path) -> None:
    for name in ("two\nlines", "\x1b[2J", os.fsdecode(b"latin\xe9"), "\u202ereversed"):
        (copy / name).write_text("")
    for more in ((), ("--json",)):
        result = command(copy, *more)
        assert result.exit_code == 1 and "\x1b" not in result.output and "\u202e" not in result.output
    assert len(problems(copy)) == 4 and not any("\n" in line for line in problems(copy))
    assert any("two lines: is not part" in line for line in problems(copy))


def test_a_file_that_is_cut_or_longer(artifact: Path) -> None:
    for file in sorted(artifact.iterdir()):
        whole = file.read_bytes()
        for other in (b"", whole[:-1], whole + b"\0"):
            file.write_bytes(other)
            assert noticed(artifact), (file, len(other))
        file.write_bytes(whole)


# --- a dgq.json that lies, and knows its hash -------------------------------------------------------------------------


def tell(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what dgq.json says, and seal it again."""
    content = json.loads((path / provenance.FILE).read_text())
    del content["sha256"]
    change(content)
    (path / provenance.FILE).write_text(provenance.text(provenance.sealed(content)))


def a_file(**said: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["files"]["config.json"].update(said)


def file_named(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["files"].__setitem__(name, {"bytes": 0, "sha256": "0" * 64})


def key(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.__setitem__(name, value)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


KEYS = ("files", "tensors", "params", "quantized_params")
VALUES: tuple[Any, ...] = (None, [], {}, "x", 10**400, -1, 1.5, float("nan"), float("inf"))
LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda content: content.clear(),
    **{f"no {name}": without(name) for name in KEYS},
    **{f"{name} {value!r}"[:60]: key(name, value) for name in KEYS for value in VALUES},
    "a file of no description": lambda content: content["files"].__setitem__("config.json", None),
    "a file of another description": lambda content: content["files"].__setitem__("config.json", "sha"),
    "bytes missing": lambda content: content["files"]["config.json"].pop("bytes"),
    "bytes true": a_file(bytes=True),
    "bytes a text": a_file(bytes="12"),
    "bytes a float": a_file(bytes=12.0),
    "bytes negative": a_file(bytes=-1),
    "bytes huge": a_file(bytes=10**400),
    "hash missing": lambda content: content["files"]["config.json"].pop("sha256"),
    "hash a number": a_file(sha256=5),
    "hash of something else": a_file(sha256="0" * 64),
    "hash half a surrogate": a_file(sha256="\ud800"),
    **{
        f"file {name!r}"[:60]: file_named(name)
        for name in (
            "", ".", "..", "a/b", "../kinds/config.json", "/etc/passwd", "dgq.json", "x" * 5000, "a\0b", "a\nb",
            "\ud800",
        )
    },
    "a tensor of another scheme": lambda content: content["tensors"].__setitem__(next(iter(content["tensors"])), "q9"),
    "a tensor of no scheme": lambda content: content["tensors"].__setitem__(next(iter(content["tensors"])), ["bf16"]),
    "a tensor too few": lambda content: content["tensors"].popitem(),
    "a tensor too many": lambda content: content["tensors"].__setitem__("more", "bf16"),
    "nested": key("notices", nested(200)),
}  # fmt: skip
HARMLESS = {"nested"}  # what verify has no opinion of


@pytest.mark.parametrize("case", LIES)
def test_a_dgq_json_that_lies(case: str, copy: Path) -> None:
    tell(copy, LIES[case])
    expected = (0,) if case in HARMLESS else (1, 2)
    for more in ((), ("--json",)):
        assert command(copy, *more).exit_code in expected


def test_nesting_that_is_read_and_not_written(copy: Path) -> None:
    """Python's JSON decoder goes deeper than its encoder."""
    file = copy / provenance.FILE
    said = provenance.text(json.loads(file.read_text()) | {"notices": "HERE"})
    for depth in (*range(880, 1000), 5000, 100_000):
        file.write_text(said.replace('"HERE"', "[" * depth + "]" * depth))
        assert command(copy).exit_code in (1, 2)


def test_lies_are_sealed_well(copy: Path) -> None:
    """The check of the checks above: a change that means nothing is believed, so the seal is right."""
    tell(copy, key("notices", ["hello", "語", "\ud800", 10**400]))
    assert problems(copy) == [] and command(copy).exit_code == 0


@pytest.mark.parametrize("text", ("", "[]", "5", "null", "{", '{"files": {}}', "[" * 100_000, '{"a":' * 50_000, "\0"))
def test_a_dgq_json_that_is_none(text: str, copy: Path) -> None:
    (copy / provenance.FILE).write_text(text)
    assert command(copy).exit_code in (1, 2)


def test_another_artifacts_dgq_json(artifacts: Path, copy: Path) -> None:
    shutil.copyfile(artifacts / "bnb4" / provenance.FILE, copy / provenance.FILE)
    assert command(copy).exit_code == 1


def test_files_that_agree_with_each_other_and_open_as_nothing(copy: Path) -> None:
    """A broken index with the right hash: what opens it says what is wrong."""
    file = copy / "config.json"
    file.write_text("{}")
    tell(copy, lambda content: content["files"].__setitem__("config.json", describe(file)))
    result = command(copy)
    assert result.exit_code == 1 and SEAL not in result.stderr and "config.json" in result.stderr


# --- the command ------------------------------------------------------------------------------------------------------


def test_exit_codes_and_pages(artifact: Path, tmp_path: Path) -> None:
    whole = command(artifact)
    assert whole.exit_code == 0 and "every byte is what dgq.json says" in whole.stdout
    size = sum(file.stat().st_size for file in artifact.iterdir())
    found = json.loads(command(artifact, "--json").stdout)
    assert found == {"ok": True, "problems": [], "files": len(list(artifact.iterdir())), "bytes": size}
    config = (artifact / "config.json").read_bytes()
    (artifact / "config.json").write_bytes(config + b" ")
    broken = command(artifact)
    assert broken.exit_code == 1 and broken.stdout == f"{artifact}: 1 problems\n"
    assert broken.stderr == f"{artifact}/config.json: has {len(config) + 1} bytes, dgq.json says {len(config)}\n"
    assert json.loads(command(artifact, "--json").stdout)["problems"] == broken.stderr.splitlines()
    (artifact / "config.json").write_bytes(config)
    for nothing in (tmp_path / "nothing", tmp_path, artifact / "config.json"):
        assert command(nothing).exit_code == 2


def test_threads_change_nothing(artifacts: Path) -> None:
    for threads in ("1", "7"):
        assert command(artifacts / "bnb4", "--threads", threads).exit_code == 0


def test_from_a_shell(artifacts: Path, copy: Path) -> None:
    """The real process: its exit code is that of the check."""
    flip(copy / "tokenizer.json", 100, 3)
    for path, code in ((artifacts / "bnb4", 0), (copy, 1)):
        done = subprocess.run([sys.executable, "-m", "dgq.convert.cli", "verify", str(path)], capture_output=True)
        assert done.returncode == code and b"Traceback" not in done.stderr
