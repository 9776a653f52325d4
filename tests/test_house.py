"""The house's rules, read off the source: imports go one way, heavy ones are lazy, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("quant", "runtime", "recipes", "convert")
MAY_IMPORT = {"quant": {"quant"}, "runtime": {"quant", "runtime"}, "recipes": {"recipes"}, "convert": set(ROOMS)}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def _imports(tree: ast.AST) -> set[str]:
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            modules |= {
                f"{node.module}.{alias.name}" if node.module == "dgq" else str(node.module) for alias in node.names
            }
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_one_way(path: Path) -> None:
    room = path.parent.name
    own = {module.split(".")[1] for module in _imports(ast.parse(path.read_text())) if module.startswith("dgq.")}
    assert own <= MAY_IMPORT[room], f"{room} may import {MAY_IMPORT[room]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_are_short_and_explain_themselves(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 320
    assert path.stem not in ("utils", "util", "common", "helpers", "manager", "misc")


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "numpy", "transformers", "gguf", "huggingface_hub", "pydantic", "matplotlib", "jinja2", "rich"}
    code = "import sys, dgq.convert.cli; print(*{name.split('.')[0] for name in sys.modules})"
    began = time.perf_counter()
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    print(f"import took {time.perf_counter() - began:.2f} s")
    assert not heavy & set(loaded)
