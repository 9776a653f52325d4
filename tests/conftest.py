"""Before torch is imported: one thread a process, since pytest-xdist runs one process a core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
