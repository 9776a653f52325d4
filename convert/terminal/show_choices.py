"""The page of `dgq plan` without a format: a recipe a row, smallest first."""

from __future__ import annotations

import shlex
from typing import Any

from rich.table import Table

from dgq.convert.terminal.console import GB, GIB, note, out


def choices(asked: str, found: dict[str, dict[str, Any]]) -> None:
    """found: what choices.choices() found for the source `asked`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "--to", "GB", "GiB", "bits", "quantised", "VRAM, GiB", "card", "but"):
        justify = "left" if heading in ("recipe", "--to", "but") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    whole = {name: each for name, each in found.items() if "refused" not in each}
    for name, each in sorted(whole.items(), key=lambda pair: pair[1]["bytes"]):
        digits = 2 if each["bytes"] > GB else 4
        table.add_row(
            name, each["format"], *(f"{each['bytes'] / unit:,.{digits}f}" for unit in (GB, GIB)),
            f"{each['bits_per_weight']:.2f}", f"{each['quantized_share']:.1%}", f"{each['vram'] / GIB:,.1f}",
            f"{each['fits'][0]} GB" if each["fits"] else "none", "dgq only" if each["opens_in"] else "",
        )  # fmt: skip
    out.print(table)
    for name, each in found.items():
        if "refused" in each:
            note(f"not {name}: {each['refused']}")
    out.print("bits a weight; share of parameters in fewer than 16 bits; VRAM for short answers")
    out.print(f"more of one: dgq plan {shlex.quote(asked)} --to FORMAT --recipe RECIPE")
