"""One process at a time: a lock on an open file, which ends when the file is closed or the process ends.

A lock belongs to the open file, not to the process, so that two commands in one process exclude each other too. Whoever
takes a lock therefore closes the file when it stops, whatever the reason.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import BinaryIO

from dgq.quant.errors import InputError

FAR = 1 << 40  # Windows keeps others from reading what is locked, so a byte behind every file's end is


def lock(file: BinaryIO, busy: str) -> None:
    """Lock the open file. InputError, which begins with `busy`, if another open file holds the lock."""
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):  # POSIX's, Windows'
        raise InputError(f"{busy}; wait for it, or choose another -o") from None


def _lock(file: BinaryIO) -> None:
    for name, act in (("fcntl", _flock), ("msvcrt", _locking)):
        try:
            import_module(name)
        except ImportError:
            continue
        act(file)
        return
    logging.getLogger("dgq").warning("this system has no locks: do not run a command twice at once with the same -o")


def _flock(file: BinaryIO) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locking(file: BinaryIO) -> None:
    """Lock one byte of the file on Windows, for as long as it is open."""
    msvcrt = import_module("msvcrt")  # which type checkers know on Windows alone
    at = file.tell()
    file.seek(FAR)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    finally:
        file.seek(at, os.SEEK_SET)
