"""Finding recipes: dgq's own by name, anyone's by file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dgq.convert.plans.formats import FORMATS
from dgq.convert.plans.recipe import Recipe, load_recipe
from dgq.quant.errors import InputError

DEFAULTS = {each.name: each.default_recipe for each in FORMATS if each.variant is None}  # of --to without --recipe


def recipes() -> dict[str, Recipe]:
    """dgq's own by name."""
    return {name: load_recipe(path) for name, path in own_recipes().items()}


def find_recipe(to: str, name: str | None = None) -> Recipe:
    """A format's default recipe, one of dgq's by name, or a .toml file. InputError if it is for another format."""
    name = name or DEFAULTS[to]
    if name.endswith(".toml"):
        recipe = load_recipe(Path(name))
    else:
        known = own_recipes()
        if name not in known:
            raise InputError(f"unknown recipe {name!r}; dgq has {', '.join(known)}, or give a .toml file")
        recipe = load_recipe(known[name])
    if recipe.format != to:
        raise InputError(f"recipe {recipe.name} makes {recipe.format}, not {to}")
    return recipe


def own_recipes() -> dict[str, Path]:
    """dgq's recipes by name."""
    found = (Path(str(path)) for path in files("dgq.recipes").iterdir())
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem) if path.suffix == ".toml"}
