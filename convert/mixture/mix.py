"""`dgq mix`: a recipe for a number of bytes, by what each part of this model loses in each scheme.

    parts x schemes ──> trials: KL(BF16 || that part alone in that scheme)  ──┐
                        mixture/trials.py                                     ├──> choice ──> recipe.toml
    --bytes - what is not up for choice  ─────────────────────────────────────┘

A part is a kind of matrix in some layers that follow each other, the self-conditioning, or the embedding. Losses are
added up; the whole loses less than the sum (on `tiny` the sum is 2.7 times as much), so the whole is measured in the
end, beside the format's default recipe. Rows that a scheme does not divide take another of about as many bits.

Losses lie in .NAME.mix until the recipe is written. The same command goes on from there and ends in the same bytes. A
command that differs in --bytes alone goes on as well, with the losses that are measured by then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dgq.convert.layerwise.budget import Budget
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import chunks, documents
from dgq.convert.mixture.choice import Option, choose
from dgq.convert.mixture.parts import assigned, parts
from dgq.convert.mixture.recipe_file import BF16, Target, recipe, recipe_text
from dgq.convert.mixture.trials import Meter, Trial, batches
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipes import DEFAULTS, find_recipe
from dgq.convert.resume.target import check_target
from dgq.convert.resume.work import UnitResult, Work
from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hashes import dgq_version
from dgq.quant.errors import InputError
from dgq.quant.types import Scheme

EACH_LAYER, GROUPS = 8, 5  # layers up to which each is a group of its own; groups of more layers
Progress = Callable[[int, int], None]  # steps done, steps in all
Notice = Callable[[str], None]


@dataclass(frozen=True)
class MixOptions:
    """The options of `dgq mix`, with its defaults.

    nbytes: of all tensors of the artifact at most. prompts: to measure on, a .jsonl of {"text"} or {"messages"}, or a
    .txt; None: those that ship with dgq. seed: of cuts and noise. groups: of layers that are decided on together; None:
    each layer up to EACH_LAYER layers, GROUPS of more. chunks: of samples to measure on, 8,192 tokens each.

    revision: branch, tag or commit of a Hub source. adapters: directories of LoRA adapters that are merged into the
    source, in order. device: "auto", "cpu" or "cuda". threads: slices quantised at once; None: CPU cores. ram, vram:
    bytes to keep below; None: most of what is free. The recipe does not depend on the last three.
    """

    nbytes: int
    prompts: Path | None = None
    seed: int = 0
    groups: int | None = None
    chunks: int = 2
    revision: str | None = None
    adapters: tuple[AdapterLike, ...] = ()
    device: str = "auto"
    threads: int | None = None
    ram: int | None = None
    vram: int | None = None


def mix(
    src: str,
    to: Target,
    out: Path,
    options: MixOptions,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Write a recipe to the file `out` (.toml), or go on where the same call broke off; what was measured and chosen.

    src: a directory, a Hub id, or "tiny"; to: the artifact's format. progress: called with steps done and steps in all;
    notice: with lines for the user. The result has "bytes", "bits_per_weight", "kl" in nats a position ("predicted" and
    "measured"), "default" (the same of the format's default recipe), and every part with its options. InputError for a
    number of bytes that no choice keeps, or that BF16 keeps; for an `out` that exists; for too little memory or disk.
    """
    source = open_source(src, options.revision, adapters=options.adapters)
    return _Mixing(source, to, out.expanduser(), options, progress or _ignore, notice or _ignore).run()


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True)
class _Outcome:
    """What was measured and chosen. options: of each part; chosen: of each part the one; kl: of the chosen plan, and of
    the default recipe if there is one."""

    options: list[list[Option]]
    chosen: list[Option]
    plan: Plan
    kl: list[float]


class _Mixing:
    """One run over an open source."""

    def __init__(
        self, source: Source, to: Target, out: Path, options: MixOptions, progress: Progress, notice: Notice
    ) -> None:
        self._began = time.perf_counter()
        self._source, self._to, self._out, self._options = source, to, out, options
        self._progress, self._notice = progress, notice
        self._device = chosen_device(options.device)
        _check_out(out)
        layers = len(source.config.layers)
        self._groups = min(options.groups or (layers if layers <= EACH_LAYER else GROUPS), layers)
        self._parts = parts(source, to, self._groups)
        self._trials = [trial for part in self._parts for trial in part.trials.values()]
        least = assigned(self._parts, [min(part.sizes, key=part.sizes.__getitem__) for part in self._parts])
        self._smallest = make_plan(source, recipe(to, least))
        self._fixed = self._smallest.nbytes - sum(min(part.sizes.values()) for part in self._parts)
        self._check_bytes()
        self._chunks, self._data = _samples(source, options)
        self._stock = _stock(source, to)

    def run(self) -> dict[str, Any]:
        """Measure, choose, and write the recipe; see mix()."""
        options = self._options
        identity = {
            "dgq": dgq_version(), "weights": self._source.digest(), "data": self._data, "seed": options.seed,
            "chunks": options.chunks, "format": self._to, "groups": self._groups, "device": self._device,
        }  # fmt: skip
        threads, memory = options.threads or os.cpu_count() or 1, Budget(options.ram, options.vram)
        with Work(self._out, identity, _ignore, self._notice, "mix") as work:
            with Meter(self._smallest, self._chunks, work.path, self._device, threads, memory) as meter:
                outcome = self._measured(meter, work)
            about = self._about(outcome)
            _write(outcome.plan, about, work.path / "recipe", self._out)
        return about

    def _check_bytes(self) -> None:
        """InputError if the bytes asked for leave no choice."""
        asked, least, to = self._options.nbytes, self._smallest.nbytes, self._to
        whole = self._fixed + sum(part.sizes[BF16] for part in self._parts)
        if asked < least:
            raise InputError(f"--bytes {asked:,}: {to} takes {least:,} at least, everything in its fewest bits")
        if asked >= whole:
            raise InputError(f"--bytes {asked:,}: {whole:,} hold everything in BF16; there is nothing to choose")

    def _measured(self, meter: Meter, work: Work) -> _Outcome:
        """Measure all trials, choose, and measure the chosen whole beside the default recipe."""
        step = self._steps(meter, work)
        meter.prepare(step)
        options = self._losses(meter, work, step)
        room = self._options.nbytes - self._fixed
        chosen = [each[i] for each, i in zip(options, choose(options, room), strict=True)]
        plan = make_plan(self._source, recipe(self._to, assigned(self._parts, [option.scheme for option in chosen])))
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"label": f"mixed-{_bits(plan):.2f}bpw"}))
        both = [_quantised(one) for one in (plan, self._stock) if one]
        measured = work.each(f"whole-{self._options.nbytes}", 1, lambda _: _kl(meter, both, step))(0)
        return _Outcome(options, chosen, plan, measured["kl"].tolist())

    def _steps(self, meter: Meter, work: Work) -> Callable[[], None]:
        """What is called after each pass of all chunks through a layer. BF16 takes two of them a layer, the chosen
        whole and the default recipe one each, and trials theirs, unless an earlier run did them."""
        layers = len(self._source.config.layers)
        left = [
            self._trials[i]
            for unit, batch in enumerate(batches(self._trials))
            if not work.has("trials", unit)
            for i in batch
        ]
        done, total = 0, (3 + (self._stock is not None)) * layers + meter.steps(left)

        def step() -> None:
            nonlocal done
            done += 1
            self._progress(done, total)

        self._notice(f"{len(self._trials)} trials of {len(self._parts)} parts: as much work as {total / layers:.0f}"
                     f" passes of {meter.tokens:,} tokens through the model")  # fmt: skip
        return step

    def _losses(self, meter: Meter, work: Work, step: Callable[[], None]) -> list[list[Option]]:
        """The options of each part, BF16 last."""
        together = batches(self._trials)
        results = work.each("trials", len(together), lambda n: _kl(meter, [self._trials[i] for i in together[n]], step))
        losses = {
            i: float(kl) for n, batch in enumerate(together) for i, kl in zip(batch, results(n)["kl"], strict=True)
        }
        lost = iter(losses[i] for i in range(len(self._trials)))
        return [
            [*(Option(s, part.sizes[s], next(lost)) for s in part.trials), Option(BF16, part.sizes[BF16], 0.0)]
            for part in self._parts
        ]

    def _about(self, outcome: _Outcome) -> dict[str, Any]:
        plan, stock = outcome.plan, self._stock
        return {
            "output": str(self._out), "format": self._to, "budget": self._options.nbytes, "bytes": plan.nbytes,
            "bits_per_weight": _bits(plan),
            "kl": {"predicted": sum(option.kl for option in outcome.chosen), "measured": outcome.kl[0]},
            "default": stock and {"recipe": DEFAULTS[self._to], "bytes": stock.nbytes, "kl": outcome.kl[1]},
            "data": self._data, "seed": self._options.seed, "tokens": sum(chunk.tokens for chunk in self._chunks),
            "trials": len(self._trials),
            "parts": [
                {"part": part.name, "chosen": pick.scheme, "weights": list(part.weights),
                 "options": [option._asdict() for option in each]}
                for part, pick, each in zip(self._parts, outcome.chosen, outcome.options, strict=True)
            ],
            "seconds": round(time.perf_counter() - self._began, 1),
        }  # fmt: skip


def _check_out(out: Path) -> None:
    """InputError if the recipe cannot be written there, as far as that is known before the work."""
    check_target(out)
    if out.suffix != ".toml":
        raise InputError(f"-o {out}: a recipe's name ends in .toml")
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: there is no directory {out.absolute().parent}")


def _samples(source: Source, options: MixOptions) -> tuple[list[Chunk], dict[str, Any]]:
    """The chunks to measure on, and the name and SHA-256 of their prompts. Open documents have no canvas."""
    read, data = documents(source, options.prompts)
    closed = [document for document in read if not document.open]
    if not closed:
        raise InputError(
            f"{options.prompts}: holds no text and no chat with an answer, and nothing else has a canvas to measure on"
        )
    return chunks(closed, options.seed, 0, source)[: options.chunks], data


def _kl(meter: Meter, trials: Sequence[Trial], step: Callable[[], None]) -> UnitResult:
    return {"kl": torch.tensor(meter.kl(trials, step), dtype=torch.float64)}


def _bits(plan: Plan) -> float:
    """Bits a weight."""
    return round(8 * plan.nbytes / plan.params, 4)


def _quantised(plan: Plan) -> dict[str, Scheme]:
    return {t.source: t.scheme for t in plan.weights if t.source and t.scheme.bits < 16 and not t.vision}


def _stock(source: Source, to: Target) -> Plan | None:
    """The plan by the format's default recipe, if that fits the model."""
    try:
        return make_plan(source, find_recipe(to))
    except InputError:
        return None


def _write(plan: Plan, about: dict[str, Any], draft: Path, out: Path) -> None:
    """The recipe's file, whole or not at all."""
    try:
        draft.write_text(recipe_text(plan.recipe, about), "utf-8")
        draft.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from None
