"""What besides plan and target decides a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgq.convert.calibration.stats import Stats
from dgq.convert.layerwise.budget import UNSAID, Budget
from dgq.quant.files.imatrix import Imatrix

CALIBRATED = ("standard", "max")  # efforts that take STATS


@dataclass(frozen=True)
class Calibrate:
    """Input scales from the largest activations: of STATS if there are any, else of a short calibration."""

    def __str__(self) -> str:
        return "calibrate"


@dataclass(frozen=True)
class Given:
    """One input scale for every expert: a positive float32."""

    value: float

    def __str__(self) -> str:
        return str(np.float32(self.value))


InputScaleRequest = Calibrate | Given


@dataclass(frozen=True)
class InputScales:
    """Expert weight's name -> input_scale, and how they were found, for dgq.json."""

    values: Mapping[str, float]
    about: dict[str, Any]


@dataclass(frozen=True)
class ConversionSettings:
    """How a plan is carried out.

    effort: "stock", the reference quantiser's exact bytes; "fast", the best without data; "standard", with error
    feedback by `stats`; "max", and two sweeps more. imatrix: weighs the columns of effort stock in a GGUF. threads:
    slices quantised at the same time. device: "cpu" or "cuda". input_scales: where they come from, if the recipe has
    activations. budget: of memory.

    The bytes depend on neither threads nor budget; on the device with `stats`, or with calibrated input scales.
    """

    effort: str = "stock"
    imatrix: Imatrix | None = None
    threads: int = 1
    device: str = "cpu"
    stats: Stats | None = None
    input_scales: InputScaleRequest | None = Calibrate()
    budget: Budget = UNSAID
