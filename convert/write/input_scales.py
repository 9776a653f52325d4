"""Where a W4A4 artifact's input scales come from (`--input-scale`), decided before anything is written.

"calibrate"      the largest activations of each expert, on the prompts that ship with dgq
a number         that, for every expert
--stats          the largest activations that `dgq calibrate` saw, in place of "calibrate"
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dgq.convert.calibration.input_scales import HEADROOM as HEADROOM_OF_AMAX
from dgq.convert.calibration.input_scales import input_scales, scales_from
from dgq.convert.calibration.stats import Stats
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.plans.plan import Plan
from dgq.convert.write.settings import Calibrate, Given, InputScaleRequest, InputScales
from dgq.quant.errors import InputError

HEADROOM = 1.2  # bytes that a calibration on a GPU takes at least, as a multiple of the weights' bytes


def requested(plan: Plan, text: str) -> InputScaleRequest | None:
    """What --input-scale asks for: "calibrate", or a positive number. None for a recipe that stores no input scales.

    InputError for any other text, and for a number if the recipe stores no input scales.
    """
    if plan.recipe.activations is None:
        if text != "calibrate":
            raise InputError(f"--input-scale: recipe {plan.recipe.name} stores no input scales")
        return None
    if text == "calibrate":
        return Calibrate()
    try:
        scale = float(torch.tensor(float(text)))
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise InputError(f"--input-scale {text!r}: expected 'calibrate' or a number above 0 that a float32 holds")
    return Given(scale)


def given(plan: Plan, request: Given) -> InputScales:
    """The same scale for every weight that carries one."""
    names = [tensor.name for tensor in plan.tensors if tensor.scheme.name == plan.recipe.activations]
    return InputScales(dict.fromkeys(names, request.value), {"method": "given", "value": request.value})


def scales_of(stats: Stats) -> InputScales:
    """Input scales from STATS: from the amax of encoder and decoder, with the headroom that a calibration gives."""
    amax: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
    for key, value in stats.tensors.items():
        if key.endswith(".amax") and ".experts." in key:
            for side, most in zip(amax, value.reshape(-1, 2).amax(0).tolist(), strict=True):
                amax[side][key.removesuffix(".amax")] = most
    scales, amax = scales_from(amax)
    return InputScales(scales, {"method": "calibrated", "headroom": HEADROOM_OF_AMAX, "amax": amax})


def calibrated(plan: Plan, device: str, step: Callable[[str], None], notice: Callable[[str], None]) -> InputScales:
    """Input scales from the largest activations on the prompts that ship with dgq.

    step is called with the state of the work; notice with a line, if the model in bfloat16 does not fit the GPU and is
    calibrated on the CPU.
    """
    device = _calibration_device(plan, device, notice)
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
