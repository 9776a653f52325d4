"""The report: one HTML file that needs nothing else, and everything in it as JSON and CSV.

    REPORT/report.html   pictures and tables; no network, no script
    REPORT/report.json   all numbers
    REPORT/*.csv         fixed, positions, tasks, steps, weights, layers, experts, sensitivity, gate, texts

It is written beside its place and renamed when whole.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgq.convert.validation.plots import plots

Json = dict[str, Any]
Rows = Iterator[list[Any]]
WORST = 12  # tensors shown
FIXED = ("kl", "reverse_kl", "top1", "top5", "entropy", "accepted", "accepted_ratio", "accepted_same")


def write(report: Json, out: Path) -> None:
    """The directory `out`, which must not exist."""
    partial = out.absolute().parent / f".{out.name[:200]}.report"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, rows in tables(report).items():
        with (partial / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    (partial / "report.html").write_text(page(report), "utf-8")
    partial.replace(out)


def page(report: Json) -> str:
    """The HTML file's text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def shown(*values: Any) -> Markup:
        return Markup("{}<small>{}</small>").format(*triple(*values))

    environment.filters |= {"triple": shown, "percent": lambda x: f"{100 * x:.2f} %", "number": number}
    template = files("dgq.recipes").joinpath("report", "report.html.jinja").read_text("utf-8")
    ranked = sorted(report["artifacts"], key=lambda one: one["fixed"]["mean"]["kl"][0])
    worst = {one["name"]: _worst(one) for one in ranked if one.get("weights")}
    return environment.from_string(template).render(report=report, ranked=ranked, plots=plots(report), worst=worst)


def _worst(one: Json) -> list[Json]:
    return sorted(one["weights"], key=lambda row: -row["error"])[:WORST]


def triple(values: list[float] | None, scale: float = 1.0, unit: str = "") -> tuple[str, str]:
    """A figure and its bounds, to as many digits as the bounds warrant; no bounds where they are the figure."""
    if values is None:
        return "–", ""
    middle, low, high = (scale * value for value in values)
    digits = _digits((high - low) / 2, middle)
    form = ".1e" if 0 < max(abs(low), abs(high)) < 1e-4 else f".{digits}f"
    bounds = "" if low == high else f"{low:{form}} to {high:{form}}"
    return f"{middle:{form}}{unit}", bounds


def _digits(spread: float, middle: float) -> int:
    """Decimals that show two figures of the spread."""
    size = abs(spread) or abs(middle) / 1000
    return next((digits for digits in range(7) if size * 10**digits >= 9.5), 7) if size else 0


def number(value: float | None) -> str:
    """Three figures."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def tables(report: Json) -> dict[str, Rows]:
    """Name of a CSV file -> its rows, headings first."""
    return {
        "fixed": _fixed(report), "positions": _positions(report), "free": _free(report), "tasks": _tasks(report),
        "steps": _steps(report), "weights": _listed(report, "weights"), "layers": _listed(report, "layers"),
        "experts": _experts(report), "sensitivity": _listed(report, "sensitivity"), "gate": _listed(report, "gate"),
        "texts": _texts(report),
    }  # fmt: skip


def _fixed(report: Json) -> Rows:
    yield ["artifact", "by", "value", "condition", "measure", "figure", "low", "high"]
    for one in report["artifacts"]:
        fixed = one["fixed"]
        rows = [("all", "", "both", fixed["mean"])]
        rows += [("all", "", condition, row) for condition, row in fixed["by_condition"].items()]
        rows += [("level", level, name, row) for level, two in fixed["by_level"].items() for name, row in two.items()]
        rows += [("group", group, "both", row) for group, row in fixed["by_group"].items()]
        for by, value, condition, row in rows:
            yield from ([one["name"], by, value, condition, measure, *row[measure]] for measure in FIXED)


def _positions(report: Json) -> Rows:
    yield ["artifact", "position", "kl", "top1"]
    for one in report["artifacts"]:
        place = one["fixed"]["by_position"]
        for i, (kl, top1) in enumerate(zip(place["kl"], place["top1"], strict=True)):
            yield [one["name"], i, kl, top1]


def _sides(report: Json) -> list[tuple[str, Json]]:
    sides = [(report["reference"]["name"], report["reference"])] if "free" in report["reference"] else []
    return sides + [(one["name"], one) for one in report["artifacts"]]


def _free(report: Json) -> Rows:
    yield ["model", "measure", "figure", "low", "high"]
    for name, one in _sides(report):
        for key, value in (one["free"] | one["cost"]).items():
            if isinstance(value, int | float):
                yield [name, key, value, "", ""]
            elif isinstance(value, list):
                yield [name, key, *value]


def _tasks(report: Json) -> Rows:
    yield ["model", "task", "right", "asked"]
    for name, one in _sides(report):
        yield from ([name, task, *counts] for task, counts in one["free"]["by_task"].items())


def _steps(report: Json) -> Rows:
    yield ["model", "steps", "canvases"]
    for name, one in _sides(report):
        yield from ([name, steps, count] for steps, count in one["free"]["histogram"].items())


def _listed(report: Json, key: str) -> Rows:
    """A list of equal objects an artifact; a triple becomes three columns."""
    headed = False
    for one in report["artifacts"]:
        for row in one.get(key) or ():
            flat: Json = {}
            for name, value in row.items():
                if name == "recovered":
                    flat |= dict(zip((name, name + "_low", name + "_high"), value, strict=True))
                elif not isinstance(value, list):
                    flat[name] = value
            if not headed:
                yield ["artifact", *flat]
                headed = True
            yield [one["name"], *flat.values()]


def _experts(report: Json) -> Rows:
    yield ["artifact", "layer", "expert", "tokens_bf16", "tokens_artifact"]
    for one in report["artifacts"]:
        for row in one.get("layers") or ():
            for expert, counts in enumerate(zip(row["tokens"], row["tokens_artifact"], strict=True)):
                yield [one["name"], row["layer"], expert, *counts]


def _texts(report: Json) -> Rows:
    yield ["group", "prompt", "answer", "model", "text"]
    for row in report.get("texts", ()):
        for name, text in {report["reference"]["name"]: row["reference"], **row["written"]}.items():
            yield [row["group"], row["prompt"], row["answer"], name, text]
