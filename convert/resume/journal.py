"""The journal of an unfinished conversion: enough to go on after any end, even that of the machine.

    .NAME.partial/          the artifact so far; every file has its final size, tensors have their final places
    .NAME.journal           one line a fact, each with a checksum:
        5d41402a {"identity": {…}}                      what is being converted, into what, by which version
        7d793037 {"scales": {…}}                        input scales, if they were calibrated
        0cc175b9 {"done": ["model.decoder.…", …],       weights whose bytes were on the disk before this line was
                  "files": {"model.safetensors": …}}    written, and the files that hold them, with their sizes

The next run of the same command takes the lines up to the first broken one (a power cut may lose the end of a file)
and does the rest. It does everything anew if one of the files is not what it was. Any other command into the same
directory is refused, with the reason. While a conversion runs it holds a lock on the journal. At the end the directory
gets its name in one rename, and the journal is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dgq.convert.resume.identity import Identity, difference
from dgq.convert.resume.lock import lock
from dgq.quant.errors import InputError

SYNC_SECONDS = 5.0  # at most this much work is done again after a power cut; a killed process loses less
NAME_BYTES = 240  # of a file name's 255


class Journal:
    """An open, locked journal. done: weights that an earlier run finished; scales: its input scales; worth_keeping:
    whether it holds a fact besides the identity."""

    def __init__(self, file: BinaryIO, partial: Path, identity: Identity, facts: list[dict[str, Any]]) -> None:
        self._file, self._partial, self.identity = file, partial, identity
        self.worth_keeping = bool(facts)
        self.done = {name for fact in facts for name in fact.get("done", ())}
        self.scales: dict[str, Any] | None = next((fact["scales"] for fact in facts if "scales" in fact), None)
        self._waiting: list[str] = []
        self._synced = time.monotonic()

    def note(self, fact: dict[str, Any]) -> None:
        """Append a line, and before the first one the identity, and wait until it is on the disk."""
        for each in (fact,) if self.worth_keeping else ({"identity": self.identity}, fact):
            text = json.dumps(each).encode()
            self._file.write(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.worth_keeping = True

    def finish(self, weight: str) -> bool:
        """Note that a weight's bytes were written. True when it is time to sync the files and call flush()."""
        self._waiting.append(weight)
        return time.monotonic() - self._synced > SYNC_SECONDS

    def flush(self) -> None:
        """Append the finished weights, whose bytes the caller has brought to the disk."""
        if self._waiting:
            self.note({"done": self._waiting, "files": _sizes(self._partial)})
        self._waiting = []
        self._synced = time.monotonic()


def paths(out: Path) -> tuple[Path, Path]:
    """The partial directory and the journal that belong to the artifact `out`."""
    parent, name = out.absolute().parent, os.fsdecode(os.fsencode(out.name)[:NAME_BYTES])
    return parent / f".{name}.partial", parent / f".{name}.journal"


@contextmanager
def opened(out: Path, identity: Identity) -> Iterator[Journal]:
    """The journal of `out`, locked: a new one, or that of the same conversion broken off. The partial directory exists.

    identity: what must be the same for the work to go on. InputError if another process writes the artifact, or if
    another conversion's unfinished work lies there.
    """
    partial, path = paths(out)
    with _locked(out, path) as file:
        facts, good = _read(file)
        if len(facts) > 1 and partial.is_dir() and (why := difference(facts[0]["identity"], identity)) is not None:
            raise InputError(
                f"{out}: an unfinished conversion lies in {partial}, and {why}; repeat its command to finish it, or"
                f" remove that directory"
            )
        if len(facts) < 2 or not _as_it_was(partial, facts):
            facts, good = [], 0
            _make_anew(partial, path)
        file.truncate(good)
        file.seek(0, os.SEEK_END)
        yield Journal(file, partial, identity, facts)


@contextmanager
def _locked(out: Path, path: Path) -> Iterator[BinaryIO]:
    """The journal's file, locked. If another process ended and removed the file between our opening and our locking it,
    the lock is worth nothing, and a new file is opened."""
    while True:
        with path.open("a+b") as file:
            lock(file, f"{out}: another dgq convert is writing it")
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield file
                return


def remove(path: Path) -> None:
    """Remove a journal that is still open. Windows can't: there an empty one stays, which stops nothing."""
    with suppress(PermissionError):
        path.unlink(missing_ok=True)


def _make_anew(partial: Path, path: Path) -> None:
    """Make an empty partial directory; if there cannot be one, the journal is removed as well."""
    try:
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir()
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _as_it_was(partial: Path, facts: list[dict[str, Any]]) -> bool:
    """Whether the files that finished weights lie in are there, of their sizes. Whatever else lies there is removed."""
    if not partial.is_dir():
        return False
    files: dict[str, int] = next((fact["files"] for fact in reversed(facts) if "files" in fact), {})
    for name in _sizes(partial).keys() - files.keys():
        (partial / name).unlink()
    return _sizes(partial) == files


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def _read(file: BinaryIO) -> tuple[list[dict[str, Any]], int]:
    """The facts up to the first line that is not whole, and where that begins."""
    file.seek(0)
    facts, good = [], 0
    for line in file:
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"}\n") or checksum != f"{zlib.crc32(text):08x}".encode():
            break
        facts.append(json.loads(text))
        good += len(line)
    return (facts, good) if facts and "identity" in facts[0] else ([], 0)
