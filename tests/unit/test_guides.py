"""README and the guides say nothing that the command line does not take: every `dgq …` in a code block or between
backticks is looked up in the commands themselves, every link, recipe and import where it leads."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from dgq.convert.cli.__main__ import main
from dgq.convert.plans.recipes import find_recipe

ROOT = Path(__file__).parents[2]
GUIDES = (
    "architecture", "calibration", "contributing", "formats", "limits", "loaders", "publishing", "python", "quickstart",
    "recipes", "results", "server", "serving", "troubleshooting", "validation",
)  # fmt: skip
FOREIGN = {"vllm"}  # imported by an example, and not installed beside dgq
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (
    ROOT / "README.md", *(ROOT / "recipes" / "guides" / f"{name}.md" for name in GUIDES),
    ROOT / "recipes" / "prompts" / "README.md", ROOT / "recipes" / "tiny" / "README.md",
)}  # fmt: skip
DGQ = re.compile(r"(?:\S*/)?dgq|dgq\.convert\.cli")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def lines(block: str) -> list[str]:
    """A shell block's commands: continued lines joined, `a && b` apart."""
    joined = block.replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in re.split(r"\s&&\s", line) if part.strip()]


def spoken(text: str) -> list[str]:
    """Commands between backticks outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose) if re.match(r"dgq [a-z]", span)]


def words(line: str) -> list[str] | None:
    """What follows `dgq` in a command line, or None if it is no dgq command."""
    found = shlex.split(line, comments=True)
    at = next((i for i, word in enumerate(found) if DGQ.fullmatch(word)), None)
    return None if at is None else found[at + 1 :]


def checked(line: str, whole: bool) -> str | None:
    """What is wrong with a command, or None. whole: as it would be typed; otherwise with parts left out (…, A|B)."""
    arguments = words(line)
    if arguments is None or not arguments:
        return None
    name, rest = arguments[0], arguments[1:]
    if name not in main.commands:
        return f"{line}: no command {name}"
    command = main.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}
    for word in rest:
        if word.startswith("-") and len(word) > 1 and (option := word.partition("=")[0]) not in known:
            return f"{line}: dgq {name} has no {option}"
    if not whole or known & {"--help"} & set(rest):
        return None
    try:
        context = command.make_context(name, list(rest))
    except click.ClickException as error:
        return f"{line}: {error.format_message()}"
    if "to" in context.params and (recipe := context.params.get("recipe")):
        find_recipe(str(context.params["to"]), str(recipe))
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page: str) -> None:
    text = PAGES[page]
    typed = [line for block in blocks(text, "sh") for line in lines(block)]
    problems = [checked(line, True) for line in typed] + [checked(span, False) for span in spoken(text)]
    assert [problem for problem in problems if problem] == []


def test_the_pages_are_read() -> None:
    """The guides' commands are found at all, and each of dgq's commands is in a guide or in README."""
    typed = [words(line) for text in PAGES.values() for block in blocks(text, "sh") for line in lines(block)]
    named = {found[0] for found in typed if found}
    assert set(main.commands) <= named
    assert sum(len(spoken(text)) for text in PAGES.values()) > 15


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dgq train DIR", "no command train"),
        ("dgq convert tiny --too nvfp4 -o out", "has no --too"),
        ("dgq convert tiny --to fp4 -o out", "is not one of"),
        ("dgq convert tiny --to nvfp4", "Missing option"),
        ("dgq verify", "Missing argument"),
        ("dgq run tiny --vram lots hello", "lots"),
        ("torchrun -m dgq.convert.cli validate --fast", "has no --fast"),
        ("python3 -m venv .venv && .venv/bin/dgq plan tiny --to gguf --no-prob", "has no --no-prob"),
        ("dgq plan tiny --to gguf  # all of it", None),
    ],
)
def test_a_stale_command_is_noticed(line: str, expected: str | None) -> None:
    problems = [problem for part in lines(line) if (problem := checked(part, True))]
    assert (expected in problems[0]) if expected else not problems


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_imports_what_there_is(page: str) -> None:
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if str(module) in FOREIGN:
                    continue
                assert importlib.util.find_spec(str(module)) is not None, module
                if isinstance(node, ast.ImportFrom):
                    found = importlib.import_module(str(module))
                    assert all(hasattr(found, alias.name) for alias in node.names), module


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_file_leads_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (here / target).exists(), target
    for target in re.findall(r"`((?:recipes|tests)/[\w/.-]+)`", PAGES[page]):
        assert (ROOT / target).exists(), target


def test_readme_links_every_guide_and_the_wheel_has_them() -> None:
    there = {path.stem for path in (ROOT / "recipes" / "guides").glob("*.md")}
    assert there == set(GUIDES)
    for name in GUIDES:
        assert f"(recipes/guides/{name}.md)" in PAGES["README.md"]
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "guides/*" in packaged["dgq.recipes"]
    for picture in (ROOT / "recipes" / "guides").glob("*.svg"):
        assert picture.stat().st_size <= 200_000
        assert any(f"({prefix}{picture.name})" in text for prefix in ("", "recipes/guides/") for text in PAGES.values())


@pytest.mark.xdist_group("kept")
def test_groups_are_kept_together(request: pytest.FixtureRequest) -> None:
    """Where pytest-xdist loses its groups, each process of README's command makes all fixtures, and nothing else shows
    it: 3.8 does with pytest 9.2."""
    assert request.node.nodeid.endswith("@kept") or not getattr(request.config.option, "loadgroup", False)
