"""`dgq run`: an answer to one prompt, or a conversation, a line a turn, from a terminal or a pipe.

At a terminal, a line that cannot be answered and Ctrl-C end that turn only; the end of input ends the conversation.
From a pipe, each line is a turn as well, and the first that cannot be answered ends everything, as with any other
command. A line "/image FILE" is no turn: the next turn shows that picture. "/adapter NAME" is none either: the turns
from there on are that adapter's, or without one if NAME is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dgq.convert.cli.terminal.options import ADAPTER, DEVICE, DTYPE, IMAGE_TOKENS, JSON, REVISION
from dgq.convert.cli.terminal.sizes import Size
from dgq.quant.errors import InputError

if TYPE_CHECKING:
    from dgq.convert.run.request import RunRequest
    from dgq.convert.source.adapter import AdapterChoice

IMAGE, ADAPT = "/image ", "/adapter"


@click.command()
@click.argument("model", metavar="SRC|ARTIFACT")
@click.argument("prompt", required=False)
@click.option(
    "--chat",
    is_flag=True,
    help="Put PROMPT through the chat template; without one, converse, a line a turn (/image FILE: a picture for the"
    " next; /adapter NAME: another adapter from there on).",
)
@click.option("--thinking/--no-thinking", default=None, help="In a chat: think first. [default: the template's]")
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Picture for the model to see, before PROMPT (or a conversation's first line), or where that says <|image|>;"
    " may be given several times.",
)
@IMAGE_TOKENS
@click.option("--max-new-tokens", type=click.IntRange(1), help="[default: the model's generation_config]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps a canvas at most. [default: generation_config]")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="The same seed gives the same text."
)
@DEVICE
@DTYPE
@click.option(
    "--activations",
    type=click.Choice(["nvfp4"]),
    help="Round the experts' inputs as a W4A4 kernel does; for NVFP4 artifacts with input scales.",
)
@click.option(
    "--rng",
    type=click.Choice(["counter", "torch"]),
    default="counter",
    show_default=True,
    help="counter: the same text on every device. torch: transformers' random stream.",
)
@click.option("--vram", type=Size(), help="Of the GPU, as 12GiB: experts beyond wait in host memory. [default: all]")
@REVISION
@ADAPTER
@JSON
def run(
    model: str,
    prompt: str | None,
    chat: bool,
    thinking: bool | None,
    images: tuple[Path, ...],
    image_tokens: int | None,
    max_new_tokens: int | None,
    steps: int | None,
    seed: int,
    device: str,
    dtype: str,
    activations: str | None,
    rng: Literal["counter", "torch"],
    vram: int | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    as_json: bool,
) -> None:
    """Write text from a prompt ("-" reads it from standard input) and watch the canvas take shape."""
    from dgq.convert.run.request import RunRequest

    if thinking is not None and not chat:
        raise InputError("--thinking: is a switch of the chat template; add --chat")
    request = RunRequest(
        model, revision, adapters, chat, thinking, max_new_tokens, steps, seed, device, dtype, activations, rng, vram,
        image_tokens,
    )  # fmt: skip
    draw = sys.stdout.isatty() and not as_json
    if prompt is not None:
        _answer(request, _text(prompt), images, draw, as_json)
    elif chat:
        _converse(request, images, draw, as_json)
    else:
        raise click.MissingParameter(param_type="argument", param_hint="'PROMPT'")


def _text(prompt: str) -> str:
    """The prompt, or standard input for "-"."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()
    except UnicodeError:
        raise InputError("PROMPT is not valid UTF-8") from None
    return text


def _answer(request: RunRequest, prompt: str, images: tuple[Path, ...], draw: bool, as_json: bool) -> None:
    from dgq.convert.cli.terminal.canvas import drawing
    from dgq.convert.cli.terminal.console import note, print_json
    from dgq.convert.run.answer import answer
    from dgq.convert.run.request import open_run

    opened = open_run(request, note)
    with drawing(opened.artifact, draw) as on_step:
        reply = answer(opened, prompt, images, on_step)
    print_json(reply) if as_json else _page(reply)


def _converse(request: RunRequest, images: tuple[Path, ...], draw: bool, as_json: bool) -> None:
    """Answer line after line of standard input on standard output; as JSON, one object a turn."""
    from dgq.convert.cli.terminal.canvas import drawing
    from dgq.convert.cli.terminal.console import note, print_json
    from dgq.convert.run.conversation import Conversation
    from dgq.convert.run.request import open_run

    conversation = Conversation(open_run(request, note), images)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _typed() if terminal else _piped():
        try:
            if line.startswith(IMAGE):
                conversation.show(Path(line.removeprefix(IMAGE).strip()).expanduser())
                continue
            if line.split(" ")[0] == ADAPT:
                conversation.adapter = line.removeprefix(ADAPT).strip()
                continue
            with drawing(conversation.artifact, draw) as on_step:
                reply = conversation.ask(line, on_step)
        except (InputError, KeyboardInterrupt) as error:
            if not terminal:
                raise
            note(str(error) or "stopped; it is as though you had not said that")
            continue
        print_json(reply) if as_json else _page(reply)
        sys.stdout.flush()


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  # Importing it lets input() edit lines and fetch earlier ones back.

    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text:
            yield text


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().strip()
        except UnicodeError:
            raise InputError(f"line {number} of standard input is not valid UTF-8") from None
        if text:
            yield text


def _page(reply: dict[str, Any]) -> None:
    """The text and a line a tool call on stdout; on stderr what the model thought, and that it did not finish that; on
    a terminal also how it came about."""
    import json

    from rich.text import Text

    from dgq.convert.cli.terminal.console import err, note
    from dgq.quant.errors import shown

    if reply["reasoning"]:
        err.print(Text(shown(reply["reasoning"]), style="dim italic"))
    if reply["text"] or not reply["tool_calls"]:
        print(shown(reply["text"]))
    for call in reply["tool_calls"]:
        print(shown(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"))
    if reply["unfinished_thought"]:
        note("the reply ends inside a thought; give it more --max-new-tokens")
    if err.is_terminal:
        steps = sum(reply["steps"])
        speed = len(reply["tokens"]) / max(reply["generate_s"], 1e-9)
        err.print(
            f"{len(reply['tokens'])} tokens in {steps} steps ({'+'.join(map(str, reply['steps']))}),"
            f" {reply['generate_s']:.1f} s, {speed:.0f} tokens/s on {reply['device']},"
            f" loaded in {reply['load_s']:.1f} s",
            style="dim",
        )
