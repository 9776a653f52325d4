"""Arguments and options that several commands have in common. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path

import click

from dgq.convert.cli.terminal.sizes import Size

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
ADAPTER = click.option(
    "--adapter",
    "adapters",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Directory of a LoRA adapter (peft's) to merge into SRC; may be given several times, in order.",
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
