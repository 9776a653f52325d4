"""Arguments and options that several commands have in common. Nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from dgq.convert.cli.terminal.sizes import Size

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice, Side

_Command = TypeVar("_Command", bound=Callable[..., Any])
SOURCE = click.argument("src")
FORMATS = click.Choice(["nvfp4", "bnb4", "gguf"])
TO = click.option("--to", "to", type=FORMATS, required=True, help="Format of the artifact.")
RECIPE = click.option("--recipe", help="Recipe name or .toml file. [default: nvfp4, bnb4, q4_k_m]")
REVISION = click.option("--revision", help="Branch, tag or commit of a Hub source. [default: its main branch]")
DEVICE = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="[auto: a GPU if any]",
)
DTYPE = click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="Of activations. [auto: bf16 on CUDA]"
)


def _adapter(text: str, side: str | None = None, named: bool = False) -> AdapterChoice:
    from dgq.convert.source.adapter import AdapterChoice

    name, equals, path = text.partition("=")
    if named and equals and re.fullmatch(r"[\w.-]+", name) and not Path(text).exists():
        return AdapterChoice(Path(path), None, name)
    return AdapterChoice(Path(text), cast("Side | None", side))


def _merged(context: click.Context, _: click.Parameter, paths: tuple[str, ...]) -> tuple[AdapterChoice, ...]:
    return tuple(_adapter(path, context.meta.get("adapter_side")) for path in paths)


def _side(context: click.Context, _: click.Parameter, side: str | None) -> None:
    context.meta["adapter_side"] = side


def merged_adapters(command: _Command) -> _Command:
    """--adapter and --adapter-side of the commands that merge adapters into a source."""
    path = click.option(
        "--adapter",
        "adapters",
        multiple=True,
        callback=_merged,
        help="LoRA adapter (peft's; a directory or Hub id) to merge into SRC; may be given several times, in order.",
    )
    side = click.option(
        "--adapter-side",
        type=click.Choice(["decoder", "encoder", "mean"]),
        is_eager=True,
        expose_value=False,
        callback=_side,
        help="Of adapters trained apart for encoder and decoder: whose numbers to merge into what both share.",
    )
    return path(side(command))


ADAPTER = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    callback=lambda _, __, given: tuple(_adapter(text, named=True) for text in given),
    metavar="[NAME=]PATH",
    help="LoRA adapter (peft's; a directory or Hub id) to apply beside the weights, encoder's and decoder's numbers"
    " apart; may be given several times. Of named ones the first is active.",
)
IMAGE_TOKENS = click.option(
    "--image-tokens",
    type=click.Choice(["70", "140", "280", "560", "1120"]),
    callback=lambda _context, _option, most: None if most is None else int(most),
    help="The most that a picture becomes; small print needs more. [default: the model's, 280]",
)
RAM = click.option(
    "--ram", type=Size(), help="RAM to keep below, like 8GiB; takes longer, same bytes. [default: 80 % of what is free]"
)
VRAM = click.option("--vram", type=Size(), help="The same for the GPU's memory.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object last, and nothing for people.")
