"""dgq on systems that lack what Linux has. A child takes those names away before dgq is imported, as they are missing
on Windows, and runs commands on `tiny`; what other libraries need of Linux is imported before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHILD = """
import os, signal, sys
import psutil, torch, transformers.generation  # their own modules for Linux
import transformers.models.gemma4.configuration_gemma4
for name in ("fcntl", "resource", "termios", "pwd", "grp", "triton"):
    sys.modules[name] = None
for name in ("preadv", "pwritev", "pwrite", "pread", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sysconf",
             "statvfs", "fdatasync", "fork", "O_DIRECTORY", "getuid", "geteuid", "mkfifo", "sched_setaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGALRM", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)
torch.cuda.is_available = lambda: False
from pathlib import Path
def no_link(*_, **__):
    raise OSError(1314, "A required privilege is not held by the client")
os.symlink = Path.symlink_to = no_link
from dgq.convert.cli.__main__ import main
import json
for words in json.loads(sys.argv[1]):
    print("##", *words, flush=True)
    try:
        main(words, standalone_mode=False)
    except SystemExit as end:
        print("exit", end.code)
"""


def blocked(folder: Path, *commands: tuple[str, ...], **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-c", CHILD, json.dumps(commands)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert set(ends) <= {"exit 0"} and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_without_what_windows_lacks(tmp_path: Path) -> None:
    text = blocked(
        tmp_path,
        ("plan", "tiny", "--to", "gguf", "--no-probe"),
        ("convert", "tiny", "--to", "gguf", "-o", "made"),
        ("inspect", "made"),
        ("verify", "made", "--against", "tiny"),
        ("run", "made", "Sort: b a", "--steps", "2"),
    )
    assert text.count("this system has no locks") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    again = [sys.executable, "-m", "dgq.convert.cli", "convert", "tiny", "--to", "gguf", "-o", "here"]
    subprocess.run(again, cwd=tmp_path, check=True, capture_output=True)
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (tmp_path / "made" / file.name).read_bytes(), file.name
