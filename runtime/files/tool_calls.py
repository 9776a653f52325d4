"""Tool calls as Gemma 4 writes them, read into a name and arguments.

    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3,where:{in:true}}<tool_call|>

Keys are bare, and strings stand between <|"|> marks, so that they hold quotes, braces and line breaks as they are. The
form is that of the model's chat template. What models also write is read: keys and strings in double quotes, as in
JSON; bare words, which are strings; closing braces too many.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'

_HEAD = re.compile(r"<\|tool_call>\s*call:\s*([^\s{}<>:]+)\s*(?=\{)")
_END = re.compile(r"[\s}]*<tool_call\|>")
_SPACE = re.compile(r"\s*")
_KEY = re.compile(r"([^\s:,{}\[\]<>\"]+)\s*:")
_BARE = re.compile(r"[^,{}\[\]<>]+")
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_DEPTH = 64  # of objects in objects; what goes deeper is no call


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool. arguments: as JSON has them: str, int, float, bool, None, lists and objects."""

    name: str
    arguments: dict[str, Any]


def read_call(text: str, start: int) -> tuple[ToolCall, int] | None:
    """The call whose <|tool_call> stands at `start`, and the place behind its <tool_call|>; None if what stands there
    is no whole call."""
    head = _HEAD.match(text, start)
    if head is None:
        return None
    reader = _Reader(text, head.end())
    try:
        arguments = reader.table(0)
    except ValueError:
        return None
    end = _END.match(text, reader.at)
    return None if end is None else (ToolCall(head[1], arguments), end.end())


class _Reader:
    """Reads values one after the other; ValueError for what is none. at: the place of the next."""

    def __init__(self, text: str, at: int) -> None:
        self._text, self.at = text, at

    def table(self, depth: int) -> dict[str, Any]:
        """An object: {key:value,…}."""
        table: dict[str, Any] = {}
        self._take("{")
        while not self._took("}"):
            key = self._key()
            table[key] = self._value(depth + 1)
            self._took(",")
        return table

    def _value(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise ValueError("too deep")
        self._skip()
        first = self._text[self.at : self.at + 1]
        if first == "{":
            return self.table(depth)
        if first == "[":
            return self._list(depth)
        text = self._quoted()
        return self._bare() if text is None else text

    def _list(self, depth: int) -> list[Any]:
        values = []
        self._take("[")
        while not self._took("]"):
            values.append(self._value(depth + 1))
            self._took(",")
        return values

    def _key(self) -> str:
        self._skip()
        text = self._quoted()
        if text is not None:
            self._take(":")
            return text
        return self._match(_KEY)[1]

    def _quoted(self) -> str | None:
        """A string between <|"|> marks, or in double quotes; None if neither stands here."""
        if self._text.startswith(QUOTE, self.at):
            first = self.at + len(QUOTE)
            last = self._text.index(QUOTE, first)
            self.at = last + len(QUOTE)
            return self._text[first:last]
        if self._text.startswith('"', self.at):
            text, self.at = json.JSONDecoder(strict=False).raw_decode(self._text, self.at)
            return str(text)
        return None

    def _bare(self) -> Any:
        """A number, a word such as true, or else a string without marks."""
        text = self._match(_BARE)[0].strip()
        if not text:
            raise ValueError("no value")
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        try:
            return json.loads(text, parse_constant=str)
        except ValueError:
            return text

    def _skip(self) -> None:
        self.at = self._match(_SPACE).end()

    def _took(self, mark: str) -> bool:
        """Whether the mark stood here; it is passed over."""
        self._skip()
        there = self._text.startswith(mark, self.at)
        self.at += len(mark) * there
        return there

    def _take(self, mark: str) -> None:
        if not self._took(mark):
            raise ValueError(f"no {mark}")

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self.at)
        if match is None:
            raise ValueError("no value")
        self.at = match.end()
        return match
