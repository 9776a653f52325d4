"""Deliberate breaks of the code, each with the test that must fail by it: the proof that the tests can fail.

    breaks.toml ── one break ──> a copy of the tree, one snippet of one file replaced ──> its test ──> caught, survived

    python tests/tools/breaks.py                       all of them
    python tests/tools/breaks.py --only NAME …         some; --kind K: those of a kind; --shard 1/2: the first half
    python tests/tools/breaks.py --list                a table of what is broken and of the test that catches it

A break names the file, the exact snippet (`old`, which stands in the file once), what takes its place (`new`) and the
tests, as MODULE::FUNCTION wherever below tests/ the module lies. Without `old` the file is a new one. Every test first
runs on the tree as it is, because a test that fails anyway catches nothing.

    caught      the test failed                    survived    the test passed: a test is missing
    stale       the snippet is not there once      unsound     the test fails on the tree as it is, or is not there
    unfinished  the test did not end in time, or pytest itself failed

The last line is a JSON object. The exit code is 0 if every break was caught, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("convert", "quant", "recipes", "runtime")
SECONDS = 120  # for one test


@dataclass(frozen=True)
class Break:
    """One snippet of one file, what takes its place, and the tests of which one must fail."""

    name: str
    kind: str
    file: str
    new: str
    tests: tuple[str, ...]
    old: str | None = None

    def fits(self, tree: Path) -> bool:
        """Whether the snippet stands in the file once; of a new file, whether there is none of its name."""
        path = tree / self.file
        if self.old is None:
            return not path.exists()
        return path.is_file() and path.read_text("utf-8").count(self.old) == 1


def breaks() -> list[Break]:
    """All of breaks.toml, in its order."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["break"]
    return [Break(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def node(test: str, tree: Path = ROOT) -> str | None:
    """MODULE::FUNCTION -> pytest's name for it, relative to the tree; None if there is no such module or function."""
    module, _, function = test.partition("::")
    for path in sorted((tree / "tests").rglob(f"{module}.py")):
        if f"def {function.partition('[')[0]}(" in path.read_text("utf-8"):
            return f"{path.relative_to(tree).as_posix()}::{function}"
    return None


class Tree:
    """A copy of the repository in a temporary folder, and a package `dgq` that leads into it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tree"
        listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.path / name)
        package = folder / "package" / "dgq"
        package.mkdir(parents=True)
        for room in HOUSE:
            (package / room).symlink_to(self.path / room)
        self._original, self._is_new_folder = "", False
        self._package, self._output = package.parent, folder / "output"

    def change(self, one: Break) -> None:
        """Put the break into the tree."""
        path = self.path / one.file
        self._is_new_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._original = path.read_text("utf-8") if one.old is not None else ""
        path.write_text(one.new if one.old is None else self._original.replace(one.old, one.new), "utf-8")
        self._forget(path)

    def restore(self, one: Break) -> None:
        """The tree as it was before the last change."""
        path = self.path / one.file
        if one.old is None:
            shutil.rmtree(path.parent) if self._is_new_folder else path.unlink()
        else:
            path.write_text(self._original, "utf-8")
            self._forget(path)

    def run(self, nodes: list[str], limit: float) -> tuple[int | None, list[str]]:
        """pytest's exit code, None if it took longer than `limit` seconds, and the lines it printed. One test is run up
        to its first failure. The process is forked, because importing torch takes longer than most of the tests do."""
        child = os.fork()
        if not child:
            code = 70
            try:
                code = self._in_child(["-q", "-rfE", "-p", "no:cacheprovider", *["-x"] * (len(nodes) == 1), *nodes])
            finally:
                os._exit(code)
        code = _waited(child, limit)
        return code, self._output.read_text("utf-8", "replace").splitlines()

    def _in_child(self, arguments: list[str]) -> int:
        """Run pytest on the copy, in a process group of its own, its output in a file."""
        os.setsid()
        os.chdir(self.path)
        output = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(target, stream)
        os.environ["PYTHONPATH"] = str(self._package)
        sys.path[0] = str(self._package)
        found = find_spec("dgq.quant")
        assert found and Path(str(found.origin)).resolve().is_relative_to(self.path.resolve()), "dgq lies elsewhere"
        return int(pytest.main(arguments))

    def _forget(self, path: Path) -> None:
        """Python takes compiled code for current if the source's second and size are those it knows."""
        if path.suffix == ".py":
            Path(cache_from_source(str(path))).unlink(missing_ok=True)


def _waited(child: int, limit: float) -> int | None:
    """A child's exit code; None if it had to be killed, with all that it had started."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def unsound(tree: Tree, chosen: list[Break]) -> set[str]:
    """Of the tests of these breaks those that fail on the tree as it is, or are not there."""
    names = {test: node(test, tree.path) for one in chosen for test in one.tests}
    nodes = sorted({path for path in names.values() if path is not None})
    lines = tree.run(nodes, SECONDS * len(nodes))[1] if nodes else []
    failed = [line.partition(" ")[2] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {test for test, path in names.items() if path is None or any(one.startswith(path) for one in failed)}


def tried(tree: Tree, one: Break) -> str:
    """caught, survived or unfinished: what its tests say of the tree with this break in it."""
    nodes = [path for test in one.tests if (path := node(test, tree.path)) is not None]
    tree.change(one)
    try:
        code, _ = tree.run(nodes, SECONDS)
    finally:
        tree.restore(one)
    return {0: "survived", 1: "caught"}.get(70 if code is None else code, "unfinished")


def table(chosen: list[Break]) -> None:
    print("| kind | break | file | caught by |\n|---|---|---|---|")
    for one in chosen:
        print(f"| {one.kind} | {one.name} | {one.file} | {', '.join(one.tests)} |")


def _prepare() -> None:
    """What every test needs, imported once, under the environment that tests/conftest.py wants before that."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these breaks")
    parser.add_argument("--kind", help="the breaks of this kind")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th break, from the I-th")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.shard.split("/"))
    chosen = [one for one in breaks() if arguments.kind in (None, one.kind)]
    chosen = [one for one in chosen if arguments.only is None or one.name in arguments.only][part - 1 :: parts]
    if arguments.list:
        table(chosen)
        return 0
    began = time.monotonic()
    _prepare()
    results: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="breaks-") as folder:
        tree = Tree(Path(folder))
        bad = unsound(tree, chosen)
        print(
            f"{len(chosen)} breaks; their tests took {time.monotonic() - began:.0f} s on the tree as it is", flush=True
        )
        for one in chosen:
            start = time.monotonic()
            if not one.fits(tree.path):
                result = "stale"
            elif bad & set(one.tests):
                result = "unsound"
            else:
                result = tried(tree, one)
            results.setdefault(result, []).append(one.name)
            print(f"{result:10} {time.monotonic() - start:5.1f} s  {one.kind}: {one.name} ({one.file})", flush=True)
    caught = results.pop("caught", [])
    print(json.dumps({"caught": len(caught), **results, "seconds": round(time.monotonic() - began)}))
    return 1 if results or not caught else 0


if __name__ == "__main__":
    raise SystemExit(main())
