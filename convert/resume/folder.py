"""A folder of unfinished work beside the result that it will become.

    .NAME.WHAT/identity.json         what is being done (identity.py)
               lock                  held while a process is at it (lock.py)
               RESULT.safetensors    a result: tensors by name; on the disk whole, or not at all

NAME is the result's and WHAT the work's, like "calibration". The command adds files of its own that are worth nothing
without results. A folder that holds results of other work is refused; one that holds none is begun anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgq.convert.resume.identity import Identity, difference, identity_text, read_identity
from dgq.convert.resume.lock import lock
from dgq.quant.errors import InputError

NAME_CHARACTERS = 200  # of the result's name, of the 255 that a file's name may have


def folder_of(out: Path, what: str) -> Path:
    """Where the unfinished work for the result `out` lies."""
    return out.absolute().parent / f".{out.name[:NAME_CHARACTERS]}.{what}"


@dataclass(frozen=True)
class Refusals:
    """Errors of a folder that cannot be used. busy: another process is at it; other: what lies there is other work,
    told with the difference in words."""

    busy: str
    other: Callable[[str], str]


class WorkFolder:
    """An open folder of unfinished work; a context that holds its lock. resumed: how many results an earlier run left;
    None if there was no such run."""

    def __init__(self, path: Path, identity: Identity, refusals: Refusals) -> None:
        """Make the folder, or go on with it. InputError if another process is at it or other work lies there; OSError
        if it cannot be written."""
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: BinaryIO = (path / "lock").open("ab")
        try:
            lock(self._lock, refusals.busy)
            self.resumed = self._claim(identity, refusals)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def _claim(self, identity: Identity, refusals: Refusals) -> int | None:
        file, text, count = self.path / "identity.json", identity_text(identity), len(self.results())
        there = file.read_text("utf-8", "replace") if file.is_file() else ""
        if there == text:
            return count
        if there or count:
            kept = read_identity(there)
            raise InputError(refusals.other(difference(kept, identity) or "it is damaged"))
        replace(file, text.encode())
        return None

    def file(self, name: str) -> Path:
        """Where the result of this name lies."""
        return self.path / f"{name}.safetensors"

    def results(self) -> list[Path]:
        """The files of all results."""
        return sorted(self.path.glob("*.safetensors"))

    def store(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a result. InputError if the disk is full."""
        partial = self.path / "result.partial"
        write_tensors(partial, tensors)
        with partial.open("r+b") as written:  # Windows syncs what can be written, no other
            os.fsync(written.fileno())
        partial.replace(self.file(name))

    def remove(self) -> None:
        """Remove everything, and let go of the lock."""
        if os.name == "nt":  # which removes no open file
            self.close()
        shutil.rmtree(self.path)
        self.close()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of unfinished work. InputError if it cannot be written."""
    try:
        save_file(tensors, path, metadata)
    except (SafetensorError, OSError) as error:  # a full disk is a SafetensorError
        raise InputError(f"{path}: cannot be written ({error}); the same command goes on from there") from None


def replace(file: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(file)
