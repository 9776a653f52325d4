"""`dgq demo`: the whole way on the embedded model."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import JSON

if TYPE_CHECKING:
    from dgq.convert.run.demo import Demonstration


@click.command()
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), default="dgq-demo", show_default=True,
    help="Directory to create.",
)  # fmt: skip
@JSON
def demo(out: Path, as_json: bool) -> None:
    """Convert `tiny` to every format, and compare what each answers. A minute, and nothing is downloaded."""
    from dgq.convert.cli.terminal.console import byte_bar, note, print_json
    from dgq.convert.run import demo as flow

    with byte_bar("converting tiny") as show:
        models = flow.demo(out, show, note)
    if as_json:
        print_json({"prompt": flow.PROMPT, "models": [asdict(model) for model in models]})
    else:
        _page(flow.PROMPT, models)


def _page(prompt: str, models: list[Demonstration]) -> None:
    """A model a row, the original first."""
    from rich.table import Table

    from dgq.convert.cli.terminal.console import MIB, following, out
    from dgq.quant.errors import shown

    out.print(f"{prompt!r}, answered by {models[0].path} and by what was made of it:")
    table = Table(box=None, pad_edge=False)
    table.add_column("format")
    for heading in ("MiB", "bits", "convert, s", "answer, s", "steps"):
        table.add_column(heading, justify="right")
    table.add_column("answer", no_wrap=True)
    for model in models:
        convert_s = "" if model.convert_s is None else f"{model.convert_s:.1f}"
        table.add_row(
            model.format, f"{model.bytes / MIB:.1f}", f"{model.bits:.2f}", convert_s, f"{model.generate_s:.1f}",
            str(model.steps), shown(model.text),
        )  # fmt: skip
    out.print(table)
    out.print("bits a weight; seconds to convert, and for the answer; denoising steps of it")
    following(f"dgq run {shlex.quote(models[-1].path)} --chat")
