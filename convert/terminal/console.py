"""Everything dgq prints for people: tables, bars, one obvious next command. Data goes to stdout, the rest to stderr."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from dgq.quant.errors import shown, visible

if TYPE_CHECKING:
    from dgq.convert.plans.plan import Plan
    from dgq.convert.write.pipeline import Converted

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9
PERIOD = 600.0  # seconds that the time left is told by: on a CPU a step of a large model takes minutes


class _Console(Console):
    """A string is a line: a terminal must not do what a name in a stranger's file tells it."""

    def print(self, *objects: Any, **style: Any) -> None:
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **style)


out = _Console(highlight=False, soft_wrap=True, markup=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on one line, what is not printable as JSON's escapes."""
    text = json.dumps(data, ensure_ascii=False)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar over bytes on stderr; silent where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=total)

        def advance(nbytes: int, name: str) -> None:
            progress.update(task, advance=nbytes, description=f"{what} {visible(name)}")

        yield advance


@contextmanager
def count_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over counted steps on stderr; silent where stderr is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=PERIOD
    ) as progress:
        task = progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def note(line: str) -> None:
    err.print(f"note: {line}", style="yellow")


def notices(plan: Plan) -> None:
    for line in plan.notices:
        note(line)


def plan(plan: Plan, recipe: str | None, found: dict[str, Any]) -> None:
    """The page of `dgq plan`. recipe: the --recipe that was given; found: what needs() and probe() found."""
    where = plan.source.where
    pinned = f" @ {where.revision}" if where.revision else ""
    out.print(f"{where.asked}{pinned} -> {plan.recipe.label} ({plan.recipe.description})", style="bold")
    out.print(_groups("part", plan.by_part(), plan.nbytes))
    out.print(_groups("scheme", plan.by_scheme(), plan.nbytes))
    out.print(
        f"{plan.stored:,} tensors, {plan.nbytes / MIB:,.0f} MiB ({_size(plan.nbytes)}),"
        f" {8 * plan.nbytes / plan.params:.2f} bits a weight;"
        f" {plan.quantized_share:.2%} of {count(plan.params)} parameters quantised"
    )
    if plan.mmproj:
        size = sum(tensor.nbytes for tensor in plan.mmproj)
        out.print(f"of them {len(plan.mmproj)} tensors, {_size(size)}, the vision tower, in {plan.files[1]}")
    fallbacks = sum(t.numel for t in plan.weights if t.scheme.name in plan.recipe.fallback.values())
    if fallbacks:
        out.print(
            f"{fallbacks / plan.params:.0%} of the parameters lie in rows that no K-quant fits and take the fallback"
            f" ({', '.join(f'{a} -> {b}' for a, b in plan.recipe.fallback.items())})"
        )
    out.print(_vram(plan, found["vram_by_context"]))
    if vision := found["vision"]:
        out.print(
            f"images {_size(vision['weights'])} more for the vision tower, {_size(vision['image'])} for an image in it,"
            " only if one is given; dgq run is done with them before it loads the model"
        )
    for card, away in found["offloaded"].items():
        times = ", ".join(f"{ms:,.0f} ms a step over {link}" for link, ms in away["ms"].items())
        out.print(
            f"--vram {card}GiB: experts of {away['layers']} layers, {_size(away['host'])}, in host memory: {times}"
        )
    _making(plan, found)
    notices(plan)
    target = shlex.quote(f"{where.name}-{plan.recipe.label}")
    chosen = f" --recipe {shlex.quote(recipe)}" if recipe else ""
    following(f"dgq convert {shlex.quote(where.asked)} --to {plan.recipe.format}{chosen} -o {target}")


def _vram(plan: Plan, found: dict[int, dict[str, Any]]) -> Table:
    """Needs on the GPU: a part a row, a context a column."""
    from dgq.convert.estimate.needs import CARDS

    sliding = [layer.is_sliding for layer in plan.source.config.layers]
    table = Table("VRAM to run it, GiB, by context", box=None, pad_edge=False)
    for context in found:
        table.add_column(f"{context // 1024}K" if context >= 1024 else str(context), justify="right")
    parts = {
        "weights": "weights, of the text model",
        "kv_sliding": f"keys and values, {sum(sliding)} sliding layers",
        "kv_full": f"keys and values, {len(sliding) - sum(sliding)} full layers",
        "canvas": "logits, sampler",
        "activations": "activations",
    }
    for part, label in parts.items():
        table.add_row(label, *(f"{n / GIB:,.2f}" if (n := needed["parts"][part]) else "–" for needed in found.values()))
    table.add_row("at its peak", *(f"{needed['total'] / GIB:,.2f}" for needed in found.values()), style="bold")
    card = next(iter(found.values()))["decoded_from"]
    if card is not None and any(needed["decoded"] != needed["total"] for needed in found.values()):
        label = f"from {card} GB up, part decoded"
        table.add_row(label, *(f"{needed['decoded'] / GIB:,.2f}" for needed in found.values()))
    fits = (f"{needed['fits'][0]} GB up" if needed["fits"] else "none" for needed in found.values())
    table.add_row(f"fits, of {', '.join(map(str, CARDS))} GB", *fits)
    return table


def _making(plan: Plan, found: dict[str, Any]) -> None:
    """Needs of the conversion itself: disk, RAM, time."""
    disk, ram, time = found["disk"], found["ram"], found.get("estimate")
    download = f", {_size(disk['download'])} to download" if disk["download"] else ""
    out.print(f"disk   {_size(disk['artifact'])} for the artifact{download}")
    out.print(f"RAM    about {ram['convert'] / GB:.1f} GB to convert with {ram['threads']} threads")
    if "calibrate" in ram:
        out.print(
            f"       before, about {ram['calibrate'] / GB:.1f} GB to calibrate input scales, {ram['calibrate_passes']}"
            f" passes over the checkpoint: fast if its {ram['calibrate_mapped'] / GB:.1f} GB stay in memory as well"
        )
    for device, name, memory in (("cuda", "on a GPU", "VRAM"), ("cpu", "on the CPU", "RAM")):
        if device in found["with_stats"]:
            need = {what: _size(size) for what, size in found["with_stats"][device].items()}
            out.print(
                f"STATS  {name} {need['calibrate']} of {memory} at least to calibrate, {need['convert']} to convert"
                f" with them, {need['at_once']} to be quick; meanwhile {need['scratch']} of disk beside the artifact"
            )
    if time:
        kinds = ("calibrate", "encode", "hash", "write", "read")
        times = ", ".join(f"{kind} {_duration(s)}" for kind in kinds if (s := time[f"{kind}_s"]) is not None)
        without = ", without the download" if download else ""
        out.print(f"time   {_duration(time['total_s'])} at least on the CPU, {time['threads']} threads: {times}")
        out.print(f"       (an estimate, from a short probe of this machine{without})")


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def converted(plan: Plan, done: Converted) -> None:
    """What `dgq convert` made."""
    size = sum(file.stat().st_size for file in done.path.iterdir())
    if "input_scales" in done.document and (scales := done.document["input_scales"]):
        out.print(f"input scales {scales['method']}: {_scales(scales)}")
    if calibration := done.document["calibration"]:
        from dgq.convert.calibration.stats import named

        out.print(f"calibrated on {calibration['data']['name']}: {named(calibration['starved'])}")
    out.print(f"{done.file}  {size / MIB:,.1f} MiB, {plan.quantized_share:.2%} of the parameters quantised")
    following(f"dgq run {shlex.quote(str(done.path))} --chat 'Sort: wind apple king door'")


def verified(path: str, found: dict[str, Any]) -> None:
    """What `dgq verify` found."""
    for problem in found["problems"]:
        err.print(problem, style="red")
    if found["ok"]:
        out.print(f"{path}: {found['files']} files, {_size(found['bytes'])}: every byte is what dgq.json says")
        if "compared" in found:
            aside = "; input scales were left out" if found["left_out"] else ""
            out.print(f"{len(found['compared'])} weights quantised again from the source are the same bytes{aside}")
        following(f"dgq run {shlex.quote(path)} --chat 'Sort: wind apple king door'")
    else:
        out.print(f"{path}: {len(found['problems'])} problems")


def _scales(scales: dict[str, Any]) -> str:
    if scales["method"] != "calibrated":
        return f"{scales['value']:.6g} everywhere"
    amax = {side: max(values.values()) for side, values in scales["amax"].items()}
    return ", ".join(f"{side} activations up to {value:.4g}" for side, value in amax.items())


def inspected(found: dict[str, Any]) -> None:
    """The page of `dgq inspect`."""
    model, sampler, origin = found["model"], found["sampler"], found["provenance"]
    out.print(f"{found['path']}: {found['kind']}, {found['file']}", style="bold")
    out.print(_groups("scheme", found["by_scheme"], found["bytes"]))
    share = f"{found['quantized_share']:.2%} of {count(found['params'])} parameters quantised"
    out.print(f"{found['stored_tensors']:,} tensors, {found['bytes'] / MIB:,.1f} MiB, {share}")
    out.print("model    " + "  ".join(f"{key} {value}" for key, value in model.items()))
    out.print("sampler  " + "  ".join(f"{key} {value}" for key, value in sampler.items()))
    if found["opens_in"]:
        out.print(f"opens in {found['opens_in']}")
    if vision := found["vision"]:
        out.print(f"images   yes: a vision tower of {count(vision['params'])} parameters, {_size(vision['bytes'])}")
    elif found["path"].endswith(".gguf"):
        out.print("images   none in this file; with its vision tower, an mmproj*.gguf, beside it")
    else:
        out.print("images   no: it has no vision tower")
    if origin is None and found["kind"] == "safetensors":
        out.print("origin   a checkpoint, not an artifact: there is no dgq.json")
    elif origin is None:
        out.print("origin   no dgq.json: not made by dgq, or the file without its directory")
    else:
        source = origin["source"] or {}
        where = f"{source['repository']} @ {source['revision']}" if source.get("repository") else source.get("name")
        imatrix = f", imatrix {origin['imatrix']['name']}" if origin["imatrix"] else ", no imatrix"
        out.print(
            f"origin   {where}, recipe {origin['recipe']}, effort {origin['effort']}{imatrix}, dgq {origin['dgq']}"
        )
        if origin["adapters"]:
            out.print(f"adapters {', '.join(origin['adapters'])}, merged in")
        if origin["input_scales"]:
            out.print(f"scales   {origin['input_scales']['method']}: {_scales(origin['input_scales'])}")
    if calibration := found["calibration"]:
        from dgq.convert.calibration.stats import named

        out.print(f"stats    {named(calibration['starved'])}")
    for line in found["remarks"]:
        out.print(f"note     {line}")
    following(f"dgq run {shlex.quote(found['path'])} --chat 'Sort: wind apple king door'")


def answer(result: dict[str, Any]) -> None:
    """The text on stdout; on a terminal, how it came about on stderr, and before it what the model thought."""
    if result.get("thought"):
        err.print(Text(shown(result["thought"]), style="dim italic"))
    print(shown(result["text"]))
    if err.is_terminal:
        steps = sum(result["steps"])
        speed = len(result["tokens"]) / max(result["generate_s"], 1e-9)
        err.print(
            f"{len(result['tokens'])} tokens in {steps} steps ({'+'.join(map(str, result['steps']))}),"
            f" {result['generate_s']:.1f} s, {speed:.0f} tokens/s on {result['device']},"
            f" loaded in {result['load_s']:.1f} s",
            style="dim",
        )


def _groups(title: str, groups: dict[str, dict[str, int]], total: int) -> Table:
    table = Table(title, box=None, pad_edge=False)
    for heading in ("tensors", "parameters", "MiB", "share of bytes"):
        table.add_column(heading, justify="right")
    for name, group in groups.items():
        share = f"{group['bytes'] / total:.1%}"
        table.add_row(name, str(group["tensors"]), count(group["params"]), f"{group['bytes'] / MIB:,.1f}", share)
    return table


def count(n: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)


def _size(nbytes: int) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB else f"{nbytes / 10**6:.1f} MB"


def following(command: str) -> None:
    if err.is_terminal:
        err.print()
        err.print(f"next: {command}", style="green")
