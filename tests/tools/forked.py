"""Work in a forked child: a process of its own, to be killed, to fail, to have another environment, without the ten
seconds that importing torch and transformers anew takes.

    done = forked(lambda: main(["convert", …]), cwd=…, env={"HF_HUB_OFFLINE": "1"})      waits: code, stdout, stderr
    child = Child(work); child.line(); child.kill(signal.SIGTERM); code, stderr = child.ended()

A child computes on the CPU: CUDA, once a process has begun to use it, cannot be used in its forks.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import NoReturn

import torch

LIMIT = 120  # seconds, after which a child is killed


class Child:
    """A running child. Its exit code is that of the SystemExit that ends `work`, 0 without one, 99 after an error."""

    def __init__(
        self, work: Callable[[], object], cwd: Path | None = None, env: Mapping[str, str | None] | None = None
    ) -> None:
        """env: changes of the environment; None takes a variable away."""
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed when it has ended
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(work, cwd, env or {})

    def _run(self, work: Callable[[], object], cwd: Path | None, env: Mapping[str, str | None]) -> NoReturn:
        code = 99
        try:
            for number, file in enumerate(self._files, 1):
                os.dup2(file.fileno(), number)
            sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - the process ends with it
            sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
            for name, value in env.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
            if cwd is not None:
                os.chdir(cwd)
            signal.alarm(LIMIT)
            torch.cuda.is_available = lambda: False
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def _read(self, number: int) -> str:
        size = os.fstat(self._files[number].fileno()).st_size
        return os.pread(self._files[number].fileno(), size, 0).decode("utf-8", "surrogateescape")

    def line(self) -> str:
        """The first line of stdout, as soon as it is there; what there is of it when the child has ended."""
        until, ended = time.monotonic() + LIMIT, None
        while "\n" not in self._read(0) and not ended and time.monotonic() < until:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0.005)
        return self._read(0).partition("\n")[0]

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> CompletedProcess[str]:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        found: CompletedProcess[str] = CompletedProcess([], code, self._read(0), self._read(1))
        for file in self._files:
            file.close()
        return found


def forked(
    work: Callable[[], object], cwd: Path | None = None, env: Mapping[str, str | None] | None = None
) -> CompletedProcess[str]:
    """The child when it has ended."""
    return Child(work, cwd, env).ended()
