"""Sizes of memory as people write them on the command line: 8GiB, 24GB, 1.5 GiB, 900MB."""

from __future__ import annotations

import re
from typing import Any

import click

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)},
}
_FACTORS = {unit.lower(): factor for unit, factor in UNITS.items()}


class Size(click.ParamType):  # type: ignore[type-arg]  # Older versions of click are not generic here.
    """A click type: text to a whole number of bytes above 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(value), re.ASCII)
        factor = _FACTORS.get(match[2].lower()) if match else None
        size = int(float(match[1]) * factor) if match and factor and len(match[1]) < 30 else 0
        if size < 1:
            self.fail(f"{value!r} is no size of memory; write it like 24GiB or 24GB", param, ctx)
        return size
