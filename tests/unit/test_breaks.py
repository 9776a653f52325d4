"""The deliberate breaks of tests/tools/breaks.toml still fit the code: each snippet stands in its file once, and each
test is there. `python tests/tools/breaks.py` tries them."""

from __future__ import annotations

import pytest
from breaks import ROOT, Break, breaks, node

BREAKS = breaks()


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(BREAKS) >= 40
    assert len({one.name for one in BREAKS}) == len(BREAKS)


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_fits(one: Break) -> None:
    assert one.fits(ROOT), f"{one.file} does not hold the snippet once; take another"
    missing = [test for test in one.tests if node(test) is None]
    assert one.tests and not missing, f"{missing}: no such test"
