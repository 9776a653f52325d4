"""Before torch is imported: one thread a process, since pytest-xdist runs one process a core; no network; Triton's
kernels are interpreted where there is no GPU (they are decorated when Triton is imported, whoever does that first)."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _found_once() -> None:
    """Triton's interpreter looks for its language's builtins at every call of a function. They stay what they are."""
    from triton import language
    from triton.runtime import interpreter

    known: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            known[package] = [name for name in dir(package) if language.core.is_builtin(getattr(package, name, None))]
        for name in known[package]:
            member = getattr(package, name)
            if language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    _found_once()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For conversions whose subject is not how well they round: rows make each other's losses good in 4 groups, not
    64, each of which goes through all columns one by one."""
    monkeypatch.setattr("dgq.quant.feedback.ROW_GROUPS", 4)
