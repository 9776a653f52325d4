"""What `dgq validate` prints for people."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from dgq.convert.terminal.console import err, out


def validated(report: dict[str, Any], path: Path | None, reference: Path | None) -> None:
    """One row an artifact, the limits that are broken, where the report is."""
    found = report["artifacts"]
    if not found:
        out.print(f"{reference}: what {report['reference']['name']} does; judge artifacts with --reference")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("artifact")
    for heading in ("MB", "KL, nats", "top-1", "steps", "score", "tokens/s", "gate"):
        table.add_column(heading, justify="right")
    base = report["reference"]["free"]
    table.add_row(f"{report['reference']['name']} (BF16)", f"{report['reference']['bytes'] / 1e6:,.1f}", "0", "",
                  f"{base['steps'][0]:.2f}", _score(base), f"{base['tokens_per_second']:.0f}", "")  # fmt: skip
    for one in sorted(found, key=lambda one: one["fixed"]["mean"]["kl"][0]):
        mean, free = one["fixed"]["mean"], one["free"]
        broken = sum(line["ok"] is False for line in one["gate"])
        table.add_row(
            one["name"] + (f" ({one['activations']} activations)" if one["activations"] else ""),
            f"{one['bytes'] / 1e6:,.1f}", f"{mean['kl'][0]:.5f} ±{(mean['kl'][2] - mean['kl'][1]) / 2:.5f}",
            f"{mean['top1'][0]:.2%}", f"{free['steps'][0]:.2f}", _score(free), f"{free['tokens_per_second']:.0f}",
            "good" if one["ok"] else f"{broken} broken",
        )  # fmt: skip
    out.print(table)
    for one in found:
        for line in one["gate"]:
            if line["ok"] is False:
                out.print(f"{one['name']}: {line['limit']}: {line['said']}", style="red")
        if one["gate"] and (unchecked := [line["limit"] for line in one["gate"] if line["ok"] is None]):
            err.print(f"note: {one['name']}: unchecked: {', '.join(unchecked)}", style="yellow")
    if path is not None:
        out.print(f"{path / 'report.html'}  numbers in report.json and *.csv beside it")
        if err.is_terminal:
            err.print(f"\nnext: xdg-open {shlex.quote(str(path / 'report.html'))}", style="green")


def _score(free: dict[str, Any]) -> str:
    return f"{free['score'][0]:.1%}" if free["score"] else ""
