"""A `dgq serve` in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path


class Server:
    """A server on a free port. lines: what it wrote to stderr so far."""

    def __init__(self, model: str | Path = "tiny", *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "dgq.convert.cli",
            "serve",
            str(model),
            "--port",
            "0",
            "--device",
            "cpu",
            *options,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.address = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(300) or not self.address:
            self.process.kill()
            raise RuntimeError("".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"(http://\S+)/v1,", line):
                self.address = found[1]
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(5)
        return code
