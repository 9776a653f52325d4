"""Reads and writes at a position of an open file: one call where the system has one, a seek and a call elsewhere."""

from __future__ import annotations

import os
from threading import Lock
from typing import BinaryIO

_ONE = Lock()  # Windows has no pread: between a seek and its call no other thread may seek.


def read_at(file: BinaryIO, data: memoryview, at: int) -> int:
    """Fill data from byte `at` of an unbuffered file. The count of bytes read, 0 at its end. Thread-safe."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [data], at)
    with _ONE:
        file.seek(at)
        return file.readinto(data) or 0  # type: ignore[attr-defined]  # of every unbuffered file


def write_at(file: BinaryIO, data: memoryview, at: int) -> int:
    """Write data to byte `at` of an unbuffered file, and return how many bytes were. Thread-safe."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, at)
    with _ONE:
        file.seek(at)
        return file.write(data)
