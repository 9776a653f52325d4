"""peft's patterns of module names (rank_pattern, alpha_pattern), matched in bounded time.

peft takes the first pattern that a module's name ends in: re.match(r"(.*\\.)?(PATTERN)$", name). Python's re tries the
ways through a pattern one after the other, and a stranger's ([a-z._0-9]+)+X takes longer than anybody waits. Here all
ways are followed at once: what is kept is the set of places that a part of the pattern may end at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from dgq.quant.errors import InputError

MOST = 200_000  # places looked at for one name; an honest pattern takes some hundreds
LONGEST = 1000  # characters of a pattern
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")


def first_match(patterns: Mapping[str, object], name: str, where: str) -> str | None:
    """The first pattern that the module's name ends in, at the beginning of a part; None if there is none.

    InputError naming `where` for what is no regular expression, or none that can be matched in bounded time.
    """
    return next((pattern for pattern in patterns if matches(pattern, name, where)), None)


def matches(pattern: str, name: str, where: str = "pattern") -> bool:
    """Whether peft's rule finds the pattern in the name. InputError as first_match()."""
    whole = _compiled(pattern, where)
    if isinstance(whole, re.Pattern):
        return whole.match(name) is not None
    return len(name) in _Ways(name, pattern, where).through(whole, {0})


@cache
def _compiled(pattern: str, where: str) -> Any:
    """A re.Pattern of plain text, which is fast and safe; else the parsed pattern."""
    text = rf"(.*\.)?({pattern})$"
    if _PLAIN.fullmatch(pattern):
        return re.compile(text)
    try:
        parsed = _parser.parse(text) if len(pattern) <= LONGEST else None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where} has {pattern[:60]!r}, no regular expression ({error})") from None
    if parsed is None or parsed.state.flags & ~re.UNICODE:
        raise InputError(f"{where} has {pattern[:60]!r}: longer than {LONGEST} characters, or with flags; name modules")
    return parsed


class _Ways:
    """The places of a name that parts of a pattern lead to."""

    def __init__(self, name: str, pattern: str, where: str) -> None:
        self._name, self._left = name, MOST
        self._error = f"{where} has {pattern[:60]!r}, which"

    def through(self, parts: Iterable[tuple[Any, Any]], at: set[int]) -> set[int]:
        """The places behind these parts of a pattern, from any of the places `at`."""
        for operation, argument in parts:
            self._left -= 1 + len(at)
            if self._left < 0:
                raise InputError(f"{self._error} takes too long to match with {self._name}; name the modules plainly")
            if not at:
                break
            at = self._one(operation, argument, at)
        return at

    def _one(self, operation: Any, argument: Any, at: set[int]) -> set[int]:
        name = self._name
        if operation is code.SUBPATTERN:
            return self.through(argument[-1], at)
        if operation is code.BRANCH:
            return set().union(*(self.through(one, at) for one in argument[1]))
        if operation in (code.MAX_REPEAT, code.MIN_REPEAT):
            least, most, repeated = argument
            return self._repeated(least, most, repeated, at)
        if operation is code.AT and argument in (code.AT_BEGINNING, code.AT_BEGINNING_STRING):
            return at & {0}
        if operation is code.AT and argument in (code.AT_END, code.AT_END_STRING):
            return at & {len(name)}
        if operation not in (code.LITERAL, code.NOT_LITERAL, code.ANY, code.IN):
            raise InputError(f"{self._error} has {str(operation).lower()}; name the modules plainly")
        return {i + 1 for i in at if i < len(name) and _takes(operation, argument, name[i])}

    def _repeated(self, least: int, most: int, parts: Any, at: set[int]) -> set[int]:
        for _ in range(least):
            before, at = at, self.through(parts, at)
            if at == before:  # more of the same changes nothing
                break
        reached, new, count = set(at), at, least
        while new and count < most:
            new = self.through(parts, new) - reached
            reached |= new
            count += 1
        return reached


def _takes(operation: Any, argument: Any, letter: str) -> bool:
    """Whether a part of one character's width takes this one."""
    if operation is code.ANY:
        return letter != "\n"
    if operation is code.LITERAL:
        return bool(ord(letter) == argument)
    if operation is code.NOT_LITERAL:
        return bool(ord(letter) != argument)
    negated: bool = argument[0][0] is code.NEGATE
    return negated != any(_in_class(kind, value, letter) for kind, value in argument[negated:])


_CLASSES = {
    code.CATEGORY_DIGIT: r"\d", code.CATEGORY_NOT_DIGIT: r"\D", code.CATEGORY_SPACE: r"\s",
    code.CATEGORY_NOT_SPACE: r"\S", code.CATEGORY_WORD: r"\w", code.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


def _in_class(kind: Any, value: Any, letter: str) -> bool:
    if kind is code.LITERAL:
        return bool(ord(letter) == value)
    if kind is code.RANGE:
        return bool(value[0] <= ord(letter) <= value[1])
    return re.match(_CLASSES[value], letter) is not None
