"""Good enough or not: limits from a TOML, each held against one number of the report.

Structure comes first: what a quantisation has no business to change (config, sampler, tensors kept in 16 bit, which
weights were quantised) is compared with the source and named. A limit that is not in the TOML is not checked, and one
that this run has no number for (no GPU, no BF16 weights at hand) is said to be unchecked: it never passes in silence.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dgq.quant.errors import InputError

Json = dict[str, Any]
MAX_FILE = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class Structure(_Section):
    """same_config, same_sampler: nothing may differ from the source. plain_error: relative error of tensors kept in 16
    bit or more; keep: name patterns that must be such; quantized_share: of all parameters, experts_share: of routed
    experts', at least."""

    same_config: bool = False
    same_sampler: bool = False
    plain_error: float | None = None
    keep: list[str] = []
    quantized_share: float | None = None
    experts_share: float | None = None


class Weights(_Section):
    """error: of a tensor; expert_error: of an expert, relative; gain: least and largest of a block."""

    error: float | None = None
    expert_error: float | None = None
    gain: tuple[float, float] | None = None


class Layers(_Section):
    """error: relative, of one part of a layer on the reference's activations; plain_error: the same of a part without
    a quantised weight; router_overlap: at least."""

    error: float | None = None
    plain_error: float | None = None
    router_overlap: float | None = None


class Fixed(_Section):
    """kl: by noise level, nats; kl_mean: over all; top1, accepted_same: at least; accepted_ratio: at least;
    conditioned_ratio: KL with self-conditioning over KL without, at most."""

    kl: dict[str, float] = {}
    kl_mean: float | None = None
    top1: float | None = None
    accepted_ratio: float | None = None
    conditioned_ratio: float | None = None


class Free(_Section):
    """steps_ratio, early_drop, task_drop: at most. They are broken only where the whole interval lies beyond."""

    steps_ratio: float | None = None
    early_drop: float | None = None
    task_drop: float | None = None


class Cost(_Section):
    """size_ratio: bytes over the source's; vram_gib: peak on a GPU; step_ratio: ms a step over BF16's."""

    size_ratio: float | None = None
    vram_gib: float | None = None
    step_ratio: float | None = None


class Gate(_Section):
    name: str = ""
    structure: Structure = Field(default_factory=Structure)
    weights: Weights = Field(default_factory=Weights)
    layers: Layers = Field(default_factory=Layers)
    fixed: Fixed = Field(default_factory=Fixed)
    free: Free = Field(default_factory=Free)
    cost: Cost = Field(default_factory=Cost)


def read_gate(file: Path | None) -> Gate:
    """A TOML of limits, or dgq's own. InputError names the key that is wrong."""
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


Line = tuple[str, bool | None, str]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, the source's value, the artifact's: what is not the same (floats to float32's precision)."""
    for key in {**ours, **theirs}:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a and isinstance(a[0], dict):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from differences(x, y, f"{prefix}{key}.{i}.")
        elif isinstance(a, float | int) and isinstance(b, float | int):
            if not math.isclose(a, b, rel_tol=1e-6):
                yield prefix + key, a, b
        elif a != b:
            yield prefix + key, a, b
