"""The one error a user sees: a line that says what is wrong, where, and what to do.

Everything that can be wrong with what a user hands in (a checkpoint, an artifact, a recipe, an option)
raises `InputError`; the command line prints its text and exits with 2, without a traceback.
"""

from __future__ import annotations

from unicodedata import category


def visible(text: str) -> str:
    """Control codes, line ends and lone surrogates, which names in strangers' files may hold, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """A model's text for a terminal: its lines and tabs as they are; control codes, which could move the cursor or set
    the window's title, and what turns the direction of writing as escapes."""
    lines = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or _is_harmless(c) else ascii(c)[1:-1] for c in lines)


def _is_harmless(c: str) -> bool:
    # control codes (C1 too), surrogates, separators of lines; a zero-width joiner (Cf) holds an emoji together
    return (
        category(c) not in ("Cc", "Cs", "Zl", "Zp") and not "\u202a" <= c <= "\u202e" and not "\u2066" <= c <= "\u2069"
    )


def printable(text: str) -> str:
    """One visible line."""
    return visible(" ".join(text.split()))


class InputError(Exception):
    """Bad input. The text is one line: what is wrong, where (file, tensor, number), what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
