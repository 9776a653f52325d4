"""A recipe decides, from names and shapes alone, which scheme each tensor gets: ordered rules, first match wins.

Recipes are TOML files (dgq's own lie in recipes/); this reads them and applies them. Nothing is decided while
converting: `assign` maps the whole list of tensors to schemes before a byte is read, and refuses there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dgq.convert.plans.format import Format
from dgq.convert.plans.formats import FORMATS, format_of
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_whole
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme
from dgq.runtime.shape.names import layer_of

MAX_RECIPE = 1 << 20  # bytes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """One line of a recipe. match is a shell pattern on the tensor's name in the artifact; experts: the number of a
    model's experts that the rule is for, None for all."""

    match: str
    scheme: str
    more_bits: str | None = None
    counted: Literal["layer", "tensor"] = "layer"
    max_dims: int | None = None
    experts: int | None = None

    @field_validator("scheme", "more_bits")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEMES:
            raise ValueError(f"unknown scheme {name!r} (dgq has {', '.join(SCHEMES)})")
        return name

    def matches(self, name: str, shape: tuple[int, ...], experts: int) -> bool:
        if self.experts not in (None, experts):
            return False
        return fnmatchcase(name, self.match) and (self.max_dims is None or len(shape) <= self.max_dims)


class Recipe(_Strict):
    """An artifact's policy: rules for tensors, a fallback for rows that don't fit a scheme's block."""

    name: str
    format: Literal["gguf", "nvfp4", "bnb4"]
    label: str = Field(pattern=r"^[\w.+-]{1,64}$")  # part of a file's name
    description: str
    file_type: int = 0  # general.file_type of a .gguf
    layout: Literal["dgq"] | None = None  # of nvfp4: dgq's own instead of modelopt's, which holds experts alone
    activations: Literal["nvfp4"] | None = None  # W4A4: input scales are stored beside the weights
    max_16bit_share: float = Field(ge=0, le=1)
    refuse_experts: tuple[int, ...] = ()
    rule: tuple[Rule, ...]
    fallback: dict[str, str] = {}

    @model_validator(mode="after")
    def _schemes_of_the_format(self) -> Recipe:
        form = format_of(self.format, self.layout)
        if form is None:
            others = " and ".join(sorted({each.name for each in FORMATS if each.variant == self.layout}))
            raise ValueError(f"{self.format} has no layout {self.layout!r}, {others} has")
        if wrong := sorted(self.schemes - form.schemes):
            has = f"it has {', '.join(sorted(form.schemes))}"
            raise ValueError(f"{form.title} has no scheme {wrong[0]!r} ({has}){_other_layout(form, wrong)}")
        if refusal := form.refusal(self.schemes):
            raise ValueError(refusal)
        if self.activations and not form.has_input_scales:
            raise ValueError(f"{form.title} has no place for activations {self.activations!r}")
        return self

    @property
    def writes(self) -> Format:
        """The format of the artifact, as an object."""
        form = format_of(self.format, self.layout)
        assert form is not None
        return form

    @property
    def schemes(self) -> set[str]:
        """Every scheme that it names."""
        named = {rule.scheme for rule in self.rule} | {rule.more_bits for rule in self.rule if rule.more_bits}
        return named | set(self.fallback) | set(self.fallback.values())

    def assign(self, shapes: Mapping[str, tuple[int, ...]], layers: int, experts: int) -> dict[str, Scheme]:
        """name -> scheme for every tensor; shapes in the artifact's order, `layers` and `experts` the model's counts.

        InputError, naming the tensor, if no rule matches or its rows fit neither the scheme nor the fallback.
        """
        chosen = {name: self._rule(name, shape, experts) for name, shape in shapes.items()}
        schemes: dict[str, Scheme] = {}
        for name, shape in shapes.items():
            rule = chosen[name]
            index: int | None
            if rule.counted == "tensor":
                peers = [n for n, r in chosen.items() if r is rule]
                index, count = peers.index(name), len(peers)
            else:
                index, count = layer_of(name), layers
            better = rule.more_bits is not None and index is not None and use_more_bits(index, count)
            schemes[name] = self._fitting(name, shape, rule.more_bits if better and rule.more_bits else rule.scheme)
        return schemes

    def _rule(self, name: str, shape: tuple[int, ...], experts: int) -> Rule:
        for rule in self.rule:
            if rule.matches(name, shape, experts):
                return rule
        raise InputError(f"recipe {self.name}: no rule matches tensor {name} {list(shape)}; add one")

    def _fitting(self, name: str, shape: tuple[int, ...], scheme: str) -> Scheme:
        for candidate in (scheme, self.fallback.get(scheme)):
            if candidate is not None and (shape or (1,))[-1] % SCHEMES[candidate].block == 0:
                return SCHEMES[candidate]
        block = f"{scheme}'s block of {SCHEMES[scheme].block}"
        more = ", nor does a fallback of it fit" if scheme in self.fallback else ""
        raise InputError(f"recipe {self.name}: rows of {shape[-1]} in {name} are no multiple of {block}{more}")


def _other_layout(form: Format, wrong: list[str]) -> str:
    """Which other layout of the format has the schemes that this one lacks, for an error; "" if none has."""
    others = [each for each in FORMATS if each.name == form.name and set(wrong) <= each.schemes]
    return "".join(f'; layout = "{each.variant}" has, which opens in {each.variant} only' for each in others)


def use_more_bits(index: int, count: int) -> bool:
    """llama.cpp's choice of the layers that deserve more bits: first and last eighth, every third in between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; InputError names the file and the key that is wrong."""
    try:
        recipe = Recipe.model_validate(tomllib.loads(read_whole(path, MAX_RECIPE).decode()))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except ValidationError as error:  # which is a ValueError
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as TOML ({error})") from None
    return recipe
