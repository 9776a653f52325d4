"""The one error a user sees: a line that says what is wrong, where, and what to do.

Everything that can be wrong with what a user hands in (a checkpoint, an artifact, a recipe, an option)
raises `InputError`; the command line prints its text and exits with 2, without a traceback.
"""

from __future__ import annotations


def visible(text: str) -> str:
    """Control codes, line ends and lone surrogates, which names in strangers' files may hold, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """One visible line."""
    return visible(" ".join(text.split()))


class InputError(Exception):
    """Bad input. The text is one line: what is wrong, where (file, tensor, number), what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
