"""A `dgq` command in this process that must fail, and what it leaves in a folder."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from dgq.convert.cli.__main__ import main


def error_of(*arguments: str) -> str:
    """The one line a failing command prints. Anything else fails the test."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("dgq: error: "), result.stderr
    return lines[0]


def tree(path: Path) -> set[str]:
    """The paths of everything below a folder, relative to it."""
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}
