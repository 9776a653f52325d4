"""`dgq.convert.plan`: what `convert` would write of a source, and what making and running it needs, from headers alone.

source (headers) + recipe  ->  plans/plan.py   every tensor of the artifact
                               needs.py        VRAM by context, RAM, disk
                               probe.py        time on this machine
source (headers)           ->  choices.py      every recipe of dgq in a few figures
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from dgq.convert.estimate import probe
from dgq.convert.estimate.choices import choices
from dgq.convert.estimate.needs import needs
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.checkpoint import open_source
from dgq.quant.errors import InputError

Choices = dict[str, dict[str, Any]]
"""Recipe name -> its figures, as choices.choices() describes them."""


@dataclass(frozen=True)
class PlanOptions:
    """How to plan.

    recipe: a name or a .toml file; None for the format's default. revision: branch, tag or commit of a Hub id.
    adapters: directories of LoRA adapters to merge into the source. threads: to convert with; None for the CPU's
    cores. probe: try for a moment how fast this machine is, for an estimate of time. image_tokens: the most that an
    image becomes, one of images.IMAGE_TOKENS; None for the model's setting.
    """

    recipe: str | None = None
    revision: str | None = None
    adapters: tuple[AdapterLike, ...] = ()
    threads: int | None = None
    probe: bool = True
    image_tokens: int | None = None


@dataclass(frozen=True)
class Forecast:
    """A plan, and the needs of it: bytes and seconds by name, as needs.needs() and, under "estimate", probe.probe()
    describe them."""

    plan: Plan
    needs: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `dgq plan --json` prints."""
        return self.plan.to_json() | self.needs


@overload
def plan(src: str | Path, to: None = None, options: PlanOptions | None = ...) -> Choices: ...


@overload
def plan(src: str | Path, to: str, options: PlanOptions | None = ...) -> Forecast: ...


@overload
def plan(src: str | Path, to: str | None, options: PlanOptions | None = ...) -> Forecast | Choices: ...


def plan(src: str | Path, to: str | None = None, options: PlanOptions | None = None) -> Forecast | Choices:
    """Plan the conversion of a source, reading its headers only.

    src: a checkpoint directory, a Hub id or "tiny". to: "nvfp4", "bnb4" or "gguf". Returns the recipe's Forecast;
    without `to`, the figures of every recipe. InputError for a source that is no
    DiffusionGemma, an unknown recipe, and a recipe of another format or without `to`.
    """
    options = options or PlanOptions()
    if to is None and options.recipe is not None:
        raise InputError("--recipe: needs --to, the recipe's format; without both, plan shows every recipe's size")
    source = open_source(str(src), options.revision, weights=False, adapters=options.adapters)
    if to is None:
        return choices(source)
    planned = make_plan(source, find_recipe(to, options.recipe))
    threads = options.threads or os.cpu_count() or 1
    needed = needs(planned, threads, options.image_tokens)
    if options.probe:
        needed["estimate"] = probe.probe(planned, threads)
    return Forecast(planned, needed)
