"""What every command prints with: lines, tables, bars, one obvious next command.

Data goes to stdout; notes, bars and the next command go to stderr. A string is printed as one line in which nothing is
interpreted, because names and texts come from strangers' files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dgq.quant.errors import visible

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9
SPEED_PERIOD = 600.0  # seconds over which a bar averages its speed: on a CPU a step of a large model takes minutes
EXAMPLE = "Sort: wind apple king door"  # a prompt that `tiny` and the 26B both answer


class _Console(Console):
    """Prints a string with its control characters made visible, so that no file's text can drive the terminal."""

    def print(self, *objects: Any, **style: Any) -> None:
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **style)


out = _Console(highlight=False, soft_wrap=True, markup=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on one line; characters that are not printable become JSON's escapes."""
    text = json.dumps(data, ensure_ascii=False)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar over `total` bytes on stderr; silent where stderr is no terminal.

    The callback takes the bytes done since its last call, and the name of what is being worked on.
    """
    with byte_bar(what) as show:
        done = 0

        def advance(nbytes: int, name: str) -> None:
            nonlocal done
            done += nbytes
            show(done, total, name)

        yield advance


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; silent where stderr is no terminal.

    The callback takes the bytes done, the bytes in all, and the name of what is being worked on.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{what} {visible(name)}")

        yield show


@contextmanager
def count_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; silent where stderr is no terminal. The callback takes the steps done and in all."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=SPEED_PERIOD
    ) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show


def note(line: str) -> None:
    err.print(f"note: {line}", style="yellow")


def following(command: str) -> None:
    """The one obvious next command, for people only."""
    if err.is_terminal:
        err.print()
        err.print(f"next: {command}", style="green")


def following_run(path: str) -> None:
    """The next command after an artifact was made or checked: let it answer."""
    following(f"dgq run {shlex.quote(path)} --chat '{EXAMPLE}'")


def groups_table(title: str, groups: dict[str, dict[str, int]], total: int) -> Table:
    """Groups of tensors, a row each. title: what the groups are; total: bytes of all of them."""
    table = Table(title, box=None, pad_edge=False)
    for heading in ("tensors", "parameters", "MiB", "share of bytes"):
        table.add_column(heading, justify="right")
    for name, group in groups.items():
        share = f"{group['bytes'] / total:.1%}"
        table.add_row(name, str(group["tensors"]), count(group["params"]), f"{group['bytes'] / MIB:,.1f}", share)
    return table


def count(number: int) -> str:
    """A number of parameters or tokens: 25.80 B, 3.10 M, 12.00 K, 7."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size(nbytes: int) -> str:
    """Bytes as GB, or MB below one."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB else f"{nbytes / 10**6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as hours or minutes where there are at least two of them."""
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def input_scales(scales: dict[str, Any]) -> str:
    """The `input_scales` of a dgq.json in a few words."""
    if scales["method"] != "calibrated":
        return f"{scales['value']:.6g} everywhere"
    amax = {side: max(values.values()) for side, values in scales["amax"].items()}
    return ", ".join(f"{side} activations up to {value:.4g}" for side, value in amax.items())
