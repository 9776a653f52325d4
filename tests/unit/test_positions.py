"""Reads and writes at a position, and locks, by the calls that a system has: Linux's, and those of one without them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dgq.convert.resume.lock import FAR, lock
from dgq.quant.errors import InputError
from dgq.quant.files import places
from dgq.quant.files.positions import read_at, write_at


@pytest.mark.parametrize("missing", [False, True], ids=["pread", "seek"])
def test_bytes_at_a_position(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        for name in ("preadv", "pwrite"):
            monkeypatch.delattr(os, name)
    with (tmp_path / "x").open("x+b", buffering=0) as file:
        assert write_at(file, memoryview(b"cdef"), 2) == 4 and write_at(file, memoryview(b"ab"), 0) == 2
        data = bytearray(3)
        assert read_at(file, memoryview(data), 1) == 3 and data == b"bcd"
        assert read_at(file, memoryview(data), 5) == 1 and data == b"fcd"
        assert read_at(file, memoryview(data), 6) == 0
    assert (tmp_path / "x").read_bytes() == b"abcdef"


def test_a_lock_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte far behind the end, by the calls of the msvcrt module; a second one is PermissionError there."""
    calls: list[tuple[int, int, int]] = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))  # type: ignore[arg-type]
    with (tmp_path / "x").open("a+b") as file:
        file.write(b"abc")
        lock(file, "busy")
        assert file.tell() == 3
        with pytest.raises(InputError, match="busy; wait for it"):
            lock(file, "busy")
    assert calls == [(FAR, 2, 1)] * 2 and (tmp_path / "x").read_bytes() == b"abc"


def test_a_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with (tmp_path / "x").open("a+b") as file:
        lock(file, "busy")
    assert caplog.messages == ["this system has no locks: do not run a command twice at once with the same -o"]


def test_what_a_system_does_not_tell_of_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    assert 0 < places.free_bytes(tmp_path) < 1 << 60 and places.taken_bytes(tmp_path / "x") % 512 == 0
    monkeypatch.delattr(os, "statvfs")
    monkeypatch.delattr(os, "O_DIRECTORY")
    assert places.free_bytes(tmp_path) == sys.maxsize
    places.sync_path(tmp_path)
    places.sync_path(tmp_path / "x")
