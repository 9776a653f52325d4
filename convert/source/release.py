"""The model that was released: its repository, its commit, and what its small files are, by their SHA-256.

An artifact that names this commit as its source, or that has this shape, is held against these.
"""

from __future__ import annotations

from typing import NamedTuple

REPOSITORY = "google/diffusiongemma-26B-A4B-it"
REVISION = "f7f5b7f5fa82ffc52addd066915886d497f5517b"
LICENSE = "apache-2.0"  # as the Hub names it
SHAPE = {"layers": 30, "hidden": 2816, "experts": 128, "vocab": 262_144}
TEMPLATE, SAMPLER, CONFIG = "chat_template.jinja", "generation_config.json", "config.json"


class ReleasedFile(NamedTuple):
    """bytes: None where it is not known."""

    sha256: str
    bytes: int | None = None


FILES = {
    SAMPLER: ReleasedFile("99334f763c3dbe8b161aeaca1c150a05344299fda2d2e4a0e1d342c744461200"),
    TEMPLATE: ReleasedFile("9aeb7eac68ad87bba7567e9d4597ff203e5609f1b427d9e823437d0142cc61bf", 18575),
    CONFIG: ReleasedFile("13b11d2fe87302cc2332c64eb9eb4ac305d9b8a123ffe9c5cb5b1920fc70c506"),
}
