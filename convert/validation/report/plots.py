"""The report's pictures, drawn by matplotlib from a ValidationResult: SVG texts of one size, that of a phone's width.

    section of the page -> Plot(key, title, alt, image)      plots()      SVG, as data URIs inside report.html
    key                 -> (title, PNG)                      pictures()   for a model card, which takes no SVG

Every drawing function takes the axes and what it draws, and returns the picture in words, for whom cannot see it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dgq.convert.validation.report.result import ArtifactResult, FreeResult, ValidationResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C8C00")
BF16 = "#555555"
WIDTH, HEIGHT = 4.2, 3.1  # inches, at 96 pixels
STYLE: Any = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e4e4", "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
    "svg.hashsalt": "dgq", "figure.constrained_layout.use": True, "lines.markersize": 4.5,
}  # fmt: skip
LAYER_PARTS = (("attention", "#0072B2"), ("dense MLP", "#009E73"), ("experts", "#D55E00"), ("output", "#333333"))


@dataclass(frozen=True)
class Plot:
    """A picture of the page. alt: the picture in words; image: a data URI."""

    key: str
    title: str
    alt: str
    image: str


def plots(report: ValidationResult) -> dict[str, list[Plot]]:
    """Every picture, by the section of the page that it belongs to."""
    with plt.rc_context(STYLE):
        return {
            "frontier": [
                _plot("frontier", "Size against KL", frontier, report),
                _plot("frontier-steps", "KL against steps and speed", steps_and_speed, report),
            ],
            "fixed": [
                _plot("kl-by-level", "KL by noise level", kl_by_level, report),
                _plot("top-by-level", "Agreement by noise level", top_by_level, report),
                _plot("kl-by-group", "KL by prompt group", kl_by_group, report),
                _plot("kl-by-position", "KL by position in the canvas", kl_by_position, report),
            ],
            "free": [
                _plot("steps", "Steps a canvas took", steps_histogram, report),
                _plot("tasks", "Exact answers by task", by_task, report),
            ],
            **_losses(report),
        }


def _losses(report: ValidationResult) -> dict[str, list[Plot]]:
    """Where the loss comes from, if the source's weights were at hand."""
    artifacts = list(enumerate(report.artifacts))
    if not all(one.layers for _, one in artifacts):
        return {"losses": [], "sensitivity": []}
    errors = [_plot(f"layers-{i}", f"Layer output error: {one.name}", layer_error, one) for i, one in artifacts]
    routed = [
        _plot("router", "Router agreement", router, report), _plot("coverage", "Expert coverage", coverage, report),
    ]  # fmt: skip
    recovered = [
        _plot(f"sensitivity-{i}", f"KL recovered for each MB: {one.name}", sensitivity, one)
        for i, one in artifacts
        if one.sensitivity
    ]
    return {"losses": [*errors, *routed], "sensitivity": recovered}


def pictures(report: ValidationResult, keys: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """Some of the pictures for a page that takes no SVG: key -> title and PNG."""
    known = {
        "kl-by-level": ("KL by noise level", kl_by_level), "top-by-level": ("Agreement by noise level", top_by_level),
        "steps": ("Steps a canvas took", steps_histogram), "tasks": ("Exact answers by task", by_task),
    }  # fmt: skip
    with plt.rc_context(STYLE | {"savefig.dpi": 150}):
        return {key: (known[key][0], _drawn(known[key][1], report, "png", {"Software": None})[1]) for key in keys}


def _plot(key: str, title: str, draw: Callable[[Axes, Any], str], data: Any) -> Plot:
    alt, image = _drawn(draw, data, "svg", {"Date": None})
    encoded = base64.b64encode(image).decode()
    return Plot(key, title, alt, f"data:image/svg+xml;base64,{encoded}")


def _drawn(draw: Callable[[Axes, Any], str], data: Any, form: str, metadata: Any) -> tuple[str, bytes]:
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    try:
        alt = draw(axes, data)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(map(len, labels)) < 24 else 1
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
            figure.set_figheight(HEIGHT + 0.19 * -(-len(handles) // columns))
        file = io.BytesIO()
        figure.savefig(file, format=form, metadata=metadata)
    finally:
        plt.close(figure)
    return alt, file.getvalue()


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def short(name: str, most: int = 22) -> str:
    """A name for a legend. Dollar signs are escaped, which would begin mathematics."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def _triples(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The figures (n,), and how far the bounds lie below and above (2, n)."""
    table = np.array(rows, dtype=float)
    return table[:, 0], np.clip(np.stack((table[:, 0] - table[:, 1], table[:, 2] - table[:, 0])), 0, None)


def kl_by_level(axes: Axes, report: ValidationResult) -> str:
    levels = report.levels
    for i, one in enumerate(report.artifacts):
        for name, style in (("plain", "-"), ("conditioned", "--")):
            rows = [getattr(one.fixed.by_level[f"{level}"], name).kl for level in levels]
            middle, bounds = _triples(rows)
            label = short(one.name) if name == "plain" else None
            axes.errorbar(levels, middle, bounds, fmt="o" + style, color=colour(i), label=label, capsize=2, lw=1.4)
    axes.plot([], [], "--", color=BF16, label="with self-conditioning")
    axes.set(xlabel="share of the canvas replaced by noise", ylabel="KL(BF16 ‖ artifact), nats", xticks=levels)
    axes.set_ylim(bottom=0)
    means = (f"{one.name} {one.fixed.mean.kl[0]:.5f}" for one in report.artifacts)
    return "Mean KL in nats a position: " + ", ".join(means)


def top_by_level(axes: Axes, report: ValidationResult) -> str:
    levels = report.levels
    for i, one in enumerate(report.artifacts):
        for key, style in (("top1", "-"), ("top5", ":")):
            rows = [getattr(one.fixed.by_level[f"{level}"].both, key) for level in levels]
            middle, bounds = _triples(rows)
            label = short(one.name) if key == "top1" else None
            axes.errorbar(levels, 100 * middle, 100 * bounds, fmt="o" + style, color=colour(i), label=label, capsize=2,
                          lw=1.4)  # fmt: skip
    axes.plot([], [], ":", color=BF16, label="of the five best tokens")
    axes.set(xlabel="share of the canvas replaced by noise", ylabel="same as BF16, %", xticks=levels)
    means = (f"{one.name} {one.fixed.mean.top1[0]:.2%}" for one in report.artifacts)
    return "Best token the same: " + ", ".join(means)


def kl_by_group(axes: Axes, report: ValidationResult) -> str:
    groups = list(report.artifacts[0].fixed.by_group)
    count = len(report.artifacts)
    lowest = 1.0
    for i, one in enumerate(report.artifacts):
        middle, bounds = _triples([one.fixed.by_group[group].kl for group in groups])
        at = np.arange(len(groups)) + (i - (count - 1) / 2) * 0.6 / count
        axes.errorbar(middle, at, xerr=bounds, fmt="o", color=colour(i), label=short(one.name), capsize=2)
        lowest = min(lowest, float(middle.min()))
    if lowest > 0:
        axes.set_xscale("log")
    axes.set(xlabel="KL(BF16 ‖ artifact), nats", yticks=range(len(groups)), yticklabels=[short(g) for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    return f"KL of {count} artifacts for {', '.join(groups)}"


def kl_by_position(axes: Axes, report: ValidationResult) -> str:
    for i, one in enumerate(report.artifacts):
        values = np.array(one.fixed.by_position.kl)
        width = max(1, len(values) // 32)
        smooth = np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, "valid")[: len(values)]
        axes.plot(range(len(smooth)), smooth, color=colour(i), lw=1.3, label=short(one.name))
    axes.set(xlabel="position in the canvas", ylabel="KL(BF16 ‖ artifact), nats")
    axes.set_ylim(bottom=0)
    return "KL along the canvas, means over questions, noise levels and both conditions"


def steps_histogram(axes: Axes, report: ValidationResult) -> str:
    base = _base(report)
    limit = base.steps_limit
    edges = np.unique(np.linspace(0, limit, min(limit, 16) + 1).round())
    sides = [("BF16", base, BF16)]
    sides += [(short(one.name), one.free, colour(i)) for i, one in enumerate(report.artifacts)]
    for name, free, shade in sides:
        steps = np.repeat([int(k) for k in free.histogram], list(free.histogram.values()))
        heights, _ = np.histogram(steps, edges)
        filled: dict[str, Any] = {"fill": True, "alpha": 0.25} if free is base else {"lw": 1.4}
        label = f"{name}: {free.steps[0]:.2f}"
        axes.stairs(100 * heights / max(1, len(steps)), edges, color=shade, label=label, **filled)
    axes.set(xlabel=f"steps, of {limit} at most (mean beside the name)", ylabel="canvases, %")
    return "Mean steps: " + ", ".join(f"{name} {free.steps[0]:.2f}" for name, free, _ in sides)


def by_task(axes: Axes, report: ValidationResult) -> str:
    base = _base(report)
    tasks = list(base.by_task)
    sides = [("BF16", base, BF16)]
    sides += [(short(one.name), one.free, colour(i)) for i, one in enumerate(report.artifacts)]
    for i, (name, free, shade) in enumerate(sides):
        at = np.arange(len(tasks)) + (i - (len(sides) - 1) / 2) * 0.8 / len(sides)
        share = [100 * free.by_task[task][0] / free.by_task[task][1] for task in tasks]
        axes.barh(at, share, 0.8 / len(sides), color=shade, label=name)
    labels = [f"{short(task)} ({base.by_task[task][1]})" for task in tasks]
    axes.set(xlabel="exact answers, %", xlim=(0, 100), yticks=range(len(tasks)), yticklabels=labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if not tasks:
        axes.text(0.5, 0.5, "no question has an exact answer", transform=axes.transAxes, ha="center")
    return "Exact answers in per cent for " + (", ".join(tasks) or "no task")


def layer_error(axes: Axes, one: ArtifactResult) -> str:
    rows = one.layers or ()
    at = [row.layer for row in rows]
    for part, shade in LAYER_PARTS:
        axes.plot(at, [100 * row.of(part) for row in rows], "o-", color=shade, label=part, lw=1.4)
    axes.plot(at, [100 * row.accumulated for row in rows], "--", color="#999999", label="output, accumulated")
    axes.set(xlabel="layer", ylabel="error of the output, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    worst = max(rows, key=lambda row: row.output)
    return f"Relative error of {one.name}'s layers on BF16's activations; most in layer {worst.layer}"


def router(axes: Axes, report: ValidationResult) -> str:
    for i, one in enumerate(report.artifacts):
        at = [row.layer for row in one.layers or ()]
        axes.plot(at, [100 * row.router_overlap_own for row in one.layers or ()], "o-", color=colour(i),
                  label=short(one.name), lw=1.4)  # fmt: skip
        axes.plot(at, [100 * row.router_overlap for row in one.layers or ()], ":", color=colour(i))
    axes.plot([], [], ":", color=BF16, label="on BF16's activations")
    axes.set(xlabel="layer", ylabel="experts chosen in common, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return "Share of chosen experts that BF16 chose too, layer by layer"


def coverage(axes: Axes, report: ValidationResult) -> str:
    tokens = np.array([row.tokens for row in report.artifacts[0].layers or ()], dtype=float)
    share = tokens / tokens.mean(1, keepdims=True)
    ranked = -np.sort(-share, axis=1)
    picture = axes.imshow(ranked, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="experts of a layer, most used first", ylabel="layer")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(picture, ax=axes, label="tokens, over an even share")
    unused = int((tokens == 0).sum())
    return f"Tokens that each expert saw in BF16, over an even share; {unused} of {tokens.size} experts saw none"


def sensitivity(axes: Axes, one: ArtifactResult) -> str:
    rows = (one.sensitivity or ())[:16]
    each = np.array([row.recovered for row in rows]) / np.array([[1e-3 * row.megabytes] for row in rows])
    middle, bounds = _triples(each.tolist())
    axes.barh(range(len(rows)), middle, xerr=bounds, color="#0072B2", error_kw={"lw": 0.8})
    labels = [f"{row.part} ({100 * row.share:.0f} %)" for row in rows]
    axes.set(xlabel="KL recovered a MB, 10⁻³ nats (share of KL)", yticks=range(len(rows)), yticklabels=labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return f"Most is recovered for a MB by {rows[0].part}"


def frontier(axes: Axes, report: ValidationResult) -> str:
    points = [(one.bytes / 1e6, one.fixed.mean.kl) for one in report.artifacts]
    _points(axes, report, [size for size, _ in points], [kl for _, kl in points])
    best = sorted((size, kl[0]) for size, kl in points)
    edge = [p for i, p in enumerate(best) if all(p[1] < q[1] for q in best[:i])]
    axes.plot(*zip(*edge, strict=True), color="#aaaaaa", lw=1, ls="--", zorder=0)
    axes.set(xlabel="size, MB", ylabel="KL(BF16 ‖ artifact), nats")
    axes.set_ylim(bottom=0)
    return "Not beaten in both size and KL: " + ", ".join(f"{size:.1f} MB with KL {kl:.5f}" for size, kl in edge)


def steps_and_speed(axes: Axes, report: ValidationResult) -> str:
    points = [one.free.steps_ratio for one in report.artifacts]
    _points(axes, report, [one.fixed.mean.kl[0] for one in report.artifacts], points)
    axes.axhline(1, color=BF16, lw=1, ls=":")
    axes.set(xlabel="KL(BF16 ‖ artifact), nats", ylabel="steps, over BF16's")
    axes.set_xlim(left=0)
    return "Steps over BF16's: " + ", ".join(f"{o.name} {o.free.steps_ratio[0]:.3f}" for o in report.artifacts)


def _base(report: ValidationResult) -> FreeResult:
    """The reference's own run, which is there as soon as an artifact is."""
    assert report.reference.free is not None
    return report.reference.free


def _points(axes: Axes, report: ValidationResult, x: Sequence[float], y: Sequence[Sequence[float]]) -> None:
    """One point with its bounds for each artifact, whose speed stands beside its name."""
    middle, bounds = _triples(y)
    for i, one in enumerate(report.artifacts):
        label = f"{short(one.name)}: {one.free.tokens_per_second:.0f} tokens/s"
        axes.errorbar(x[i], middle[i], bounds[:, i : i + 1], fmt="o", color=colour(i), capsize=2, label=label)
    axes.margins(x=0.12)
