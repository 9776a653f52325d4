"""The name that a finished result gets: dgq never writes into, or over, what is there."""

from __future__ import annotations

from pathlib import Path

from dgq.quant.errors import InputError


def check_target(out: Path) -> None:
    """InputError if `out` exists, or cannot exist because its name is too long or one of its parents is a file."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from None
    raise InputError(f"{out}: exists already; choose another -o or remove it")
