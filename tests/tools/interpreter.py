"""Triton's interpreter, made quicker for tests and for sanitize.py on a CPU."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """The interpreter searches its language for builtins at every call of a kernel's function. They never change, so
    they are searched for once."""
    from triton import language
    from triton.runtime import interpreter

    known: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            known[package] = [name for name in dir(package) if language.core.is_builtin(getattr(package, name, None))]
        for name in known[package]:
            member = getattr(package, name)
            if language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
