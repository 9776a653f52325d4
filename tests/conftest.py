"""Before torch is imported: one thread a process, since pytest-xdist runs one process a core; no network; Triton's
kernels are interpreted where there is no GPU (they are decorated when Triton is imported, whoever does that first)."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For conversions whose subject is not how well they round: rows make each other's losses good in 4 groups, not
    64, each of which goes through all columns one by one."""
    monkeypatch.setattr("dgq.quant.feedback.ROW_GROUPS", 4)
