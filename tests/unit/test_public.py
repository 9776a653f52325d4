"""The functions of dgq.convert: each is there, typed and documented, and the package is light without them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
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
    options = getattr(dgq.convert, name)()
    described = inspect.getdoc(type(options)) or ""
    missing = [one.name for one in dataclasses.fields(options) if one.name not in described]
    assert not missing, f"not described: {missing}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.device = "cpu"


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


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, dgq.convert; assert not {'torch', 'numpy', 'click'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
