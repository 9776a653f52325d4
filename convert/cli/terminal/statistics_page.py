"""What is printed of STATS: how many tokens each expert saw. `dgq calibrate` and `dgq inspect` show it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from dgq.convert.calibration.stats import named
from dgq.convert.cli.terminal.console import count, following, note, out

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32  # experts shown as bars, of each layer at most


def calibrated(src: str, path: Path, summary: dict[str, Any]) -> None:
    """The page of `dgq calibrate`. summary: what calibrate() returned; path: of the STATS file."""
    table = Table("layer", "least", "median", "most", "tokens an expert, few to many", title="Experts' tokens")
    for layer, counts in summary["coverage"].items():
        ranked = sorted(counts)
        picked = ranked[:: max(1, len(ranked) // COLUMNS)]
        bars = "".join(BARS[min(7, 8 * n // (ranked[-1] + 1))] for n in picked)
        table.add_row(layer, *(count(ranked[i]) for i in (0, len(ranked) // 2, -1)), bars)
    out.print(table)
    if summary["starved"]:
        note(named(summary["starved"]))
    tokens = count(summary["tokens"])
    out.print(f"{path}: {tokens} tokens in {summary['rounds']} rounds; dgq inspect shows every expert's")
    following(f"dgq convert {shlex.quote(src)} --to gguf --stats {shlex.quote(str(path))} -o OUT")


def counted(path: str, summary: dict[str, Any]) -> None:
    """The page of `dgq inspect STATS`: the tokens of every expert. summary: what stats.counted() returned."""
    data = summary["data"]
    out.print(f"{path}: STATS of {data.get('name')}, seed {summary.get('seed')}", style="bold")
    out.print(f"{summary.get('tokens')} tokens of {data.get('documents')} documents in {summary.get('rounds')} rounds")
    table = Table("layer", "least", "median", "most", "of prompts", "of canvases", box=None, pad_edge=False)
    for layer, kinds in summary["kinds"].items():
        ranked, prompts = sorted(summary["coverage"][layer]), sum(kind[0] for kind in kinds)
        sides = (prompts, sum(ranked) - prompts)
        table.add_row(layer, *(count(n) for n in (ranked[0], ranked[len(ranked) // 2], ranked[-1], *sides)))
    out.print(table)
    out.print("tokens of each layer's experts, from expert 0 on:")
    for layer, counts in summary["coverage"].items():
        out.print(f"{layer}: {' '.join(map(str, counts))}")
    out.print(named(summary["starved"]))
