"""SIGTERM and SIGHUP end a command by unwinding it, so that partial artifacts are removed and locks are released.

Python's default action for these signals ends the process where it stands, without running any `finally`.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: no SIGHUP


def unwind_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit(128 + number), as a shell reports them.

    A signal that the process inherited as ignored stays ignored: `nohup dgq …` outlives its terminal. Only the main
    thread may set handlers, so a command that runs in another thread leaves them as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
