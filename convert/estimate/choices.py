"""The recipes of dgq side by side for one source, from its headers alone."""

from __future__ import annotations

from typing import Any

from dgq.convert.estimate.needs import CONTEXTS, Runtime
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipe import Recipe
from dgq.convert.plans.recipes import recipes
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError


def choices(source: Source) -> dict[str, dict[str, Any]]:
    """Recipe name -> its figures for this source.

    format, description: the recipe's. bytes: of all tensors. bits_per_weight. quantized_share: of the parameters, those
    in fewer than 16 bits. opens_in: the programs that open the artifact, if only dgq does; else None. vram: bytes on
    the GPU for short answers. fits: the cards that hold these. A recipe that does not fit the source has "refused", the
    reason, in place of the figures.
    """
    return {name: _figures(source, recipe) for name, recipe in recipes().items()}


def _figures(source: Source, recipe: Recipe) -> dict[str, Any]:
    about = {"format": recipe.format, "description": recipe.description}
    try:
        plan = make_plan(source, recipe)
    except InputError as error:
        return about | {"refused": str(error)}
    vram = Runtime.of(plan).vram(min(CONTEXTS[0], source.config.context))
    return about | {
        "bytes": plan.nbytes,
        "bits_per_weight": round(8 * plan.nbytes / plan.params, 4),
        "quantized_share": round(plan.quantized_share, 6),
        "opens_in": recipe.writes.opens_in,
        "vram": vram["total"],
        "fits": vram["fits"],
    }
