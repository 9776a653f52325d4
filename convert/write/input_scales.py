"""--input-scale: where a W4A4 artifact's input scales come from, decided before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dgq.convert.calibration.input_scales import HEADROOM as HEADROOM_OF_AMAX
from dgq.convert.calibration.input_scales import input_scales, scales_from
from dgq.convert.calibration.stats import Stats
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.plans.plan import Plan
from dgq.convert.terminal import console
from dgq.convert.write.slices import InputScales
from dgq.quant.errors import InputError

HEADROOM = 1.2  # of the weights' bytes: what a calibration on a GPU needs besides them, at least


def find_input_scales(plan: Plan, asked: str, device: str) -> Callable[[], InputScales | None]:
    """How to find them. asked: "calibrate" or a positive number, the same for every expert.

    A model that does not fit the GPU is calibrated on the CPU, and the user told so. InputError at once for anything
    else, and for recipes without activations if a number was given.
    """
    if plan.recipe.activations is None:
        if asked != "calibrate":
            raise InputError(f"--input-scale: recipe {plan.recipe.name} stores no input scales")
        return lambda: None
    if asked == "calibrate":
        return lambda: _calibrated(plan, device)
    try:
        scale = float(torch.tensor(float(asked)))
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise InputError(f"--input-scale {asked!r}: expected 'calibrate' or a number above 0 that a float32 holds")
    names = [tensor.name for tensor in plan.tensors if tensor.scheme.name == "nvfp4"]
    return lambda: InputScales(dict.fromkeys(names, scale), {"method": "given", "value": scale})


def scales_of(stats: Stats) -> InputScales:
    """Input scales from STATS: of both sides' amax, with the same headroom."""
    amax: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
    for key, value in stats.tensors.items():
        if key.endswith(".amax") and ".experts." in key:
            for side, most in zip(amax, value.reshape(-1, 2).amax(0).tolist(), strict=True):
                amax[side][key.removesuffix(".amax")] = most
    scales, amax = scales_from(amax)
    return InputScales(scales, {"method": "calibrated", "headroom": HEADROOM_OF_AMAX, "amax": amax})


def _calibrated(plan: Plan, device: str) -> InputScales:
    where = _where(plan, device)
    with console.count_bar("calibrating input scales") as advance, one_thread(where) as pool, shared_out(pool):
        return InputScales(*input_scales(plan.source, where, advance))


def _where(plan: Plan, device: str) -> str:
    if device == "cpu":
        return device
    need = HEADROOM * sum(math.prod(spec.shape) * 2 for spec in plan.source.text.values())
    free = torch.cuda.mem_get_info()[0]
    if need <= free:
        return device
    console.note(
        f"the BF16 model needs {need / 1e9:.0f} GB of GPU memory and {free / 1e9:.0f} GB are free: input scales are"
        " calibrated on the CPU"
    )
    return "cpu"
