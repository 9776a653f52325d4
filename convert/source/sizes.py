"""Sizes of memory as people write them: 8GiB, 24GB, 1.5 GiB, 900MB."""

from __future__ import annotations

import re
from typing import Any

import click

UNITS = {"B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}, **{f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}}  # fmt: skip # noqa: E501
_KNOWN = {unit.lower(): factor for unit, factor in UNITS.items()}


class Size(click.ParamType):  # type: ignore[type-arg]  # which old versions do not take
    """A click type: text -> bytes, a whole number above 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(value), re.ASCII)
        factor = _KNOWN.get(match[2].lower()) if match else None
        size = int(float(match[1]) * factor) if match and factor and len(match[1]) < 30 else 0
        if size < 1:
            self.fail(f"{value!r} is no size of memory; write it like 24GiB or 24GB", param, ctx)
        return size


def shown(nbytes: int) -> str:
    """In GiB, or MiB if it is little."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.0f} MiB"
