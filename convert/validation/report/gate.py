"""The gate: limits from a TOML file, a section for each thing that is measured.

    [structure]   what a quantisation may not change: config, sampler, tensors kept in 16 bit, what is quantised
    [weights] [layers] [fixed] [free] [cost]      one limit for a number of the result

A limit that is not in the file is not checked. The module limits holds each limit against an artifact's result.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dgq.quant.errors import InputError

MAX_FILE = 1 << 20  # bytes of a gate


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class StructureLimits(_Section):
    """same_config, same_sampler: nothing may differ from the source; plain_error: the largest relative error of a
    tensor that is kept in 16 bit or more; keep: patterns of names of such tensors; quantized_share, experts_share: the
    least share of all parameters, and of the routed experts', that is quantised."""

    same_config: bool = False
    same_sampler: bool = False
    plain_error: float | None = None
    keep: list[str] = []
    quantized_share: float | None = None
    experts_share: float | None = None


class WeightLimits(_Section):
    """error, expert_error: the largest relative error of a tensor and of an expert; gain: a block's least and
    largest."""

    error: float | None = None
    expert_error: float | None = None
    gain: tuple[float, float] | None = None


class LayerLimits(_Section):
    """error: the largest relative error of one part of a layer on the reference's activations; plain_error: the same
    for a part without a quantised weight; router_overlap: the least share of chosen experts in common."""

    error: float | None = None
    plain_error: float | None = None
    router_overlap: float | None = None


class FixedLimits(_Section):
    """kl: the most at each noise level, nats; kl_mean: the most over all levels; top1, accepted_ratio: at least;
    conditioned_ratio: the most that KL with self-conditioning may be over KL without."""

    kl: dict[str, float] = {}
    kl_mean: float | None = None
    top1: float | None = None
    accepted_ratio: float | None = None
    conditioned_ratio: float | None = None


class FreeLimits(_Section):
    """steps_ratio, early_drop, task_drop: at most. Each is broken only where the whole interval lies beyond it."""

    steps_ratio: float | None = None
    early_drop: float | None = None
    task_drop: float | None = None


class CostLimits(_Section):
    """size_ratio: the most bytes over the source's; vram_gib: the highest peak on a GPU, GiB; step_ratio: the most
    milliseconds a step over BF16's."""

    size_ratio: float | None = None
    vram_gib: float | None = None
    step_ratio: float | None = None


class Gate(_Section):
    """All limits. name: the file that they were read from, or "default gate"."""

    name: str = ""
    structure: StructureLimits = Field(default_factory=StructureLimits)
    weights: WeightLimits = Field(default_factory=WeightLimits)
    layers: LayerLimits = Field(default_factory=LayerLimits)
    fixed: FixedLimits = Field(default_factory=FixedLimits)
    free: FreeLimits = Field(default_factory=FreeLimits)
    cost: CostLimits = Field(default_factory=CostLimits)


def read_gate(file: Path | None) -> Gate:
    """Read a TOML file of limits; without one, the gate that ships with dgq. InputError names the key that is wrong."""
    where = str(file or "default gate")
    try:
        if file is None:
            text = files("dgq.recipes").joinpath("gates", "default.toml").read_text("utf-8")
        else:
            if file.stat().st_size > MAX_FILE or not file.is_file():
                raise InputError(f"{file}: is no gate, a small TOML file")
            text = file.read_text("utf-8")
        return Gate.model_validate(tomllib.loads(text) | {"name": where})
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not readable as TOML ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {key}: {first['msg']}") from None
