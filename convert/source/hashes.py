"""What tells files and versions apart: dgq's version, the SHA-256 of texts and files."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any


def dgq_version() -> str:
    """The version of the installed dgq."""
    return version("dgq")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(text: str | bytes) -> str:
    """The SHA-256 of a text (as UTF-8) or of bytes, in hex digits."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's {"bytes", "sha256"}, as dgq.json holds it."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
