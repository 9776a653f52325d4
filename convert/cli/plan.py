"""`dgq plan`: what `convert` would write, and what making and running it needs."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from dgq.convert.cli.terminal.options import FORMATS, IMAGE_TOKENS, JSON, RECIPE, REVISION, SOURCE, merged_adapters

if TYPE_CHECKING:
    from rich.table import Table

    from dgq.convert.estimate.forecast import Forecast
    from dgq.convert.plans.plan import Plan
    from dgq.convert.source.adapter import AdapterChoice

VRAM_ROWS = {
    "weights": "weights, of the text model",
    "kv_sliding": "keys and values, {sliding} sliding layers",
    "kv_full": "keys and values, {full} full layers",
    "canvas": "logits, sampler",
    "activations": "activations",
}


@click.command()
@SOURCE
@click.option("--to", "to", type=FORMATS, help="Format of the artifact. [default: the sizes of every recipe]")
@RECIPE
@REVISION
@merged_adapters
@click.option("--threads", type=click.IntRange(1, 1024), help="To convert with. [default: CPU cores]")
@IMAGE_TOKENS
@click.option("--no-probe", is_flag=True, help="Do not try how fast this machine is: no estimate of time.")
@JSON
def plan(
    src: str,
    to: str | None,
    recipe: str | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    threads: int | None,
    image_tokens: int | None,
    no_probe: bool,
    as_json: bool,
) -> None:
    """Show what `convert` would write, and what you will need: disk, RAM, time, VRAM. Reads headers only."""
    from dgq.convert.cli.terminal.console import print_json
    from dgq.convert.estimate import forecast

    options = forecast.PlanOptions(recipe, revision, adapters, threads, not no_probe, image_tokens)
    answer = forecast.plan(src, to, options)
    if not isinstance(answer, forecast.Forecast):
        print_json({"source": src, "recipes": answer}) if as_json else _recipes_page(src, answer)
    else:
        print_json(answer.to_json()) if as_json else _page(answer, recipe)


def _recipes_page(src: str, recipes: dict[str, dict[str, Any]]) -> None:
    """A recipe a row, smallest first; then those that do not fit this source."""
    from rich.table import Table

    from dgq.convert.cli.terminal.console import GB, GIB, note, out

    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "--to", "GB", "GiB", "bits", "quantised", "VRAM, GiB", "card", "but"):
        justify = "left" if heading in ("recipe", "--to", "but") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    possible = {name: row for name, row in recipes.items() if "refused" not in row}
    for name, row in sorted(possible.items(), key=lambda pair: pair[1]["bytes"]):
        digits = 2 if row["bytes"] > GB else 4
        table.add_row(
            name, row["format"], *(f"{row['bytes'] / unit:,.{digits}f}" for unit in (GB, GIB)),
            f"{row['bits_per_weight']:.2f}", f"{row['quantized_share']:.1%}", f"{row['vram'] / GIB:,.1f}",
            f"{row['fits'][0]} GB" if row["fits"] else "none", "dgq only" if row["opens_in"] else "",
        )  # fmt: skip
    out.print(table)
    for name, row in recipes.items():
        if "refused" in row:
            note(f"not {name}: {row['refused']}")
    out.print("bits a weight; share of parameters in fewer than 16 bits; VRAM for short answers")
    out.print(f"more of one: dgq plan {shlex.quote(src)} --to FORMAT --recipe RECIPE")


def _page(forecast: Forecast, recipe: str | None) -> None:
    """The whole page of one recipe. recipe: the --recipe that was given."""
    from dgq.convert.cli.terminal.console import following, note, out

    plan, where = forecast.plan, forecast.plan.source.where
    _artifact(plan)
    out.print(_vram(plan, forecast.needs["vram_by_context"]))
    _running(forecast.needs)
    _making(forecast.needs)
    for line in plan.notices:
        note(line)
    target = shlex.quote(f"{where.name}-{plan.recipe.label}")
    chosen = f" --recipe {shlex.quote(recipe)}" if recipe else ""
    following(f"dgq convert {shlex.quote(where.asked)} --to {plan.recipe.format}{chosen} -o {target}")


def _artifact(plan: Plan) -> None:
    """What would be written."""
    from dgq.convert.cli.terminal.console import MIB, count, groups_table, out, size

    where = plan.source.where
    pinned = f" @ {where.revision}" if where.revision else ""
    out.print(f"{where.asked}{pinned} -> {plan.recipe.label} ({plan.recipe.description})", style="bold")
    out.print(groups_table("part", plan.by_part(), plan.nbytes))
    out.print(groups_table("scheme", plan.by_scheme(), plan.nbytes))
    out.print(
        f"{plan.stored:,} tensors, {plan.nbytes / MIB:,.0f} MiB ({size(plan.nbytes)}),"
        f" {8 * plan.nbytes / plan.params:.2f} bits a weight;"
        f" {plan.quantized_share:.2%} of {count(plan.params)} parameters quantised"
    )
    if plan.mmproj:
        tower = sum(tensor.nbytes for tensor in plan.mmproj)
        out.print(f"of them {len(plan.mmproj)} tensors, {size(tower)}, the vision tower, in {plan.files[1]}")
    fallbacks = sum(t.numel for t in plan.weights if t.scheme.name in plan.recipe.fallback.values())
    if fallbacks:
        out.print(
            f"{fallbacks / plan.params:.0%} of the parameters lie in rows that no K-quant fits and take the fallback"
            f" ({', '.join(f'{a} -> {b}' for a, b in plan.recipe.fallback.items())})"
        )


def _vram(plan: Plan, contexts: dict[int, dict[str, Any]]) -> Table:
    """Needs on the GPU: a part a row, a context a column."""
    from rich.table import Table

    from dgq.convert.cli.terminal.console import GIB
    from dgq.convert.estimate.needs import CARDS

    layers = [layer.is_sliding for layer in plan.source.config.layers]
    table = Table("VRAM to run it, GiB, by context", box=None, pad_edge=False)
    for context in contexts:
        table.add_column(f"{context // 1024}K" if context >= 1024 else str(context), justify="right")
    for part, label in VRAM_ROWS.items():
        cells = (f"{n / GIB:,.2f}" if (n := need["parts"][part]) else "–" for need in contexts.values())
        table.add_row(label.format(sliding=sum(layers), full=len(layers) - sum(layers)), *cells)
    table.add_row("at its peak", *(f"{need['total'] / GIB:,.2f}" for need in contexts.values()), style="bold")
    card = next(iter(contexts.values()))["decoded_from"]
    if card is not None and any(need["decoded"] != need["total"] for need in contexts.values()):
        label = f"from {card} GB up, part decoded"
        table.add_row(label, *(f"{need['decoded'] / GIB:,.2f}" for need in contexts.values()))
    fits = (f"{need['fits'][0]} GB up" if need["fits"] else "none" for need in contexts.values())
    table.add_row(f"fits, of {', '.join(map(str, CARDS))} GB", *fits)
    return table


def _running(needs: dict[str, Any]) -> None:
    """What images need, and what a card costs that does not hold all experts."""
    from dgq.convert.cli.terminal.console import out, size

    if vision := needs["vision"]:
        out.print(
            f"images {size(vision['weights'])} more for the vision tower, {size(vision['image'])} for an image of"
            f" {vision['image_tokens']} tokens of context in it, only if one is given; dgq run is done with them before"
            " it loads the model"
        )
    for card, away in needs["offloaded"].items():
        times = ", ".join(f"{ms:,.0f} ms a step over {link}" for link, ms in away["ms"].items())
        out.print(
            f"--vram {card}GiB: experts of {away['layers']} layers, {size(away['host'])}, in host memory: {times}"
        )


def _making(needs: dict[str, Any]) -> None:
    """Needs of the conversion itself: disk, RAM, time."""
    from dgq.convert.cli.terminal.console import GB, out, size

    disk, ram = needs["disk"], needs["ram"]
    download = f", {size(disk['download'])} to download" if disk["download"] else ""
    out.print(f"disk   {size(disk['artifact'])} for the artifact{download}")
    out.print(f"RAM    about {ram['convert'] / GB:.1f} GB to convert with {ram['threads']} threads")
    if "calibrate" in ram:
        out.print(
            f"       before, about {ram['calibrate'] / GB:.1f} GB to calibrate input scales, {ram['calibrate_passes']}"
            f" passes over the checkpoint: fast if its {ram['calibrate_mapped'] / GB:.1f} GB stay in memory as well"
        )
    for device, name, memory in (("cuda", "on a GPU", "VRAM"), ("cpu", "on the CPU", "RAM")):
        if device in needs["with_stats"]:
            need = {what: size(nbytes) for what, nbytes in needs["with_stats"][device].items()}
            out.print(
                f"STATS  {name} {need['calibrate']} of {memory} at least to calibrate, {need['convert']} to convert"
                f" with them, {need['at_once']} to be quick; meanwhile {need['scratch']} of disk beside the artifact"
            )
    if "estimate" in needs:
        _time(needs["estimate"], ", without the download" if download else "")


def _time(estimate: dict[str, Any], without: str) -> None:
    from dgq.convert.cli.terminal.console import duration, out

    kinds = ("calibrate", "encode", "hash", "write", "read")
    times = ", ".join(f"{kind} {duration(s)}" for kind in kinds if (s := estimate[f"{kind}_s"]) is not None)
    out.print(f"time   {duration(estimate['total_s'])} at least on the CPU, {estimate['threads']} threads: {times}")
    out.print(f"       (an estimate, from a short probe of this machine{without})")
