"""Sizes of memory in messages."""

from __future__ import annotations


def shown(nbytes: int) -> str:
    """In GiB, or MiB if it is less than one."""
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.0f} MiB"
