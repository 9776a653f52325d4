"""Work in units: one process at a time, and whoever comes after it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgq.convert.resume.work import Work
from dgq.quant.errors import InputError

AT_IT = """
import sys
from pathlib import Path
from dgq.convert.resume.work import Work, numbers
work = Work(Path(sys.argv[1]), {}, lambda *_: None, print, "mix")
work.each("trials", 1, lambda unit: numbers(found=3))
print("at it", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out, said = tmp_path / "mine.toml", []

    def go_on() -> Work:
        return Work(out, {}, lambda *_: None, said.append, "mix")

    with subprocess.Popen([sys.executable, "-c", AT_IT, str(out)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout and other.stdout.readline() == "at it\n"
        with pytest.raises(InputError, match=r"\.mine\.toml\.mix: another dgq is at it; wait for it, or choose"):
            go_on()
        other.kill()
    found = go_on().each("trials", 1, lambda unit: pytest.fail("is done already"))
    assert torch.equal(found(0)["found"], torch.tensor(3.0, dtype=torch.float64)) and len(said) == 1
