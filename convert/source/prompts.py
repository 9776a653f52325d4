"""Prompt files: those that ship with dgq, and those of a user. What an entry means is the reader's business.

    .jsonl    a JSON value a line: {"text": …}, {"messages": [{"role", "content"}, …]}, …       calibrate, mix, validate
    .txt      texts with empty lines between them                                               calibrate, mix

Every entry comes with its place, "FILE, line 3", which errors begin with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_whole

MAX_FILE = 1 << 28  # bytes


@dataclass(frozen=True)
class PromptFile:
    """The content of a prompt file. where: how errors name it."""

    where: str
    raw: bytes

    def json_lines(self) -> Iterator[tuple[str, Any]]:
        """The place and the value of every line that is not empty. InputError for what is no UTF-8 or no JSON."""
        for number, line in enumerate(self._text().split("\n"), 1):  # splitlines() would end at more, inside of strings
            if line.strip():
                at = f"{self.where}, line {number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{at}: no JSON ({error})") from None
                yield at, value

    def paragraphs(self) -> Iterator[tuple[str, str]]:
        """The place and the text of every paragraph. InputError for what is no UTF-8."""
        parts = (part for part in re.split(r"\r?\n\s*\n", self._text()) if part.strip())
        return ((f"{self.where}, paragraph {number}", part) for number, part in enumerate(parts, 1))

    def _text(self) -> str:
        try:
            return self.raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{self.where}: is not UTF-8 text") from None


def read_prompts(file: Path) -> PromptFile:
    """A user's prompt file. InputError if it cannot be read, or is larger than MAX_FILE."""
    try:
        return PromptFile(str(file), read_whole(file, MAX_FILE))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{file}: not readable ({error})") from None


def shipped_prompts(name: str) -> PromptFile:
    """A prompt file of recipes/prompts."""
    return PromptFile(name, files("dgq.recipes").joinpath("prompts", name).read_bytes())


def is_chat(messages: object) -> bool:
    """Whether a JSON value is a list of messages, each with a role and a content that are texts."""
    return bool(messages) and isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip
