"""Conversions that end early go on, and the artifact is the one an uninterrupted conversion writes, byte for byte.

A run is stopped by what is patched into it: a disk that fills, SIGKILL before or after a chosen call (in a forked
child), a failing fsync. Every weight is journalled, and safetensors come in several files. tests/tools/faults.py does
the same from outside, with the clock.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from commands import error_of, tree
from forked import Child
from kinds import write_kinds
from test_bad_input import edit_tensors
from test_odd_input import write_imatrix

import dgq.convert.resume.journal as journal
import dgq.convert.write.artifact_files as artifact_files
import dgq.convert.write.pipeline as pipeline
import dgq.convert.write.slices as slices
from dgq.convert.cli.__main__ import main
from dgq.convert.cli.terminal import console
from dgq.convert.source import hashes
from dgq.convert.verification.files import check_files
from dgq.convert.write import provenance
from dgq.quant.errors import InputError
from dgq.quant.files.hf_writer import shards
from dgq.quant.files.places import Places
from dgq.quant.types import Packed

RECIPES = {
    "nvfp4": ("--to", "nvfp4", "--input-scale", "0.01"),
    "calibrated": ("--to", "nvfp4"),
    "nvfp4-w4a16": ("--to", "nvfp4", "--recipe", "nvfp4-w4a16"),
    "bnb4": ("--to", "bnb4"),
    "bnb4-dq": ("--to", "bnb4", "--recipe", "bnb4-dq"),
    "q4_k_m": ("--to", "gguf"),
}
KINDS = ("normal", "outliers", "constant", "ties")
SHARD = 250_000  # bytes
WEIGHTS = "model-00001-of-00002.safetensors"  # of the source
Contents = dict[str, bytes]


@pytest.fixture(autouse=True, scope="module")
def _every_weight_is_journalled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SYNC_SECONDS", 0.0)
        patch.setattr(os, "fsync", lambda file: None)  # no power is cut here, and syncing every weight takes its time
        patch.setattr(artifact_files, "shards", functools.partial(shards, limit=SHARD))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kinds(tmp_path_factory.mktemp("resume") / "kinds", KINDS)


@pytest.fixture(scope="module")
def whole(source: Path) -> Callable[[str], Contents]:
    """Every file of an uninterrupted conversion, by recipe."""

    @functools.cache
    def files(recipe: str) -> Contents:
        out = source.parent / f"whole {recipe}"
        assert convert(source, out, recipe).exit_code == 0
        return contents(out)

    return files


def arguments(source: Path, out: Path, recipe: str, *more: str) -> list[str]:
    return ["convert", str(source), *RECIPES[recipe], "-o", str(out), "--device", "cpu", "--threads", "2", *more]


def convert(source: Path, out: Path, recipe: str, *more: str) -> Result:
    result = CliRunner().invoke(main, arguments(source, out, recipe, *more))
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def contents(path: Path) -> Contents:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def finished(out: Path, expected: Contents) -> None:
    """The artifact, the same in every file, and nothing beside it."""
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not any(path.exists() for path in journal.paths(out))


def name_of(file: int) -> str:
    """The path of an open file."""
    return str(Path(f"/proc/self/fd/{file}").readlink())


def facts(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line[9:]) for line in journal.paths(out)[1].read_text().splitlines()]


def done(out: Path) -> set[str]:
    """Weights that the journal says are done."""
    return {name for fact in facts(out) for name in fact.get("done", ())}


def goes_on(source: Path, out: Path, recipe: str, expected: Contents, *more: str) -> None:
    """The command again: it says how much was done, does the rest and no more (nor calibrates), and the artifact is
    right."""
    before, worked = done(out), set[str]()
    with pytest.MonkeyPatch.context() as patch:
        run = slices.Slice.run

        def running(job: slices.Slice) -> Packed:
            worked.add(job.tensor.name)
            return run(job)

        patch.setattr(slices.Slice, "run", running)
        patch.setattr("dgq.convert.write.input_scales.input_scales", None)
        result = convert(source, out, recipe, "--json", *more)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["resumed_weights"] == len(before)
    assert before or "going on" not in result.stderr
    said = f"going on with {journal.paths(out)[0]}: {len(before)} of {len(answer['tensors'])} weights are done"
    assert not before or said in result.stderr
    assert worked == answer["tensors"].keys() - before
    finished(out, expected)


# --- ways to stop it --------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files take so many bytes more."""
    pwrite = os.pwrite

    def until_full(file: int, data: memoryview, at: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = pwrite(file, data[:room], at)
        room -= written
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", until_full)
        yield


def stopped(source: Path, out: Path, recipe: str, share: float = 0.5, *more: str) -> Path:
    """An unfinished conversion: the disk was full after this share of the bytes."""
    planned = json.loads(CliRunner().invoke(main, ["plan", *arguments(source, out, recipe)[1:4], "--json"]).stdout)
    with full_disk(int(share * planned["bytes"])):
        line = error_of(*arguments(source, out, recipe, *more))
    assert "No space left on device" in line and "the same command goes on" in line
    assert done(out) and not out.exists()
    return out


def before_call(owner: Any, name: str, number: int, act: Callable[[], object], after: bool = False) -> None:
    """Patch a function so that its call of this number acts first, or, if `after`, last. For a forked child."""
    stock, calls = getattr(owner, name), 0

    def patched(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            act()
        result = stock(*given, **named)
        if calls == number and after:
            act()
        return result

    setattr(owner, name, patched)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process: its exit code, or minus its signal. 0 if the work came to its end."""
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(source: Path, out: Path, recipe: str, owner: Any, name: str, number: int = 1, after: bool = False) -> bool:
    """Convert in a child that SIGKILLs itself at a call; False if that call does not come."""

    def work() -> None:
        before_call(owner, name, number, lambda: os.kill(os.getpid(), signal.SIGKILL), after)
        assert convert(source, out, recipe).exit_code == 0

    code = in_child(work)
    assert code in (0, -signal.SIGKILL), code
    return code == -signal.SIGKILL


def count_calls(source: Path, out: Path, recipe: str, name: str) -> int:
    calls, stock = 0, getattr(os, name)

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return stock(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, counted)
        assert convert(source, out, recipe).exit_code == 0
    shutil.rmtree(out)
    return calls


# --- it goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_disk_that_fills(recipe: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    before = tree(tmp_path)
    size = sum(map(len, (data for name, data in whole(recipe).items() if name.endswith(("safetensors", "gguf")))))
    kept = []
    for room in (0, 1000, size // 3, 2 * size // 3, size - 2000):
        out = tmp_path / "new" / "out"
        with full_disk(room):
            line = error_of(*arguments(source, out, recipe))
        assert "out: cannot be written ([Errno 28] No space left on device)" in line
        kept.append(len(done(out)) if "the same command goes on" in line else 0)
        if kept[-1]:
            goes_on(source, out, recipe, whole(recipe))
            shutil.rmtree(tmp_path / "new")
        elif recipe == "calibrated":
            assert facts(out)[-1].keys() == {"scales"}  # worth keeping: they take long
            assert convert(source, out, recipe).exit_code == 0
            finished(out, whole(recipe))
            shutil.rmtree(tmp_path / "new")
        assert tree(tmp_path) == before
    assert kept[0] == 0 and kept == sorted(kept) and kept[2] < kept[3] < kept[4], kept


def test_what_was_not_synced_yet(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """An end that dgq notices keeps everything that is whole, however short ago it was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SYNC_SECONDS", 1000.0)
        out = stopped(source, tmp_path / "out", "bnb4", 0.8)
    assert len(done(out)) > 20
    goes_on(source, out, "bnb4", whole("bnb4"))


def test_room_that_a_conversion_needs_to_go_on(
    source: Path, tmp_path: Path, whole: Callable[[str], Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has its place on the disk already, done or not, is not asked for again."""
    expected = whole("bnb4")  # before the disk has room for no other
    out = stopped(source, tmp_path / "out", "bnb4", 0.9)
    planned = json.loads(CliRunner().invoke(main, ["plan", str(source), *RECIPES["bnb4"], "--json"]).stdout)
    taken = sum(512 * file.stat().st_blocks for file in journal.paths(out)[0].iterdir())
    need = pipeline.HEADER_ALLOWANCE + planned["bytes"] - taken
    assert taken > 0.8 * planned["bytes"]
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(need, 0, need - 1))
        assert "GiB are free" in error_of(*arguments(source, out, "bnb4"))
        assert contents(tmp_path) == before
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(need, 0, need))
        goes_on(source, out, "bnb4", expected)


def test_bad_input_leaves_nothing_however_much_was_done(source: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(source, tmp_path / "kinds")
    edit_tensors(mine / WEIGHTS, lambda tensors: next(reversed(tensors.values())).fill_(float("nan")))
    before, out = tree(tmp_path), tmp_path / "out"
    assert f"{WEIGHTS}: " in error_of(*arguments(mine, out, "nvfp4-w4a16"))
    assert tree(tmp_path) == before
    stopped(mine, out, "nvfp4-w4a16", 0.4)
    assert f"{WEIGHTS}: " in error_of(*arguments(mine, out, "nvfp4-w4a16"))
    assert tree(tmp_path) == before


def test_nobody_waits_for_hashes_of_what_failed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing the 26B takes minutes; of a stopped conversion only files already begun are hashed."""
    begun, go = list[Path](), threading.Event()

    def hashing(path: Path) -> str:
        begun.append(path)
        go.wait(5)
        return ""

    monkeypatch.setattr(hashes, "sha256", hashing)
    monkeypatch.setattr(pipeline, "HASHERS", 1)
    shutdown = ThreadPoolExecutor.shutdown

    def ending(pool: ThreadPoolExecutor, wait: bool = True, cancel_futures: bool = False) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        go.set()
        shutdown(pool)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", ending)
    with full_disk(0):
        error_of(*arguments(source, tmp_path / "out", "bnb4"))
    assert len(begun) <= 1, "the first may have begun"


def test_a_disk_that_fills_again_and_again(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    out = stopped(source, tmp_path / "out", "nvfp4", 0.4)
    steps = [len(done(out))]
    while not out.exists():
        with full_disk(100_000):
            result = convert(source, out, "nvfp4")
        steps += [len(done(out))] if result.exit_code else []
    assert len(steps) > 4 and steps == sorted(set(steps)), steps
    finished(out, whole("nvfp4"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_sigkill(recipe: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """At two writes, the second time while it goes on from the first. One file and several are killed at every moment,
    the recipes that are like them at one."""
    out = tmp_path / "out"
    writes = count_calls(source, out, recipe, "pwrite")
    moments = ((writes // 4, writes // 3), (writes // 2, writes // 4), (writes - 1, 0))
    for first, second in moments if recipe in ("calibrated", "q4_k_m") else moments[:1]:
        assert killed(source, out, recipe, os, "pwrite", first)
        some = done(out)
        assert some and not out.exists()
        if second:
            assert killed(source, out, recipe, os, "pwrite", second)
            assert done(out) > some and not out.exists()
        goes_on(source, out, recipe, whole(recipe))
        shutil.rmtree(out)


MOMENTS: tuple[tuple[Any, str, int, bool], ...] = (
    (fcntl, "flock", 1, True),
    (Path, "mkdir", 1, True),
    (Path, "mkdir", 2, True),
    (Places, "open", 1, True),  # of several files
    (Places, "open", 2, False),
    (journal.Journal, "note", 1, False),
    (journal.Journal, "note", 1, True),
    (journal.Journal, "note", 9, True),
    (os, "fsync", 11, False),
    (Places, "close", 1, False),
    (Places, "close", 1, True),
    (shutil, "copyfile", 3, False),
    (provenance, "document", 1, False),
    (provenance, "text", 2, True),
    (Path, "write_text", 1, True),
    (Path, "chmod", 1, False),
    (Path, "rename", 1, False),
)


@pytest.mark.parametrize("recipe", ("calibrated", "q4_k_m"))
def test_sigkill_at_every_stage(recipe: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """From the lock to the moment before the rename, from nothing and once more; then a write."""
    for owner, name, number, after in MOMENTS:
        out = tmp_path / "out"
        came = killed(source, out, recipe, owner, name, number, after)
        assert came or name in ("open", "mkdir"), (name, number)
        if came:
            killed(source, out, recipe, owner, name, 1, after)
            assert not out.exists() or (name, after) == ("mkdir", True)
        if not out.exists():
            assert convert(source, out, recipe).exit_code == 0
        finished(out, whole(recipe))
        shutil.rmtree(out)


@pytest.mark.parametrize("recipe", ("bnb4", "q4_k_m"))
def test_sigkill_after_the_rename(recipe: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """The artifact is there; the journal that is left disturbs nobody."""
    out = tmp_path / "out"
    assert killed(source, out, recipe, Path, "rename", 1, after=True)
    assert contents(out) == whole(recipe) and check_files(out, 1, lambda n, name: None).ok
    assert "exists already" in error_of(*arguments(source, out, recipe))
    shutil.rmtree(out)
    assert "going on" not in convert(source, out, recipe).stderr
    finished(out, whole(recipe))


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_a_signal_keeps_what_is_done(
    number: signal.Signals, source: Path, tmp_path: Path, whole: Callable[[str], Contents]
) -> None:
    recipe = {signal.SIGTERM: "q4_k_m", signal.SIGINT: "nvfp4", signal.SIGHUP: "bnb4"}[number]
    out = tmp_path / "out"

    def at_the_fifth() -> None:
        print("writing", flush=True)
        time.sleep(30)

    def work() -> None:
        before_call(journal.Journal, "flush", 5, at_the_fifth, after=True)
        main(arguments(source, out, recipe))

    child = Child(work)
    assert child.line() == "writing"
    child.kill(number)
    done_ = child.ended()
    assert done_.returncode == 128 + number
    lines = [line for line in done_.stderr.splitlines() if "copies of tied" not in line]
    assert lines[0] == f"note: {journal.paths(out)[0]} keeps what is done; the same command goes on from there"
    assert lines[1:] == (["dgq: interrupted"] if number == signal.SIGINT else [])
    assert len(done(out)) >= 5
    goes_on(source, out, recipe, whole(recipe))


def test_signals_one_after_the_other(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """Stopped cleanly while going on, again and again."""
    out, counts = tmp_path / "out", []
    codes = []
    while not out.exists():

        def work() -> None:
            before_call(os, "pwrite", 40, lambda: os.kill(os.getpid(), signal.SIGTERM), after=True)
            os._exit(convert(source, out, "nvfp4").exit_code)

        codes.append(in_child(work))
        counts += [len(done(out))] if codes[-1] else []
    assert codes == [128 + signal.SIGTERM] * (len(codes) - 1) + [0] and len(codes) > 4
    assert counts == sorted(set(counts))
    finished(out, whole("nvfp4"))


# --- the journal ------------------------------------------------------------------------------------------------------


def opened(out: Path, identity: dict[str, Any]) -> set[str]:
    with journal.opened(out, identity) as log:
        return set(log.done)


def lay(out: Path, data: bytes, files: dict[str, int]) -> None:
    """A journal, and partial files of these sizes."""
    partial, path = journal.paths(out)
    partial.mkdir(exist_ok=True)
    for name, size in files.items():
        with (partial / name).open("ab") as file:
            file.truncate(size)
    path.write_bytes(data)


def test_a_journal_cut_or_damaged_at_any_byte(source: Path, tmp_path: Path) -> None:
    """It tells of the whole lines before, no more and no less, and never of a weight that was not done."""
    out = stopped(source, tmp_path / "out", "q4_k_m", 0.35)
    path = journal.paths(out)[1]
    data, said = path.read_bytes(), facts(out)
    identity, files = said[0]["identity"], said[-1]["files"]
    lines = data.splitlines(keepends=True)
    assert len(lines) > 4
    for length in range(len(data) + 1):
        whole_lines = data[:length].count(b"\n")
        expected = {name for fact in said[:whole_lines] for name in fact.get("done", ())}
        lay(out, data[:length], files)
        assert opened(out, identity) == expected, length
        assert path.read_bytes() == (b"".join(lines[:whole_lines]) if whole_lines > 1 else b""), length
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        lay(out, bytes(broken), files)
        whole_lines = data[:at].count(b"\n")
        assert opened(out, identity) == {n for fact in said[:whole_lines] for n in fact.get("done", ())}, at


def cut(offset: int) -> Callable[[bytes], bytes]:
    """To so many bytes beyond the end of the middle line."""

    def change(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return data[: len(b"".join(lines[: len(lines) // 2])) + offset]

    return change


def wrong_checksum(data: bytes) -> bytes:
    at = data.index(b"\n", len(data) // 2) + 1
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "as it was": lambda data: data,
    "garbage behind": lambda data: data + os.urandom(300),
    "zeros behind": lambda data: data + bytes(4096),
    "a line without JSON behind": lambda data: data + b"00000000 \n",
    "half a line behind": lambda data: data + data.splitlines(keepends=True)[-1][:-5],
    "its last line twice": lambda data: data + data.splitlines(keepends=True)[-1],
    "one byte short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "cut at a line": cut(0),
    "cut before a line's end": cut(-1),
    "cut behind a line": cut(1),
    "a wrong checksum": wrong_checksum,
    "without its first line": lambda data: data[data.index(b"\n") + 1 :],
    "only its first line": lambda data: data[: data.index(b"\n") + 1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "garbage": lambda data: os.urandom(len(data)),
}


@pytest.mark.parametrize("case", JOURNALS)
def test_conversions_with_a_damaged_journal(
    case: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]
) -> None:
    recipe = ("bnb4", "q4_k_m")[list(JOURNALS).index(case) % 2]  # whose journals have one form
    out = stopped(source, tmp_path / "out", recipe)
    path = journal.paths(out)[1]
    path.write_bytes(JOURNALS[case](path.read_bytes()))
    assert convert(source, out, recipe).exit_code == 0
    finished(out, whole(recipe))


def data_files(out: Path) -> list[Path]:
    """Of an unfinished conversion, those with finished weights: not the empty ones at its end."""
    return sorted(journal.paths(out)[0].glob("*.*"))[:2]


def remove_all(out: Path) -> None:
    for file in journal.paths(out)[0].iterdir():
        file.unlink()


def replace_by_directory(out: Path) -> None:
    file = data_files(out)[0]
    file.unlink()
    file.mkdir()


PARTIALS: dict[str, Callable[[Path], object]] = {
    "no journal": lambda out: journal.paths(out)[1].unlink(),
    "no directory": lambda out: shutil.rmtree(journal.paths(out)[0]),
    "an empty directory": remove_all,
    "first file gone": lambda out: data_files(out)[0].unlink(),
    "last file gone": lambda out: data_files(out)[-1].unlink(),
    "first file empty": lambda out: os.truncate(data_files(out)[0], 0),
    "first file a byte short": lambda out: os.truncate(data_files(out)[0], data_files(out)[0].stat().st_size - 1),
    "last file half": lambda out: os.truncate(data_files(out)[-1], data_files(out)[-1].stat().st_size // 2),
    "last file longer": lambda out: os.truncate(data_files(out)[-1], data_files(out)[-1].stat().st_size + 5000),
    "a directory for a file": replace_by_directory,
    "an old dgq.json": lambda out: (journal.paths(out)[0] / "dgq.json").write_text("{}"),
    "a stray file": lambda out: (journal.paths(out)[0] / "model-00009-of-00009.safetensors").write_text("hi"),
    "half a config.json": lambda out: (journal.paths(out)[0] / "config.json").write_text('{"a'),
}
STRAY = ("an old dgq.json", "a stray file", "half a config.json")  # which cost no work


@pytest.mark.parametrize("case", PARTIALS)
def test_partial_files_that_are_not_what_the_journal_says(
    case: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents]
) -> None:
    """After a power cut, say. If it is killed once more, what was found out then must not be forgotten."""
    for recipe in ("nvfp4-w4a16", "q4_k_m"):
        out = stopped(source, tmp_path / "out", recipe)
        PARTIALS[case](out)
        if recipe == "q4_k_m" and case not in STRAY:
            killed(source, out, recipe, os, "pwrite", 5)
        if case in STRAY:
            goes_on(source, out, recipe, whole(recipe))
        assert out.exists() or convert(source, out, recipe).exit_code == 0
        finished(out, whole(recipe))
        shutil.rmtree(out)


@pytest.mark.parametrize(("recipe", "seconds"), (("calibrated", 0), ("q4_k_m", 0), ("bnb4", 1000)))
def test_the_order_of_syncs(
    recipe: str, seconds: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the journal says done, the bytes were synced; before the rename, every file was; its name before the
    journal goes."""
    out = tmp_path / "out"
    partial, path = journal.paths(out)
    fsync, rename, pwrite, unlink = os.fsync, Path.rename, os.pwrite, Path.unlink
    dirty: set[str] = set()
    synced: set[str] = set()
    append = Places.append
    checked = renamed = 0

    def appending(self: Places, name: str, tensor: Any) -> None:
        dirty.add(name)
        append(self, name, tensor)

    def writing(file: int, data: memoryview, at: int) -> int:
        synced.discard(name_of(file))
        return pwrite(file, data, at)

    def syncing(file: int) -> None:
        nonlocal checked
        name = name_of(file)
        if name == str(path):
            said = done(out)
            checked += len(said)
            unsafe = {entry for entry in dirty if entry in said or entry.rsplit(".", 1)[0] in said}
            assert not unsafe
        fsync(file)
        synced.add(name)
        if {str(file) for file in partial.glob("*.*")} <= synced:
            dirty.clear()

    def renaming(self: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += target == out
        assert check_files(self, 1, lambda n, name: None).ok
        assert {str(file) for file in partial.iterdir()} <= synced
        assert path.exists() and not out.exists()
        synced.clear()
        return rename(self, target)

    def unlinking(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            assert out.exists() and {str(out), str(out.parent)} <= synced
        unlink(self, missing_ok)

    for owner, name, patched in (
        (os, "fsync", syncing), (os, "pwrite", writing), (Places, "append", appending), (Path, "rename", renaming),
        (Path, "unlink", unlinking),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, patched)
    monkeypatch.setattr(journal, "SYNC_SECONDS", seconds)
    result = convert(source, out, recipe)
    assert result.exit_code == 0 and checked > 30 and renamed == 1, result.output


def test_bytes_that_a_failed_sync_lost(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """After fsync fails, the next one succeeds, though the bytes are gone (Linux): they are not called done."""
    out, pwrite, calls = tmp_path / "out", os.pwrite, 0
    unsafe: list[tuple[str, int, int]] = []

    def writing(file: int, data: memoryview, at: int) -> int:
        written = pwrite(file, data, at)
        unsafe.append((name_of(file), at, written))
        return written

    def failing(file: int) -> None:
        nonlocal calls
        name = name_of(file)
        lost = [place for place in unsafe if place[0] == name]
        unsafe[:] = [place for place in unsafe if place[0] != name]
        calls += ".partial/" in name and bool(lost)
        if calls == 12:
            calls += 1
            for _, at, size in lost:
                pwrite(file, memoryview(bytes(size)), at)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    for recipe in ("q4_k_m", "bnb4"):
        calls = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", writing)
            patch.setattr(os, "fsync", failing)
            assert "Input/output error" in error_of(*arguments(source, out, recipe))
        assert len(done(out)) >= 10
        goes_on(source, out, recipe, whole(recipe))
        shutil.rmtree(out)


def test_a_source_that_cannot_be_read_for_a_while(
    source: Path, tmp_path: Path, whole: Callable[[str], Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that is lost: one line, and what is done is kept."""
    preadv, calls = os.preadv, 0

    def lost(file: int, buffers: list[memoryview], at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lost)
        line = error_of(*arguments(source, tmp_path / "out", "bnb4"))
    assert "Input/output error" in line and "the same command goes on" in line
    goes_on(source, tmp_path / "out", "bnb4", whole("bnb4"))


# --- it refuses -------------------------------------------------------------------------------------------------------


def state(path: Path) -> dict[str, tuple[int, bytes]]:
    return {name: ((path / name).stat().st_mtime_ns, data) for name, data in contents(path).items()}


def refused(out: Path, *command: str) -> str:
    """The line; and that everything beside `out` is as it was."""
    before = state(out.parent)
    line = error_of(*command)
    assert "an unfinished conversion lies in" in line and "remove that directory" in line
    assert state(out.parent) == before
    return line


def test_another_conversion_into_the_same_place(
    source: Path, tmp_path: Path, whole: Callable[[str], Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(source, tmp_path / "out", "nvfp4")
    assert "its recipe was nvfp4 (" in refused(out, *arguments(source, out, "nvfp4-w4a16"))
    assert "its recipe was nvfp4 (" in refused(out, *arguments(source, out, "q4_k_m"))
    assert "its input scale was 0.01, not 0.02" in refused(out, *arguments(source, out, "nvfp4"), "--input-scale=0.02")
    assert "its input scale was 0.01, not calibrate" in refused(out, *arguments(source, out, "calibrated"))
    other = shutil.copytree(source, tmp_path / "other")
    assert "its source was kinds, not other" in refused(out, *arguments(other, out, "nvfp4"))
    same = shutil.copytree(source, tmp_path / "of the same name" / "kinds", copy_function=shutil.copyfile)
    assert " has changed since" in refused(out, *arguments(same, out, "nvfp4"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "dgq_version", lambda: "9.9.9")
        assert "its dgq version was 0.1.0, not 9.9.9" in refused(out, *arguments(source, out, "nvfp4"))
    recipe = tmp_path / "nvfp4.toml"
    stock = (Path(__file__).parents[2] / "recipes" / "nvfp4.toml").read_text()
    recipe.write_text(stock.replace("description = ", 'description = "mine" #'))
    assert "its recipe was nvfp4 (" in refused(out, *arguments(source, out, "nvfp4", "--recipe", str(recipe)))
    recipe.write_text(f"# the same but for a remark\n{stock}")
    goes_on(source, out, "nvfp4", whole("nvfp4"), "--recipe", str(recipe))


def test_another_imatrix(source: Path, tmp_path: Path) -> None:
    one, two = (write_imatrix(tmp_path / f"{name}.gguf", sums, 1, columns=128) for name, sums in (("a", 1), ("b", 2)))
    assert convert(source, tmp_path / "whole", "q4_k_m", "--imatrix", str(one)).exit_code == 0
    out = stopped(source, tmp_path / "out", "q4_k_m", 0.5, "--imatrix", str(one))
    assert "its imatrix was {'bytes'" in refused(out, *arguments(source, out, "q4_k_m"), "--effort", "stock")
    assert "its imatrix was {'bytes'" in refused(out, *arguments(source, out, "q4_k_m"), "--imatrix", str(two))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    assert "its imatrix was {'bytes'" in refused(out, *arguments(source, out, "q4_k_m"), "--imatrix", str(one))
    one.write_bytes(kept)
    goes_on(source, out, "q4_k_m", contents(tmp_path / "whole"), "--imatrix", str(one))


def test_a_source_that_changed_meanwhile(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """Touched or changed; put back, the work goes on."""
    mine = shutil.copytree(source, tmp_path / "kinds")
    out = stopped(mine, tmp_path / "out", "bnb4")
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        stat, data = (mine / name).stat(), (mine / name).read_bytes()
        os.utime(mine / name)
        assert f"{name} has changed since" in refused(out, *arguments(mine, out, "bnb4"))
        (mine / name).write_bytes(data[:-1] + b"\0" if name == WEIGHTS else data + b" ")
        assert f"{name} has changed since" in refused(out, *arguments(mine, out, "bnb4"))
        (mine / name).write_bytes(data)
        os.utime(mine / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (mine / "added_tokens.json").write_text("{}")
    assert "added_tokens.json has changed since" in refused(out, *arguments(mine, out, "bnb4"))
    (mine / "added_tokens.json").unlink()
    goes_on(mine, out, "bnb4", whole("bnb4"))


def test_what_did_nothing_yet_refuses_nobody(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """Killed before a weight was done, then another recipe."""
    out = tmp_path / "out"
    assert killed(source, out, "nvfp4", os, "pwrite", 2)
    assert convert(source, out, "bnb4").exit_code == 0
    finished(out, whole("bnb4"))


def test_two_conversions_at_once(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    """The second is refused while the first runs, whatever it wants to write; the first is not disturbed."""
    out, there = tmp_path / "out", tmp_path / "there"
    there.symlink_to(tmp_path)
    begun, go = os.pipe(), os.pipe()

    def work() -> None:
        before_call(os, "fsync", 9, lambda: (os.write(begun[1], b"x"), os.read(go[0], 1)))
        os._exit(convert(source, out, "q4_k_m").exit_code)

    pid = os.fork()
    if not pid:
        signal.alarm(60)
        work()
    assert os.read(begun[0], 1) == b"x"
    before = tree(tmp_path)
    for target, recipe in ((out, "q4_k_m"), (out, "bnb4"), (there / "out", "q4_k_m")):
        assert "another dgq convert is writing it" in error_of(*arguments(source, target, recipe))
    assert tree(tmp_path) == before
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*begun, *go):
        os.close(end)
    finished(out, whole("q4_k_m"))


def test_a_journal_removed_just_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner ends between our open and our lock; the lock that counts is the one on the file that has the name."""
    out, flock, calls = tmp_path / "out", fcntl.flock, 0
    path = journal.paths(out)[1]

    def late(file: Any, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with journal.opened(out, {}), pytest.raises(InputError, match="another dgq convert"), journal.opened(out, {}):
        pass
    assert calls == 3


def test_a_file_system_without_locks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unable)
    line = error_of(*arguments(source, tmp_path / "out", "bnb4"))
    assert "No locks available" in line and "another dgq" not in line


# --- the source changes while it is converted -------------------------------------------------------------------------


def touch(file: Path) -> None:
    os.utime(file)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b" ")


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace(file: Path) -> None:
    other = shutil.copyfile(file, file.with_name("new"))
    other.rename(file)


@contextmanager
def meanwhile(moment: str, act: Callable[[], object]) -> Iterator[None]:
    """Act when the progress bar is told of the first piece, or of "hashing"."""

    acted = False

    @contextmanager
    def bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
        def advance(done: int, total: int, name: str) -> None:
            nonlocal acted
            if not acted and (moment == "first" or name == moment):
                acted = True
                act()

        yield advance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "byte_bar", bar)
        yield
    assert acted


@pytest.mark.parametrize("change", (touch, flip, grow, shrink, replace))
def test_a_source_that_changes_while_it_is_converted(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    """One line that names the file, and nothing left; of every second also where it was going on."""
    for number, (recipe, name, moment) in enumerate((
        ("nvfp4-w4a16", WEIGHTS, "first"),
        ("q4_k_m", "model-00002-of-00002.safetensors", "first"),
        ("bnb4", WEIGHTS, "hashing"),
        ("q4_k_m", "tokenizer.json", "first"),
        ("nvfp4", "config.json", "hashing"),
    )):  # fmt: skip
        for going_on in (False, True) if number % 2 == 0 else (False,):
            mine = shutil.copytree(source, tmp_path / "kinds")
            before, out = tree(tmp_path), tmp_path / ("out" if going_on else "new/out")
            if going_on:
                stopped(mine, out, recipe)
            with meanwhile(moment, functools.partial(change, mine / name)):
                line = error_of(*arguments(mine, out, recipe))
            assert name in line and "while it was" in line, line
            assert tree(tmp_path) == before
            shutil.rmtree(mine)


def test_an_imatrix_that_changes_while_it_is_used(source: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "im.gguf", 1, 1, columns=128)
    with meanwhile("first", lambda: write_imatrix(imatrix, 2, 1, columns=128)):
        line = error_of(*arguments(source, tmp_path / "out", "q4_k_m", "--imatrix", str(imatrix)))
    assert "im.gguf: changed while it was converted" in line
    assert tree(tmp_path) == {"im.gguf"}


def test_a_source_that_goes_away(source: Path, tmp_path: Path) -> None:
    """Unmounted, say: no artifact, a line that names the file, and it may come back."""
    mine = shutil.copytree(source, tmp_path / "kinds")
    with meanwhile("first", lambda: mine.rename(tmp_path / "away")):
        line = error_of(*arguments(mine, tmp_path / "out", "bnb4"))
    assert str(mine) in line and not (tmp_path / "out").exists()


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_that_work(
    source: Path, tmp_path: Path, whole: Callable[[str], Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for name in (
        "with spaces", "relative/deep/er", "slash/", "link/in", "a" * 255, "é" * 127, "語" * 85, "[b]", "-dash", ".dot",
        str(tmp_path / "real" / ".." / "up"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, [*arguments(source, Path("x"), "bnb4"), "-o", name])
        assert result.exit_code == 0, result.output
        finished(Path(name), whole("bnb4"))
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.journal"))


def test_a_long_name_goes_on(source: Path, tmp_path: Path, whole: Callable[[str], Contents]) -> None:
    goes_on(source, stopped(source, tmp_path / ("語" * 85), "bnb4"), "bnb4", whole("bnb4"))


def test_targets_that_do_not(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any work is done."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "partly").mkdir()
    (tmp_path / ".taken.partial").write_text("")
    (tmp_path / ".held.journal").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slices.Slice, "run", None)
    before = tree(tmp_path)
    for name, expected in (
        (".", "exists already"), ("..", "exists already"), ("/", "exists already"), ("partly/", "exists already"),
        ("file", "exists already"), ("dangling", "exists already"), ("loop", "exists already"),
        ("partly/new/..", "exists already"), ("file/out", "cannot be written"), ("loop/out", "cannot be written"),
        ("a" * 256, "cannot be written"), (f"{'a' * 300}/out", "cannot be written"), ("/proc/out", "cannot be written"),
        ("/proc/1/new/out", "cannot be written"), ("taken", "cannot be written"), ("held", "cannot be written"),
    ):  # fmt: skip
        line = error_of(*arguments(source, Path("x"), "bnb4"), "-o", name)
        assert expected in line and "kept" not in line, line
        assert tree(tmp_path) == before, name


@pytest.mark.parametrize("owner", ((Path, "mkdir"), (Path, "open")), ids=("mkdir", "open"))
def test_a_read_only_file_system(
    owner: tuple[type, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is patched in."""
    stock = getattr(*owner)

    def refusing(self: Path, *given: Any, **named: Any) -> Any:
        if tmp_path in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return stock(self, *given, **named)

    (tmp_path / "parent").mkdir()
    monkeypatch.setattr(*owner, refusing)
    line = error_of(*arguments(source, tmp_path / "parent" / "out", "bnb4"))
    assert "out: cannot be written ([Errno 30] Read-only file system" in line and "kept" not in line
    assert tree(tmp_path) == {"parent"}


def test_somebody_makes_the_target_meanwhile(source: Path, tmp_path: Path) -> None:
    """Never over somebody's directory; theirs stays as it is."""
    out = tmp_path / "out"

    def make() -> None:
        out.mkdir()
        (out / "theirs").write_text("")

    with meanwhile("hashing", make):
        assert "out: exists already" in error_of(*arguments(source, out, "bnb4"))
    assert {"out", "out/theirs"} == tree(tmp_path)


def test_a_reader_never_meets_half_an_artifact(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks again and again, and verifies what it sees at once."""
    out, fsync = tmp_path / "out", os.fsync
    looks, problems = 0, ("it never came",)
    over = threading.Event()

    def look() -> None:
        nonlocal looks, problems
        while not out.exists() and not over.is_set():
            looks += 1
            over.wait(0.001)
        problems = check_files(out, 1, lambda n, name: None).problems

    reader = threading.Thread(target=look)
    monkeypatch.setattr(os, "fsync", lambda file: (over.wait(0.002), fsync(file))[1])
    reader.start()
    result = convert(source, out, "nvfp4")
    reader.join(30)
    over.set()
    assert result.exit_code == 0 and looks > 20 and not problems


@pytest.mark.parametrize("recipe", ("nvfp4-w4a16", "bnb4", "bnb4-dq", "q4_k_m"))
def test_the_source_is_read_and_not_mapped(
    recipe: str, source: Path, tmp_path: Path, whole: Callable[[str], Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages count as memory of the process, and a file that shrinks under a mapping kills it."""
    whole(recipe)

    def mapped(*given: Any, **named: Any) -> None:
        raise AssertionError("a file is mapped")

    monkeypatch.setattr(np, "memmap", mapped)
    assert convert(source, tmp_path / "out", recipe).exit_code == 0
    finished(tmp_path / "out", whole(recipe))
