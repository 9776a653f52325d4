"""What all tests share: the environment before torch is imported, the tiers, and artifacts of `tiny`.

    pytest              tests/unit: one process, no command in another, no calibration of a whole model
    pytest --all        every tier: unit, flow (one journey a format), full (faults, kills, oracles, ranks), gpu

One thread a process, since pytest-xdist runs one process a core; no network; Triton's kernels are interpreted where
there is no GPU (they are decorated when Triton is imported, whoever does that first).
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from oracle_modelopt import Oracle
from pictures import draw_nothing

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
TIERS = ("unit", "flow", "full", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="collect every tier of tests, not tests/unit alone")


def pytest_configure(config: pytest.Config) -> None:
    """`--all` replaces `testpaths`; paths that were given stay what they are."""
    if config.getoption("--all") and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(TESTS)]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test has its tier as a marker, so that `-m "full and not browser"` chooses among them. A module of the full
    tier is a group of pytest-xdist's, so that one process makes its fixtures, unless it says another group."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
        if tier == "full" and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter

    interpreter.quicken()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For conversions whose subject is not how well they round: rows make each other's losses good in 2 groups, not
    64, each of which goes through all columns one by one."""
    monkeypatch.setattr("dgq.quant.feedback.feedback.ROW_GROUPS", 2)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' generate() tells CUDA graphs of each step, for which torch imports its whole compiler."""
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


@pytest.fixture(scope="session")
def modelopt() -> Iterator[Oracle]:
    """modelopt("export", …): see oracle_modelopt.py. Tests that ask it are of the xdist_group "modelopt"."""
    oracle = Oracle()
    yield oracle
    oracle.end()


class Shared:
    """Folders that are made once in a session, whichever of pytest-xdist's processes asks first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, which `make` writes; a process that comes later waits for it. Nobody changes it."""
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                unfinished = self.root / f"{name}.unfinished"
                make(unfinished)
                unfinished.rename(path)
        return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Session-wide folders. They lie beside the folders of pytest-xdist's processes, which all see them."""
    base = tmp_path_factory.getbasetemp()
    return Shared(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


def run_dgq(*words: object) -> None:
    """A `dgq` command in this process, which must succeed."""
    from click.testing import CliRunner

    from dgq.convert.cli.__main__ import main

    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)


CHAT = '{"prompt": "Copy: dog sun river"}'  # which only the reference answers
FORMATS = {"bnb4": "bnb4", "bnb4-dq": "bnb4", "nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "nvfp4-all": "nvfp4",
           "q4_k_m": "gguf", "q6_k": "gguf", "q8_0": "gguf"}  # fmt: skip
Converted = Callable[..., Path]


@pytest.fixture(scope="session")
def converted(shared: Shared) -> Converted:
    """converted(recipe, effort="fast") -> an artifact of `tiny`, converted once. Tests copy what they change."""

    def path_of(recipe: str, effort: str = "fast") -> Path:
        to = FORMATS[recipe]

        def convert(folder: Path) -> None:
            run_dgq("convert", "tiny", "--to", to, "--recipe", recipe, "--effort", effort, "-o", folder / to)

        return shared.made(f"tiny-{recipe}-{effort}", convert) / to

    return path_of


@pytest.fixture(scope="session")
def tiny_report(shared: Shared, converted: Converted) -> Path:
    """The report of dgq validate of two artifacts of `tiny`, nvfp4 and gguf beside it, from a few prompts."""

    def validate(folder: Path) -> None:
        folder.mkdir()
        prompts = files("dgq.recipes").joinpath("prompts")
        texts, tasks = (prompts.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8") for kind in ("text", "tasks"))
        (folder / "prompts.jsonl").write_text("\n".join([*texts.splitlines()[:1], *tasks.splitlines()[:2], CHAT]))
        for name, recipe in (("nvfp4", "nvfp4-w4a16"), ("gguf", "q4_k_m")):
            shutil.copytree(converted(recipe), folder / name)
        run_dgq("validate", folder / "nvfp4", folder / "gguf", "--against", "tiny", "--quick", "--prompts",
                folder / "prompts.jsonl", "-o", folder / "report")  # fmt: skip

    return shared.made("tiny-report", validate) / "report"
