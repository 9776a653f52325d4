"""Before torch is imported: one thread a process, since pytest-xdist runs one process a core; no network; Triton's
kernels are interpreted where there is no GPU (they are decorated when Triton is imported, whoever does that first)."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
