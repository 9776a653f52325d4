"""Reports with empty pictures, for tests of something else: drawing is a third of dgq validate's time on `tiny`."""

from __future__ import annotations

from typing import BinaryIO

import pytest


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    def save(figure: object, file: BinaryIO, **options: object) -> None:
        file.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')

    patch.setattr("matplotlib.figure.Figure.savefig", save)
