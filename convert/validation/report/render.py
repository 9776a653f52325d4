"""A validation's renderings: one HTML file that needs nothing else, and everything in it as JSON and CSV.

    REPORT/report.html   pictures and tables; no network, no script
    REPORT/report.json   all numbers: ValidationResult.to_json()
    REPORT/*.csv         fixed, positions, free, tasks, steps, weights, layers, experts, sensitivity, gate, texts,
                         evaluation

The directory is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgq.convert.validation.report.plots import plots
from dgq.convert.validation.report.result import (
    ArtifactResult,
    Cost,
    Divergence,
    FreeResult,
    ValidationResult,
    WeightError,
    as_json,
)

Rows = Iterator[list[Any]]
WORST = 12  # tensors shown


def write(report: ValidationResult, out: Path) -> None:
    """Make the directory `out`, which must not exist, with report.html, report.json and the CSV files in it."""
    partial = out.absolute().parent / f".{out.name[:200]}.report"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n"
    (partial / "report.json").write_text(text, "utf-8")
    for name, rows in tables(report).items():
        with (partial / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    (partial / "report.html").write_text(page(report), "utf-8")
    partial.replace(out)


def page(report: ValidationResult) -> str:
    """The text of report.html. The artifacts with the smallest KL come first."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def figure_and_bounds(*values: Any) -> Markup:
        return Markup("{}<small>{}</small>").format(*triple(*values))

    environment.filters |= {"triple": figure_and_bounds, "percent": lambda x: f"{100 * x:.2f} %", "number": number}
    template = files("dgq.recipes").joinpath("report", "report.html.jinja").read_text("utf-8")
    ranked = sorted(report.artifacts, key=lambda one: one.fixed.mean.kl.figure)
    worst = {one.name: _worst(one.weights) for one in ranked if one.weights}
    return environment.from_string(template).render(report=report, ranked=ranked, plots=plots(report), worst=worst)


def _worst(weights: Sequence[WeightError]) -> list[WeightError]:
    return sorted(weights, key=lambda row: -row.error)[:WORST]


def triple(values: Sequence[float] | None, scale: float = 1.0, unit: str = "") -> tuple[str, str]:
    """A figure and its bounds as text, to as many digits as the bounds warrant. Equal bounds are left out.

    values: figure, lower and upper bound, None where there is nothing to show; scale: what they are multiplied by;
    unit: what follows the figure.
    """
    if values is None:
        return "–", ""
    middle, low, high = (scale * value for value in values)
    digits = _digits((high - low) / 2, middle)
    form = ".1e" if 0 < max(abs(low), abs(high)) < 1e-4 else f".{digits}f"
    bounds = "" if low == high else f"{low:{form}} to {high:{form}}"
    return f"{middle:{form}}{unit}", bounds


def _digits(spread: float, middle: float) -> int:
    """The number of decimals that show two figures of the spread."""
    size = abs(spread) or abs(middle) / 1000
    return next((digits for digits in range(7) if size * 10**digits >= 9.5), 7) if size else 0


def number(value: float | None) -> str:
    """A number as text, to three figures."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def tables(report: ValidationResult) -> dict[str, Rows]:
    """The name of each CSV file -> its rows, headings first."""
    return {
        "fixed": _fixed(report), "positions": _positions(report), "free": _free(report), "tasks": _tasks(report),
        "steps": _steps(report), "weights": _listed(report, "weights"), "layers": _listed(report, "layers"),
        "experts": _experts(report), "sensitivity": _listed(report, "sensitivity"), "gate": _listed(report, "gate"),
        "texts": _texts(report), **({"evaluation": _evaluation(report)} if report.evaluation else {}),
    }  # fmt: skip


def _fixed(report: ValidationResult) -> Rows:
    yield ["artifact", "by", "value", "condition", "measure", "figure", "low", "high"]
    measures = [field.name for field in fields(Divergence)]
    for one in report.artifacts:
        for by, value, condition, row in _divergences(one):
            yield from ([one.name, by, value, condition, name, *getattr(row, name)] for name in measures)


def _divergences(one: ArtifactResult) -> Iterator[tuple[str, str, str, Divergence]]:
    """What the divergence is taken by, which one of these, the condition, and the divergence."""
    fixed = one.fixed
    yield "all", "", "both", fixed.mean
    for condition in ("plain", "conditioned"):
        yield "all", "", condition, getattr(fixed.by_condition, condition)
    for level, at_level in fixed.by_level.items():
        for condition in ("both", "plain", "conditioned"):
            yield "level", level, condition, getattr(at_level, condition)
    for group, row in fixed.by_group.items():
        yield "group", group, "both", row


def _positions(report: ValidationResult) -> Rows:
    yield ["artifact", "position", "kl", "top1"]
    for one in report.artifacts:
        place = one.fixed.by_position
        for i, (kl, top1) in enumerate(zip(place.kl, place.top1, strict=True)):
            yield [one.name, i, kl, top1]


def _sides(report: ValidationResult) -> list[tuple[str, FreeResult, Cost]]:
    """Name, free run and cost of the reference, if there is a run of it, and of each artifact."""
    base = report.reference
    sides: list[tuple[str, FreeResult, Cost]] = [(base.name, base.free, base.cost)] if base.free else []
    return [*sides, *((one.name, one.free, one.cost) for one in report.artifacts)]


def _free(report: ValidationResult) -> Rows:
    yield ["model", "measure", "figure", "low", "high"]
    for name, free, cost in _sides(report):
        for key, value in (as_json(free) | as_json(cost)).items():
            if isinstance(value, int | float):
                yield [name, key, value, "", ""]
            elif isinstance(value, list | tuple):
                yield [name, key, *value]


def _tasks(report: ValidationResult) -> Rows:
    yield ["model", "task", "right", "asked"]
    for name, free, _ in _sides(report):
        yield from ([name, task, *counts] for task, counts in free.by_task.items())


def _steps(report: ValidationResult) -> Rows:
    yield ["model", "steps", "canvases"]
    for name, free, _ in _sides(report):
        yield from ([name, steps, count] for steps, count in free.histogram.items())


def _listed(report: ValidationResult, key: str) -> Rows:
    """The rows of one list of each artifact. A recovered KL becomes three columns, and lists are left to a file of
    their own."""
    headed = False
    for one in report.artifacts:
        for row in getattr(one, key) or ():
            flat: dict[str, Any] = {}
            for name, value in as_json(row).items():
                if name == "recovered":
                    flat |= dict(zip((name, name + "_low", name + "_high"), value, strict=True))
                elif not isinstance(value, list | tuple):
                    flat[name] = value
            if not headed:
                yield ["artifact", *flat]
                headed = True
            yield [one.name, *flat.values()]


def _experts(report: ValidationResult) -> Rows:
    yield ["artifact", "layer", "expert", "tokens_bf16", "tokens_artifact"]
    for one in report.artifacts:
        for row in one.layers or ():
            for expert, counts in enumerate(zip(row.tokens, row.tokens_artifact, strict=True)):
                yield [one.name, row.layer, expert, *counts]


def _texts(report: ValidationResult) -> Rows:
    yield ["group", "prompt", "answer", "model", "text"]
    for row in report.texts or ():
        for name, text in {report.reference.name: row.reference, **row.written}.items():
            yield [row.group, row.prompt, row.answer, name, text]


def _evaluation(report: ValidationResult) -> Rows:
    """A row for each metric of the harness's tasks."""
    yield ["model", "task", "metric", "filter", "value", "stderr", "samples", "steps", "unsettled", "blocks", "seconds"]
    for model in report.evaluation.models if report.evaluation else ():
        for task in model.tasks:
            for score in task.scores:
                yield [
                    model.name, task.task, score.metric, score.filter, score.value, score.stderr, score.samples,
                    task.steps, task.unsettled, task.blocks, task.seconds,
                ]  # fmt: skip
