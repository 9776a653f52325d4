"""Reads a report.json of `dgq validate` back."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from dgq.convert.validation.report.result import Json, ValidationResult
from dgq.quant.errors import InputError


def read_result(file: Path, data: Json) -> ValidationResult:
    """What report.json holds. data: the file's JSON. InputError names the key that is missing or wrong."""
    try:
        return ValidationResult.from_json(data)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{file}: lacks {key!r}; it is no report.json of this dgq's validate") from None
