"""Writes the tree of recipes/guides/architecture.md: every room on disk with the first sentence of its `__init__.py`.

python tests/tools/tree.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "recipes" / "guides" / "architecture.md"
TOPS = ("quant", "runtime", "recipes", "convert")
PURPOSE, WIDTH = 24, 120  # the column where a purpose begins, and the last column


def rooms(folder: Path) -> Iterator[Path]:
    """A package and the packages in it, in the order in which a tree lists them."""
    yield folder
    for inside in sorted(folder.iterdir()):
        if (inside / "__init__.py").is_file():
            yield from rooms(inside)


def purpose(room: Path) -> str:
    """The first sentence of a room's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    return re.split(r"(?<=\.)\s", " ".join(docstring.split()), maxsplit=1)[0]


def tree() -> str:
    """The lines of the tree."""
    lines = []
    for top in TOPS:
        for room in rooms(ROOT / top):
            depth = len(room.relative_to(ROOT).parts) - 1
            head = f"{'    ' * depth}{room.name}/".ljust(PURPOSE)
            lines += textwrap.wrap(purpose(room), WIDTH, initial_indent=head, subsequent_indent=" " * PURPOSE)
    return "\n".join(lines) + "\n"


def with_tree(page: str) -> str:
    """The page with the tree in its first plain code block."""
    return re.sub(r"(?<=^```\n).*?(?=^```$)", lambda _: tree(), page, count=1, flags=re.M | re.S)


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text()))
