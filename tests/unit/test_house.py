"""The house's rules, read off the source: which room may import which, no circles, short files and functions, names.

A room is a package. The table of arrows is written out, so that a new room, or a new arrow, is a decision that somebody
takes here; rglob is used everywhere, so that no sub-package escapes the table.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ("quant", "runtime", "recipes", "convert")
QUANT = {"quant", "quant.schemes", "quant.schemes.ggml", "quant.formats", "quant.files"}
MODEL = {"runtime.shape", "runtime.adapters", "runtime.model", "runtime.files"}

# Room -> the rooms that it may import, itself aside. The order is that of the house from the ground up.
ARROWS: dict[str, set[str]] = {
    "recipes": set(),
    "recipes.tasks": set(),
    "quant": set(),
    "quant.schemes.ggml": {"quant"},
    "quant.schemes": {"quant", "quant.schemes.ggml"},
    "quant.formats": {"quant", "quant.schemes", "quant.schemes.ggml"},
    "quant.files": {"quant", "quant.schemes"},
    "quant.feedback": {"quant"},
    "runtime.shape": {"quant", "quant.files"},
    "runtime.kernels": {"quant", "quant.schemes", "quant.schemes.ggml", "runtime.shape"},
    "runtime.adapters": {"quant", "quant.files", "runtime.shape"},
    "runtime.model": {"quant", "quant.schemes", "runtime.adapters", "runtime.kernels", "runtime.shape"},
    "runtime.files": {*QUANT, "runtime.adapters", "runtime.model", "runtime.shape"},
    "runtime.engine": {"quant", *MODEL, "runtime.kernels"},
    "runtime.hf": {*QUANT, *MODEL},
    "runtime.serve": {"quant", *MODEL, "runtime.engine"},
    "runtime": {"runtime.engine"},
    "convert.source.transfer": {"quant", "quant.files"},
    "convert.source": {*QUANT, "runtime.adapters", "runtime.files", "runtime.shape", "convert.source.transfer"},
    "convert.resume": {"quant"},
    "convert.plans": {*QUANT, "convert.source", "runtime.files", "runtime.shape"},
    "convert.layerwise": {*QUANT, *MODEL, "convert.plans", "convert.source"},
    "convert.calibration": {*QUANT, *MODEL, "convert.layerwise", "convert.resume", "convert.source"},
    "convert.write": {
        *QUANT, *MODEL, "quant.feedback", "convert.calibration", "convert.layerwise", "convert.plans", "convert.resume",
        "convert.source",
    },
    "convert.estimate": {
        *QUANT, *MODEL, "convert.calibration", "convert.layerwise", "convert.plans", "convert.source", "convert.write",
    },
    "convert.verification": {*QUANT, *MODEL, "convert.calibration", "convert.plans", "convert.source", "convert.write"},
    "convert.validation.report": {"quant", "quant.schemes", "runtime.shape"},
    "convert.validation": {
        *QUANT, *MODEL, "runtime.engine", "convert.layerwise", "convert.resume", "convert.source",
        "convert.validation.report", "convert.verification", "convert.write",
    },
    "convert.validation.evaluation": {
        "quant", "quant.files", *MODEL, "convert.resume", "convert.source", "convert.validation",
        "convert.validation.report", "convert.write",
    },
    "convert.mixture": {
        *QUANT, *MODEL, "convert.estimate", "convert.layerwise", "convert.plans", "convert.resume", "convert.source",
        "convert.write",
    },
    "convert.publication": {
        *QUANT, *MODEL, "convert.calibration", "convert.estimate", "convert.plans", "convert.source",
        "convert.source.transfer",
        "convert.validation.report", "convert.verification", "convert.write",
    },
    "convert.bench": {
        *QUANT, *MODEL, "runtime.engine", "convert.estimate", "convert.plans", "convert.source", "convert.verification",
    },
}  # fmt: skip
ARROWS["convert.run"] = {
    *QUANT, *MODEL, "runtime.engine", "convert.source", "convert.write",
}  # fmt: skip
# The command line may ask for any room below it; no library room may ask for these.
LIBRARY = {room for room in ARROWS if room.startswith("convert.")}
ARROWS["convert.cli.terminal"] = {"quant", "runtime.engine", "runtime.files", "convert.calibration", "convert.source"}
ARROWS["convert.cli"] = {*QUANT, *MODEL, "runtime.engine", "runtime.serve", *LIBRARY, "convert.cli.terminal"}
ARROWS["convert"] = LIBRARY

MOST_FILES, MOST_ROOMS = 14, 14
MOST_LINES, MOST_FUNCTION, MOST_PARAMETERS = 320, 40, 7
VAGUE = {"said", "told", "own", "found", "felt"}  # as names, not beyond three lines
NOT_NAMES = ("utils", "util", "common", "helpers", "manager", "misc")
FILES = [path for top in HOUSE for path in sorted((ROOT / top).rglob("*.py"))]
ROOMS = sorted({".".join(path.relative_to(ROOT).parent.parts) for path in FILES})


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _room(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: Path) -> Iterator[Path]:
    """The house's files that this one imports, wherever the statement stands."""
    for node in ast.walk(_tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_id(path)}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("dgq."):
                yield _file(name.removeprefix("dgq."), path)


def _file(name: str, importer: Path) -> Path:
    """The file of a module, or of what a module holds."""
    for dotted in (name, name.rpartition(".")[0]):
        base = ROOT.joinpath(*dotted.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    raise AssertionError(f"{_id(importer)} imports dgq.{name}, which is in no file")


def test_every_room_has_a_row_and_says_what_may_live_in_it() -> None:
    assert set(ROOMS) == set(ARROWS), "a room without a row, or a row without a room"
    for room in ROOMS:
        text = ast.get_docstring(_tree(ROOT.joinpath(*room.split("."), "__init__.py")))
        assert text and len(text) > 40, f"{room}: its __init__ does not say what may live in it"


def test_the_wheel_holds_every_room() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert set(packages) == {f"dgq.{room}" for room in ROOMS} and len(packages) == len(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_go_where_the_table_says(path: Path) -> None:
    room = _room(path)
    rooms = {_room(other) for other in _imports(path)} - {room}
    assert rooms <= ARROWS[room], f"{room} may not import {rooms - ARROWS[room]}"


def test_there_are_no_circles() -> None:
    """Neither between the table's rooms, nor between files, lazy and typing imports included."""
    list(TopologicalSorter(ARROWS).static_order())
    graph = {_id(path): {_id(other) for other in _imports(path)} - {_id(path)} for path in FILES}
    list(TopologicalSorter(graph).static_order())


def test_rooms_are_small() -> None:
    for room in ROOMS:
        folder = ROOT.joinpath(*room.split("."))
        inside = [path for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").is_file()]
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(inside) <= MOST_ROOMS, f"{room} has {len(inside)} rooms"
        assert len(files) <= MOST_FILES, f"{room} has {len(files)} files"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_files_are_short_and_explain_themselves(path: Path) -> None:
    assert ast.get_docstring(_tree(path)), "no module docstring"
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert path.stem not in NOT_NAMES


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(path: Path) -> Iterator[Function]:
    """But for Triton's, whose arguments are pointers and strides, and click's, whose arguments are the options."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, Function):
            marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
            if "triton.jit" not in marks and ".command" not in marks and "click.command" not in marks:
                yield node


@pytest.mark.parametrize("path", [path for path in FILES if "recipes" not in path.parts], ids=_id)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for node in _functions(path):
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1
        assert lines <= MOST_FUNCTION, f"{node.name} has {lines} lines"
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([one for one in given if one.arg not in ("self", "cls")])
        assert count <= MOST_PARAMETERS, f"{node.name} takes {count} parameters; a request dataclass takes them"


@pytest.mark.parametrize("path", [path for path in FILES if "recipes" not in path.parts], ids=_id)
def test_no_vague_name_reaches_beyond_three_lines(path: Path) -> None:
    """said, told, own, found, felt say nothing of what they hold: no function, class, parameter or attribute has such a
    name, and no variable that is used over more than three lines."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, Function | ast.ClassDef):
            assert node.name.strip("_") not in VAGUE, f"{node.lineno}: {node.name}"
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert not VAGUE & {one.arg for one in arguments}, f"{node.lineno}: a parameter of {node.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert node.attr.strip("_") not in VAGUE, f"{node.lineno}: .{node.attr}"
    for scope in [node for node in ast.walk(_tree(path)) if isinstance(node, Function | ast.Module | ast.ClassDef)]:
        for name, lines in _spans(scope).items():
            assert lines <= 3, f"{getattr(scope, 'name', 'module')}: {name} is used over {lines} lines"


def _spans(scope: ast.AST) -> dict[str, int]:
    """Vague name -> lines from its first to its last use in this scope, functions inside it aside."""
    places: dict[str, list[int]] = {}
    todo = list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and node.id.strip("_") in VAGUE:
            places.setdefault(node.id, []).append(node.lineno)
        if not isinstance(node, Function | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
    return {name: max(lines) - min(lines) + 1 for name, lines in places.items()}


@pytest.mark.parametrize(
    "path", [path for path in FILES if _room(path) in LIBRARY or "convert" not in path.parts], ids=_id
)
def test_no_library_module_prints_or_reads_click(path: Path) -> None:
    if "recipes" in path.parts:
        return
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not {"click", "rich"} & {name.split(".")[0] for name in modules}, f"{node.lineno}: imports {modules}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{node.lineno}: prints"


def _is_text_without_encoding(call: ast.Call) -> bool:
    """Whether it opens, reads or writes a text in whatever encoding the system has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {word.arg for word in call.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" not in words and len(call.args) < (1 if name == "read_text" else 2)
    modes = [value.value for value in call.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    modes += [word.value.value for word in call.keywords if word.arg == "mode" and isinstance(word.value, ast.Constant)]
    if name == "open" and any(set(mode) <= set("rwaxbt+U") and mode for mode in modes):
        return not any("b" in mode for mode in modes) and "encoding" not in words
    return name in ("run", "Popen", "check_output") and "text" in words and "encoding" not in words


@pytest.mark.parametrize("path", [path for path in FILES if _room(path) != "recipes"], ids=_id)
def test_texts_have_an_encoding(path: Path) -> None:
    """On Windows the system's is not UTF-8. The scripts that made `tiny` are not run there."""
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if _is_text_without_encoding(call)]
    assert not lines, f"{_id(path)}, lines {lines}: a text without encoding="
