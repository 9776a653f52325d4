"""`dgq.convert.convert`: what goes with what, then source, plan and pipeline in their order.

recipe  --+
source  --+--> plan --> memory --> imatrix, STATS, input scales --> pipeline.py writes the artifact
options --+
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgq.convert.calibration.stats import read_stats
from dgq.convert.layerwise.budget import Budget
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipe import Recipe
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.resume.target import check_target
from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hub import is_hub_id
from dgq.convert.write import pipeline
from dgq.convert.write.input_scales import requested
from dgq.convert.write.pipeline import Converted
from dgq.convert.write.ram import slices_ram
from dgq.convert.write.refine import refinable
from dgq.convert.write.settings import CALIBRATED, ConversionSettings
from dgq.quant.errors import InputError
from dgq.quant.files.imatrix import read_imatrix

Progress = Callable[[int, int, str], None]
"""Called with the bytes of the artifact that are done, its bytes in all, and what is being worked on."""


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. The defaults are those of `dgq convert`.

    recipe: a name or a .toml file; None for the format's default.
    revision: branch, tag or commit of a Hub id.
    adapters: directories of LoRA adapters to merge into the source, in order.
    effort: "stock", "fast", "standard" or "max"; None for "standard" with stats, "stock" with an imatrix, else "fast".
    stats: the file that `dgq calibrate` made of the source; "standard" and "max" need it.
    imatrix: llama.cpp's importance matrix, which weighs the columns of a GGUF of effort "stock".
    input_scale: of W4A4 NVFP4: "calibrate", or a number above 0 as text, for all experts.
    device: "auto", "cpu" or "cuda". threads: slices quantised at once; None for the CPU's cores.
    ram, vram: bytes to keep below; None for a share of what is free.
    """

    recipe: str | None = None
    revision: str | None = None
    adapters: tuple[AdapterLike, ...] = ()
    effort: str | None = None
    stats: Path | None = None
    imatrix: Path | None = None
    input_scale: str = "calibrate"
    device: str = "auto"
    threads: int | None = None
    ram: int | None = None
    vram: int | None = None


def convert(
    src: str | Path,
    to: str,
    out: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Converted:
    """Quantise a source into a new directory, or go on with what an interrupted call began there.

    src: a checkpoint directory, a Hub id or "tiny". to: "nvfp4", "bnb4" or "gguf". out: the directory to create; it
    gets its name when the artifact is complete. notice is called with each line that a user should read, before the
    work and during it. The bytes depend neither on threads nor on memory. InputError for options that exclude each
    other, a source or recipe that does not fit, too little memory or disk, and everything that is wrong with a file.
    """
    options, out = options or ConvertOptions(), Path(out).expanduser()
    notice = notice or _ignore
    effort = _effort(options)
    check_target(out)
    device = chosen_device(options.device)
    plan = _plan(str(src), find_recipe(to, options.recipe), options)
    for line in plan.notices:
        notice(line)
    advance = _adding_up(progress, plan.nbytes)
    budget = Budget(options.ram, options.vram)
    settings = ConversionSettings(
        effort,
        read_imatrix(options.imatrix) if options.imatrix else None,
        budget.threads(options.threads or os.cpu_count() or 1, *slices_ram(plan), device),
        device,
        read_stats(options.stats, plan.source) if options.stats else None,
        requested(plan, options.input_scale),
        budget,
    )
    return pipeline.convert(plan, out, settings, advance, notice)


def _effort(options: ConvertOptions) -> str:
    """The effort, given or by default. InputError if STATS or an imatrix do not go with it."""
    stats, imatrix = options.stats is not None, options.imatrix is not None
    effort = options.effort or ("standard" if stats else "stock" if imatrix else "fast")
    if (effort in CALIBRATED) != stats:
        raise InputError(
            f"--effort {effort}: {'takes no --stats' if stats else 'needs --stats; dgq calibrate makes them'}"
        )
    if imatrix and effort != "stock":
        raise InputError(f"--imatrix: weighs the columns of effort stock, not of {effort}")
    return effort


def _plan(src: str, recipe: Recipe, options: ConvertOptions) -> Plan:
    """The plan of an opened source. A Hub id is planned from its headers first, so that a recipe which does not fit is
    refused before anything large is fetched. InputError if there are STATS and the recipe has no use for them."""
    revision = options.revision
    if is_hub_id(src):
        headers = open_source(src, revision, weights=False, adapters=options.adapters)
        revision = make_plan(headers, recipe).source.where.revision
    plan = make_plan(open_source(src, revision, adapters=options.adapters), recipe)
    if options.stats and not any(refinable(tensor) for tensor in plan.tensors):
        raise InputError(
            f"--stats {options.stats}: recipe {recipe.name} quantises nothing that they serve; leave them out"
        )
    return plan


def _adding_up(progress: Progress | None, total: int) -> pipeline.Progress:
    """The pipeline's callback, which gets the bytes since its last call, in front of the caller's."""
    done = 0

    def advance(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total, name)

    return advance


def _ignore(line: str) -> None:
    """No notice is wanted."""
