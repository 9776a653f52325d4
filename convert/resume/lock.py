"""One process at a time: a lock on an open file, which ends when the file is closed or the process ends.

A lock belongs to the open file, not to the process, so that two commands in one process exclude each other too. Whoever
takes a lock therefore closes the file when it stops, whatever the reason.
"""

from __future__ import annotations

import fcntl
from typing import BinaryIO

from dgq.quant.errors import InputError


def lock(file: BinaryIO, busy: str) -> None:
    """Lock the open file. InputError, which begins with `busy`, if another open file holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{busy}; wait for it, or choose another -o") from None
