"""Where a W4A4 artifact's input scales come from (`--input-scale`), decided before anything is written.

"calibrate"      the largest activations of each expert, on the prompts that ship with dgq
a number         that, for every expert
--stats          the largest activations that `dgq calibrate` saw, in place of "calibrate"
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dgq.convert.calibration.activations import HEADROOM as HEADROOM_OF_AMAX
from dgq.convert.calibration.activations import input_scales, scales_from
from dgq.convert.calibration.stats import Stats
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.plans.plan import Plan
from dgq.convert.write.slices import InputScales
from dgq.quant.errors import InputError

HEADROOM = 1.2  # bytes that a calibration on a GPU takes at least, as a multiple of the weights' bytes


def find_input_scales(
    plan: Plan, asked: str, device: str, step: Callable[[str], None], notice: Callable[[str], None]
) -> Callable[[], InputScales | None]:
    """Check --input-scale now, and return the function that makes the scales when the artifact needs them.

    asked: "calibrate", or a positive number as text. step is called with the state of a calibration; notice with a
    line, if the model does not fit the GPU and is calibrated on the CPU. InputError for any other text, and for a
    number if the recipe stores no input scales.
    """
    if plan.recipe.activations is None:
        if asked != "calibrate":
            raise InputError(f"--input-scale: recipe {plan.recipe.name} stores no input scales")
        return lambda: None
    if asked == "calibrate":
        return lambda: _calibrated(plan, _calibration_device(plan, device, notice), step)
    try:
        scale = float(torch.tensor(float(asked)))
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise InputError(f"--input-scale {asked!r}: expected 'calibrate' or a number above 0 that a float32 holds")
    names = [tensor.name for tensor in plan.tensors if tensor.scheme.name == "nvfp4"]
    return lambda: InputScales(dict.fromkeys(names, scale), {"method": "given", "value": scale})


def scales_of(stats: Stats) -> InputScales:
    """Input scales from STATS: from the amax of encoder and decoder, with the headroom that a calibration gives."""
    amax: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
    for key, value in stats.tensors.items():
        if key.endswith(".amax") and ".experts." in key:
            for side, most in zip(amax, value.reshape(-1, 2).amax(0).tolist(), strict=True):
                amax[side][key.removesuffix(".amax")] = most
    scales, amax = scales_from(amax)
    return InputScales(scales, {"method": "calibrated", "headroom": HEADROOM_OF_AMAX, "amax": amax})


def _calibrated(plan: Plan, device: str, step: Callable[[str], None]) -> InputScales:
    with one_thread(device) as pool, shared_out(pool):
        scales, about = input_scales(
            plan.source, device, lambda done, total: step(f"calibrating input scales, {done}/{total}")
        )
    return InputScales(scales, about)


def _calibration_device(plan: Plan, device: str, notice: Callable[[str], None]) -> str:
    """ "cpu" in place of "cuda" for a model in bfloat16 that does not fit the GPU's free memory."""
    if device == "cpu":
        return device
    need = HEADROOM * sum(math.prod(spec.shape) * 2 for spec in plan.source.text.values())
    free = torch.cuda.mem_get_info()[0]
    if need <= free:
        return device
    notice(
        f"the BF16 model needs {need / 1e9:.0f} GB of GPU memory and {free / 1e9:.0f} GB are free: input scales are"
        " calibrated on the CPU"
    )
    return "cpu"
