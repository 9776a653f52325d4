"""`dgq plan SRC` without a format: what each of dgq's recipes would take, side by side, from headers alone."""

from __future__ import annotations

from typing import Any

from dgq.convert.estimate.needs import CONTEXTS, Runtime
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import recipes
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError


def choices(source: Source) -> dict[str, dict[str, Any]]:
    """recipe -> its format, bytes of tensors, bits a weight, share of the parameters in fewer than 16 bits, bytes on
    the GPU by CONTEXTS' least, cards that hold that; or "refused": why it does not fit this model."""
    taken: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes().items():
        about = {"format": recipe.format, "description": recipe.description}
        try:
            plan = make_plan(source, recipe)
        except InputError as error:
            taken[name] = about | {"refused": str(error)}
            continue
        needed = Runtime.of(plan).vram(min(CONTEXTS[0], source.config.context))
        taken[name] = about | {
            "bytes": plan.nbytes,
            "bits_per_weight": round(8 * plan.nbytes / plan.params, 4),
            "quantized_share": round(plan.quantized_share, 6),
            "opens_in": recipe.writes.opens_in,
            "vram": needed["total"],
            "fits": needed["fits"],
        }
    return taken
