"""What keeps the tiers of tests apart: `pytest` is quick because tests/unit starts no process, and `--all` has all."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TIERS = ("unit", "flow", "full", "gpu")
PROCESSES = {"subprocess", "multiprocessing", "forked", "pexpect"}
SETTINGS = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]


def _id(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


@pytest.mark.parametrize("path", sorted((TESTS / "unit").glob("*.py")), ids=_id)
def test_the_unit_tier_starts_no_process(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        started = PROCESSES & {name.split(".")[0] for name in names}
        assert not started, f"line {node.lineno}: {started}; this test is one of tests/full"
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.fork", "os.system")), node.lineno


def test_every_test_file_is_in_a_tier() -> None:
    stray = [_id(path) for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in TIERS]
    assert not stray


def test_no_two_test_files_have_one_name() -> None:
    """They import from one another by it, and breaks.toml names tests by it."""
    names = [path.stem for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_unit_tier_is_the_default_and_each_tier_is_declared() -> None:
    assert SETTINGS["testpaths"] == ["tests/unit"] and "--strict-markers" in SETTINGS["addopts"]
    assert set(TIERS) <= {marker.partition(":")[0] for marker in SETTINGS["markers"]}
