"""What is printed of STATS: how many tokens each expert saw."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from dgq.convert.calibration.stats import named
from dgq.convert.terminal.console import count, following, note, out


def calibrated(src: str, path: Path, found: dict[str, Any]) -> None:
    """What `dgq calibrate` found: how many tokens each expert saw."""
    table = Table("layer", "least", "median", "most", "tokens an expert, few to many", title="Experts' tokens")
    for layer, counts in found["coverage"].items():
        ranked = sorted(counts)
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, 8 * n // (ranked[-1] + 1))] for n in ranked[:: max(1, len(ranked) // 32)])
        table.add_row(layer, *(count(ranked[i]) for i in (0, len(ranked) // 2, -1)), bars)
    out.print(table)
    if found["starved"]:
        note(named(found["starved"]))
    out.print(f"{path}: {count(found['tokens'])} tokens in {found['rounds']} rounds; dgq inspect shows every expert's")
    following(f"dgq convert {shlex.quote(src)} --to gguf --stats {shlex.quote(str(path))} -o OUT")


def counted(path: str, found: dict[str, Any]) -> None:
    """What STATS hold: the tokens of every expert."""
    data = found["data"]
    out.print(f"{path}: STATS of {data.get('name')}, seed {found.get('seed')}", style="bold")
    out.print(f"{found.get('tokens')} tokens of {data.get('documents')} documents in {found.get('rounds')} rounds")
    table = Table("layer", "least", "median", "most", "of prompts", "of canvases", box=None, pad_edge=False)
    for layer, kinds in found["kinds"].items():
        ranked, prompts = sorted(found["coverage"][layer]), sum(kind[0] for kind in kinds)
        sides = (prompts, sum(ranked) - prompts)
        table.add_row(layer, *(count(n) for n in (ranked[0], ranked[len(ranked) // 2], ranked[-1], *sides)))
    out.print(table)
    out.print("tokens of each layer's experts, from expert 0 on:")
    for layer, counts in found["coverage"].items():
        out.print(f"{layer}: {' '.join(map(str, counts))}")
    out.print(named(found["starved"]))
