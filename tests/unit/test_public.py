"""The functions of dgq.convert: each is there, typed and documented, and the package is light without them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import dgq.convert

FUNCTIONS = [name for name in dgq.convert.PUBLIC if name[0].islower()]
OPTIONS = [name for name in dgq.convert.PUBLIC if name[0].isupper()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_public_function_is_typed_and_documented(name: str) -> None:
    function = getattr(dgq.convert, name)
    assert function.__module__ == dgq.convert.PUBLIC[name] and function.__name__ == name
    assert len(inspect.getdoc(function) or "") > 100
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())
    assert len(signature.parameters) <= 7


@pytest.mark.parametrize("name", OPTIONS)
def test_options_have_defaults_and_say_what_they_are(name: str) -> None:
    """But for what must be given: the bytes that `mix` may take."""
    options = getattr(dgq.convert, name)
    assert options.__module__ == dgq.convert.PUBLIC[name] and options.__dataclass_params__.frozen
    described = inspect.getdoc(options) or ""
    fields = dataclasses.fields(options)
    assert not [one.name for one in fields if one.name not in described], "are not described"
    assert {one.name for one in fields if one.default is dataclasses.MISSING} <= {"nbytes", "tasks"}


def test_a_type_checker_is_told_of_the_same_functions() -> None:
    tree = ast.parse(Path(str(dgq.convert.__file__)).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dgq.")
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == dgq.convert.PUBLIC


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        dgq.convert.quantise  # noqa: B018
