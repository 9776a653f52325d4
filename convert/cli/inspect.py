"""`dgq inspect`: what an artifact, a checkpoint or STATS hold, from headers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from dgq.convert.cli.terminal.options import BASE, JSON, REVISION


@click.command()
@click.argument("artifact")
@REVISION
@BASE
@JSON
def inspect(artifact: str, revision: str | None, base: str | None, as_json: bool) -> None:
    """Show what an artifact (or a checkpoint) holds and where it came from. Reads headers only, unless --base is given;
    a published artifact is fetched whole. Of STATS: how many tokens each expert saw."""
    from dgq.convert.cli.terminal import statistics_page
    from dgq.convert.cli.terminal.console import byte_bar, print_json
    from dgq.convert.verification import inspect as inspection

    with byte_bar("comparing") if base is not None else nullcontext() as show:
        content = inspection.inspect(artifact, revision, base, show)
    if as_json:
        print_json(content)
    elif inspection.is_statistics(content):
        statistics_page.counted(artifact, content)
    else:
        _page(content)


def _page(content: dict[str, Any]) -> None:
    """content: what inspect() returned."""
    from dgq.convert.calibration.stats import named
    from dgq.convert.cli.terminal.console import MIB, count, following_run, groups_table, out, size
    from dgq.convert.cli.terminal.difference_page import difference_page

    out.print(f"{content['path']}: {content['kind']}, {content['file']}", style="bold")
    out.print(groups_table("scheme", content["by_scheme"], content["bytes"]))
    share = f"{content['quantized_share']:.2%} of {count(content['params'])} parameters quantised"
    out.print(f"{content['stored_tensors']:,} tensors, {content['bytes'] / MIB:,.1f} MiB, {share}")
    out.print("model    " + "  ".join(f"{key} {value}" for key, value in content["model"].items()))
    out.print("sampler  " + "  ".join(f"{key} {value}" for key, value in content["sampler"].items()))
    if content["opens_in"]:
        out.print(f"opens in {content['opens_in']}")
    if vision := content["vision"]:
        out.print(f"images   yes: a vision tower of {count(vision['params'])} parameters, {size(vision['bytes'])}")
    elif content["path"].endswith(".gguf"):
        out.print("images   none in this file; with its vision tower, an mmproj*.gguf, beside it")
    else:
        out.print("images   no: it has no vision tower")
    _origin(content)
    if calibration := content["calibration"]:
        out.print(f"stats    {named(calibration['starved'])}")
    for line in content["remarks"]:
        out.print(f"note     {line}")
    if difference := content.get("difference"):
        difference_page(difference)
    following_run(content["path"])


def _origin(content: dict[str, Any]) -> None:
    """What its dgq.json says of where it comes from."""
    from dgq.convert.cli.terminal.console import input_scales, out

    origin = content["provenance"]
    if origin is None and content["kind"] == "safetensors":
        out.print("origin   a checkpoint, not an artifact: there is no dgq.json")
        return
    if origin is None:
        out.print("origin   no dgq.json: not made by dgq, or the file without its directory")
        return
    source = origin["source"] or {}
    where = f"{source['repository']} @ {source['revision']}" if source.get("repository") else source.get("name")
    imatrix = f", imatrix {origin['imatrix']['name']}" if origin["imatrix"] else ", no imatrix"
    out.print(f"origin   {where}, recipe {origin['recipe']}, effort {origin['effort']}{imatrix}, dgq {origin['dgq']}")
    if origin["adapters"]:
        out.print(f"adapters {', '.join(origin['adapters'])}, merged in")
    if origin["input_scales"]:
        out.print(f"scales   {origin['input_scales']['method']}: {input_scales(origin['input_scales'])}")
