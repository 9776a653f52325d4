"""The report of `dgq validate` as a page: its structure, and in a real browser on a desk, on a phone and in print."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dgq.convert.validation.report.render import page, triple, write
from dgq.convert.validation.report.result import ValidationResult

pytestmark = pytest.mark.xdist_group("validate-page")
PLOTS = {"frontier", "frontier-steps", "kl-by-level", "top-by-level", "kl-by-group", "kl-by-position", "steps", "tasks",
         "layers-0", "layers-1", "router", "coverage", "sensitivity-0", "sensitivity-1"}  # fmt: skip
TABLES = {"summary", "fixed", "groups", "free", "weights-1", "weights-2", "sensitivity-1", "sensitivity-2", "cost",
          "gate", "texts"}  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """What a page is made of: images by their figure's id, tables as rows of numbers of cells, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, dict[str, str | None]] = {}
        self.tables: dict[str, list[int]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._figure = self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "figure":
            self._figure = str(found["id"])
        elif tag == "img":
            self.images[self._figure.removeprefix("plot-")] = found
        elif tag == "table":
            self._table = str(found["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append(0)
        elif tag in ("td", "th"):
            self.tables[self._table][-1] += 1

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report(tiny_report: Path) -> Path:
    return tiny_report


def test_every_picture_and_table_is_there_and_whole(report: Path) -> None:
    found = Page((report / "report.html").read_text())
    assert found.images.keys() == PLOTS and found.tables.keys() == TABLES
    for key, image in found.images.items():
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/svg+xml;base64" and len(str(image["alt"])) > 20, key
        picture = ElementTree.fromstring(base64.b64decode(data))
        drawn = [element for element in picture.iter() if element.tag.endswith("}path")]
        assert len(drawn) > 10, key
    for key, rows in found.tables.items():
        assert len(rows) > 1 and len(set(rows)) == 1, (key, rows)
    data = json.loads((report / "report.json").read_text())
    for one in data["artifacts"]:
        assert "".join(triple(one["fixed"]["mean"]["kl"])) in found.text
        assert all(line["said"] in found.text for line in one["gate"])


def test_nothing_comes_from_elsewhere_and_nothing_runs(report: Path) -> None:
    found = Page((report / "report.html").read_text())
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object", "embed")]
    links = [value for _, attributes in found.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(str(link).startswith("data:") for link in links)
    assert "url(" not in (report / "report.html").read_text()


def test_a_strangers_texts_are_only_texts(report: Path, tmp_path: Path) -> None:
    data = json.loads((report / "report.json").read_text())
    hostile = "<script>alert(1)</script> $x_{1$ \\frac \u202e &amp; {{ 7 * 7 }}"
    for one in data["artifacts"]:
        one["name"] += hostile
        one["fixed"]["by_group"] = {hostile + group: row for group, row in one["fixed"]["by_group"].items()}
    for row in data["texts"]:
        row["prompt"] = row["reference"] = hostile
        row["written"] = {name + hostile: text for name, text in row["written"].items()}
    found = Page(page(ValidationResult.from_json(data)))
    assert not [tag for tag, _ in found.tags if tag == "script"] and hostile in found.text
    write(ValidationResult.from_json(data), tmp_path / "out")
    assert hostile in (tmp_path / "out" / "texts.csv").read_text()


def test_reports_with_less_in_them(report: Path) -> None:
    """Without BF16 weights, exact answers or a passed gate; of one artifact that is the model itself."""
    data = json.loads((report / "report.json").read_text())
    data["artifacts"] = data["artifacts"][:1]
    one, base = data["artifacts"][0], data["reference"]
    without = copy.deepcopy(data)
    without["reference"]["weights_compared"] = False
    for key in ("weights", "layers", "sensitivity"):
        del without["artifacts"][0][key]
    assert not {"weights-1", "sensitivity-1"} & Page(page(ValidationResult.from_json(without))).tables.keys()
    for side in (one["free"], base["free"]):
        side["score"], side["by_task"] = None, {}
    del one["free"]["score_drop"]
    one["ok"], one["gate"][0]["ok"], one["gate"][0]["said"] = False, False, "config: hidden is 1"
    one["sensitivity"] = []
    for row in (one["fixed"]["mean"], *one["fixed"]["by_group"].values()):
        row["kl"] = [0.0, 0.0, 0.0]
    text = Page(page(ValidationResult.from_json(data))).text
    assert "limits that are broken" in text and text.count("config: hidden is 1") == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.00123, 0.00098, 0.00151], ("0.00123", "0.00098 to 0.00151")),
        ([1.0052, 0.98, 1.03], ("1.005", "0.980 to 1.030")),
        ([2.5e-6, 1e-6, 4e-6], ("2.5e-06", "1.0e-06 to 4.0e-06")),
        ([0.0, 0.0, 0.0], ("0", "")),
        ([12.0625, 4.6, 20.6], ("12.1", "4.6 to 20.6")),
        (None, ("–", "")),
    ],
)
def test_figures_have_as_many_digits_as_their_bounds_warrant(values: list[float] | None, said: tuple[str, str]) -> None:
    assert triple(values) == said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one. CI installs it; elsewhere the test is passed over where there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None and "CI" not in os.environ:
        pytest.skip(f"no browser: {', '.join(BROWSERS)}")
    from playwright.sync_api import sync_playwright

    assert path is not None, "CI has a browser"
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_a_browser_draws_it_all(report: Path, browser: Any, width: int) -> None:
    view = browser.new_page(viewport={"width": width, "height": 844})
    said: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: None if request.url.startswith("data:") else said.append(request.url))
    address = (report / "report.html").as_uri()
    view.goto(address, wait_until="load")
    assert said == [address], "no message, no request but the page itself"
    images = view.evaluate(
        "[...document.images].map(i => [i.closest('figure').id, i.complete && i.naturalWidth > 0,"
        " i.getBoundingClientRect().width, i.getBoundingClientRect().height])"
    )
    assert {key.removeprefix("plot-") for key, *_ in images} == PLOTS
    assert all(drawn and 250 < wide <= width and tall > 150 for _, drawn, wide, tall in images), images
    tables = view.evaluate(
        "[...document.querySelectorAll('table')].map(t => [t.id, t.getBoundingClientRect().height,"
        " t.parentElement.getBoundingClientRect().right])"
    )
    assert {key for key, *_ in tables} == TABLES
    assert all(tall > 40 and right <= width for _, tall, right in tables), tables
    assert view.evaluate("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    blank = view.evaluate("document.body.innerText").splitlines()
    assert not [line for line in blank if "None" in line or "nan" in line.lower().split() or "Undefined" in line]
    if width > 1000:  # A4 upright, less its margins
        view.emulate_media(media="print")
        view.set_viewport_size({"width": 703, "height": 1000})
        wide = "[...document.querySelectorAll('table, img')].map(e => e.getBoundingClientRect().right)"
        assert max(view.evaluate(wide)) <= 703, "nothing is cut off at the paper's edge"
        assert view.pdf(format="A4").startswith(b"%PDF")
    view.close()
