"""Reading settings out of JSON or GGUF metadata so that every mistake ends in one line: file, key, value.

text = Fields(raw, "config.json").section("text_config")
text.count("hidden_size")      -> 2816, or InputError("config.json: text_config.hidden_size is missing")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from dgq.quant.errors import InputError

T = TypeVar("T")


class Fields:
    """Typed access to one mapping. A key that is null counts as absent; so does nothing else."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "", path: str = "") -> None:
        self.raw, self.source = raw, source
        self._prefix, self._path = prefix, path

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`; InputError if it is missing without a default, or of another type."""
        value = self.raw.get(self._prefix + key)
        if value is None:
            if default is None:
                raise InputError(f"{self._name(key)} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self._name(key)} is {_short(value)}, expected {kind.__name__}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to 2^31-1."""
        value = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise InputError(f"{self._name(key)} is {value}, expected a positive 32-bit number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        number = self.not_negative(key, default)
        if number == 0:
            raise InputError(
                f"{self._name(key)} is {_short(self.raw.get(self._prefix + key))}, expected a number above 0"
            )
        return number

    def not_negative(self, key: str, default: float | None = None) -> float:
        """A finite number, zero included."""
        value = self.raw.get(self._prefix + key)
        number = self.get(key, int) if isinstance(value, int) else self.get(key, float, default)
        if not 0 <= number < 1e300:  # also of an int beyond what a float holds
            raise InputError(f"{self._name(key)} is {_short(value)}, expected a number above 0")
        return float(number)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids, written as one number or a list; () if absent."""
        value = self.raw.get(self._prefix + key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise InputError(f"{self._name(key)} is {_short(value)}, expected token ids")
        return tuple(ids)

    def section(self, key: str, default: Mapping[str, Any] | None = None) -> Fields:
        """A nested object."""
        raw = self.get(key, dict, None if default is None else dict(default))
        return Fields(raw, self.source, path=f"{self._path}{key}.")

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that is present and not among `allowed`."""
        value = self.raw.get(self._prefix + key)
        if value is not None and value not in allowed:
            choice = " or ".join(repr(one) for one in allowed if one is not None)
            raise InputError(f"{self._name(key)} is {_short(value)}, the runtime computes only {choice}")

    def _name(self, key: str) -> str:
        return f"{self.source}: {self._path}{self._prefix}{key}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
