"""The documents agree with the code and with each other: figures stand once, tables copied into README are rows of
results.md, the tree is the one on disk, options are those of the commands, pages stay short.

test_guides.py looks at what a page says on its own: its commands, its links, its imports.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tree

from dgq.convert.cli.__main__ import main
from dgq.convert.plans.recipes import recipes
from dgq.quant.schemes.registry import SCHEMES

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "recipes" / "guides"
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted(GUIDES.glob("*.md"))}
RESULTS, FORMATS = PAGES["results"], PAGES["formats"]

MOST_WORDS = {
    "README": 1200,
    "results": 4000,
    "troubleshooting": 1300,
}  # of any other guide 700, beside its code blocks
# A figure is measured if one of these units follows it.
UNITS = "GB|GiB|MB|KB|ms|s|minutes|%|nats|tokens/s|million weights"
FIGURE = re.compile(rf"(?<![\w.,/-])(\d[\d,]*(?:\.\d+)?|\.\d+) ({UNITS})(?!\w)")
# Figures that are no measurements: what somebody else has, asks for or says, and what is counted from shapes.
GIVEN = {
    "README": {"52 GB": "the source's size", "19 GB": "of an artifact", "2 GiB": "of RAM, rounded up", "95 %": "level"},
    "calibration": {
        "0.4 GB": "counted", "5.0 GB": "counted", "8.4 GB": "counted", "47 GB": "counted", "80 %": "the default",
        "4 minutes": "seen, rounded",
    },
    "contributing": {},
    "formats": {"97.7 %": "counted", "94.88 %": "counted", "88 %": "counted", "31 %": "counted", "3 %": "seen on tiny"},
    "limits": {
        "1.15 GB": "counted", "210 MB": "counted", "256 MB": "the rule", "0.7 GB": "counted", "12 %": "seen, rounded",
        "50 GB": "the Hub's rule",
    },
    "publishing": {"52 GB": "the source's size", "19 GB": "of an artifact"},
    "quickstart": {},
    "recipes": {"4.3 GiB": "counted; of dgq mix --help"},
    "serving": {"2.7 GB": "counted"},
    "troubleshooting": {
        "88 %": "counted", "51 GB": "of others' files", "16 GB": "a card", "2 GiB": "of RAM, rounded up",
    },
    "validation": {"95 %": "level"},
}  # fmt: skip

# Options whose --help says enough.
LEFT_TO_HELP = {"--help", "-h", "--output", "-o", "--no-thinking", "--version"}
# What other programs call their options, in backticks.
FOREIGN = {
    "--data-parallel-size", "--tensor-parallel-size", "--max-num-seqs", "--n-cpu-moe", "--diffusion-eb", "--dry-run",
    "--diffusion-config", "--peers",
}  # fmt: skip


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def rows(text: str) -> list[str]:
    """The rows of a page's tables, without headings' rules."""
    return [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line)]


def section(text: str, heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    assert found, f"no section {heading}"
    return found[1]


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_pages_stay_short(page: str) -> None:
    text = README if page == "README" else PAGES[page]
    counted = text.split() if page == "README" else re.findall(r"\S*\w\S*", prose(text))
    assert len(counted) <= MOST_WORDS.get(page, 700)


@pytest.mark.parametrize("heading", ["How much is lost", "How fast it is"])
def test_readmes_tables_are_rows_of_results(heading: str) -> None:
    copied = rows(section(README, heading))
    assert len(copied) >= 3
    assert [row for row in copied if row not in rows(RESULTS)] == []


def test_sizes_in_readme_are_those_of_formats() -> None:
    sizes = {name: re.search(rf"^\| `{name}` .*?([\d.]+ GB)", FORMATS, re.M) for name in recipes()}
    table = section(README, "Which format")
    for name in ("nvfp4", "q4_k_m", "bnb4", "nvfp4-all"):
        size = sizes[name]
        assert size and size[1] in table, name


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_a_measured_figure_is_one_of_results(page: str) -> None:
    """In results.md, or a size of formats.md; or it is named above as one that nobody measured here."""
    text = prose(README if page == "README" else PAGES[page])
    figures = {f"{number} {unit}" for number, unit in FIGURE.findall(text)}
    known = {f"{number} {unit}" for number, unit in FIGURE.findall(RESULTS + section(FORMATS, "Recipes"))}
    given = set(GIVEN.get(page, {}))
    assert figures - known - given == set()
    assert given - figures == set(), "is not on the page any more"


def test_every_recipe_and_scheme_has_its_line() -> None:
    named = {row.split("|")[1].strip() for row in rows(section(FORMATS, "Recipes"))[1:]}
    assert named == {f"`{name}`" for name in recipes()}
    lines = {}
    for row in rows(section(FORMATS, "Schemes"))[1:]:
        names, _, bits, _ = (cell.strip() for cell in row.strip("|").split("|"))
        split = bits.split(", ")
        lines |= dict(zip(re.findall(r"`(\w+)`", names), split, strict=True))
    assert lines == {name: f"{round(scheme.bits, 2):g}" for name, scheme in SCHEMES.items()}


def test_mix_costs_what_its_help_says() -> None:
    said = " ".join(str(main.commands["mix"].help).split())
    for figure in ("168 trials", "108 passes", "8,192", "4.3 GiB"):
        assert figure in said and figure in PAGES["recipes"], figure


def test_the_tree_is_the_one_on_disk() -> None:
    page = PAGES["architecture"]
    assert tree.with_tree(page) == page, "python tests/tools/tree.py writes it anew"


def test_every_option_is_documented_or_left_to_help() -> None:
    text = README + "".join(PAGES.values())
    missing = {
        f"dgq {name} {option}"
        for name, command in main.commands.items()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-") and option not in LEFT_TO_HELP and not re.search(rf"{option}(?![\w-])", text)
    }
    assert missing == set()


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_every_option_named_in_prose_is_one(page: str) -> None:
    text = prose(README if page == "README" else PAGES[page])
    known = {option for command in main.commands.values() for each in command.params for option in each.opts}
    known |= {option for command in main.commands.values() for each in command.params for option in each.secondary_opts}
    spans = [span for span in re.findall(r"`([^`]+)`", text) if span.startswith("--")]
    named = {word for span in spans for word in re.findall(r"--[a-z][\w-]*", span)}
    assert named - known - FOREIGN - {"--all"} == set()


@pytest.mark.parametrize("page", ["README", *PAGES])
def test_every_anchor_is_a_heading(page: str) -> None:
    text = README if page == "README" else PAGES[page]
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        other = text if not target else PAGES[Path(target).stem]
        headings = re.findall(r"^#+ (.+)$", other, re.M)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"
