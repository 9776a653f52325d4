"""Tensors' places in files that are being written: known before a byte is, filled in any order, a piece at a time.

    places.add("x", file, 128, 640)       bytes 128 to 640 of an open file belong to tensor x
    places.append("x", first); places.append("x", second)        its elements, in order
    places.skip("x")                      they are there from an earlier run

Writing to a place never moves anything else, so a conversion that was interrupted goes on at the next whole tensor.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from dgq.quant.files.positions import write_at


@dataclass
class _Place:
    file: BinaryIO
    next: int
    end: int


class Places:
    """Byte ranges of open files by tensor name."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._files: list[BinaryIO] = []
        self._lost: OSError | None = None

    def open(self, path: Path, header: bytes, size: int) -> BinaryIO:
        """A file of `size` bytes that starts with `header`; what an earlier run wrote behind it stays."""
        file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._files.append(file)
        _write_all(file, memoryview(header), 0)
        file.truncate(size)
        return file

    def add(self, name: str, file: BinaryIO, start: int, end: int) -> None:
        self._places[name] = _Place(file, start, end)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """The next elements of a tensor, in its dtype. RuntimeError if there is no room for them."""
        place = self._places[name]
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if place.next + raw.nbytes > place.end:
            raise RuntimeError(f"{raw.nbytes} bytes for {name}, which has room for {place.end - place.next}")
        _write_all(place.file, raw.data, place.next)
        place.next += raw.nbytes

    def skip(self, names: Iterable[str]) -> None:
        """These tensors are complete already."""
        for name in names:
            self._places[name].next = self._places[name].end

    def sync(self) -> None:
        """Wait until everything written is on the disk. After an OSError it raises that again: a second fsync would
        succeed, and what the first could not write is lost."""
        if self._lost is not None:
            raise self._lost
        try:
            for file in self._files:
                os.fsync(file.fileno())
        except OSError as error:
            self._lost = error
            raise

    def close(self) -> None:
        """RuntimeError if a tensor is incomplete."""
        short = [name for name, place in self._places.items() if place.next != place.end]
        if short:
            raise RuntimeError(f"{len(short)} tensors are incomplete, {short[0]} the first")
        self.sync()
        for file in self._files:
            file.close()


def free_bytes(path: Path) -> int:
    """Bytes that are free on a path's disk; more than there can be where the system does not tell."""
    try:
        return shutil.disk_usage(path).free
    except AttributeError:  # Python has no call for it there
        return sys.maxsize


def taken_bytes(file: Path) -> int:
    """Bytes of the disk that a file takes, which may have holes; its size where the system does not tell."""
    status = file.stat()
    return 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    if not hasattr(os, "O_DIRECTORY") and path.is_dir():
        return  # Windows opens no directory.
    descriptor = os.open(
        path, os.O_RDONLY if hasattr(os, "O_DIRECTORY") else os.O_RDWR
    )  # It syncs what can be written.
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file: BinaryIO, data: memoryview, at: int) -> None:
    while data:
        written = write_at(file, data, at)
        data, at = data[written:], at + written
