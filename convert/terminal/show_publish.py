"""What `dgq publish` prints for people."""

from __future__ import annotations

from typing import Any

from dgq.convert.terminal.console import err, out


def problems(found: dict[str, list[str]], forced: bool) -> None:
    """Repository -> checks that fail, on stderr."""
    for repo, lines in found.items():
        for line in lines:
            err.print(f"{repo}: {line}", style="yellow" if forced else "red")


def listing(repo: str, files: dict[str, Any], card: str) -> None:
    """Every file with SHA-256 and size, and the card."""
    out.print(f"{repo}: {len(files)} files, {sum(said['bytes'] for said in files.values()) / 1e9:,.2f} GB")
    for name, said in sorted(files.items()):
        out.print(f"{said['sha256']} {said['bytes']:>14,}  {name}")
    out.print()
    for line in card.splitlines():
        out.print(line)


def published(what: str, where: str, command: str | None = None) -> None:
    out.print(f"{what}@{where}" if command else f"{what}: {where}")
    if command and err.is_terminal:
        err.print(f"\nnext: {command}", style="green")
