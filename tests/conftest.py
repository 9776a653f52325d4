"""Before torch is imported: one thread a process, since pytest-xdist runs one process a core; no network; Triton's
kernels are interpreted where there is no GPU (they are decorated when Triton is imported, whoever does that first)."""

import os
import signal
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    monkeypatch.setattr("dgq.quant.feedback.feedback.ROW_GROUPS", 4)


@pytest.fixture(scope="session")
def tiny_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dgq validate of two artifacts of `tiny`, nvfp4 and gguf beside it, from a few prompts. Whoever uses it is of the
    xdist group "validate-page"."""
    from click.testing import CliRunner

    from dgq.convert.cli.__main__ import main

    path = tmp_path_factory.mktemp("page")
    folder = files("dgq.recipes").joinpath("prompts")
    texts, tasks = (folder.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8") for kind in ("text", "tasks"))
    (path / "prompts.jsonl").write_text("\n".join([*texts.splitlines()[:2], *tasks.splitlines()[:3]]))
    for to, recipe in (("nvfp4", "nvfp4-w4a16"), ("gguf", "q4_k_m")):
        done = CliRunner().invoke(main, ["convert", "tiny", "--to", to, "--recipe", recipe, "-o", str(path / to)])
        assert done.exit_code == 0, done.output
    arguments = ["validate", path / "nvfp4", path / "gguf", "--against", "tiny", "--quick", "--prompts",
                 path / "prompts.jsonl", "-o", path / "report"]  # fmt: skip
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return path / "report"
