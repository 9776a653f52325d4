"""`dgq serve`: OpenAI's HTTP interface and a page, over one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgq.convert.cli.terminal.options import ADAPTER, DEVICE, DTYPE, REVISION
from dgq.convert.cli.terminal.sizes import Size
from dgq.quant.errors import InputError

if TYPE_CHECKING:
    from dgq.convert.run.request import OpenedRun
    from dgq.convert.source.adapter import AdapterChoice
    from dgq.runtime.serve.settings import ServeSettings

CONTEXT = 8192


@click.command()
@click.argument("model", metavar="SRC|ARTIFACT")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a key a line; each request must show one as a bearer token.",
)
@click.option("--without-key", is_flag=True, help="Let everybody who reaches another --host ask without a key.")
@click.option(
    "--context",
    type=click.IntRange(1),
    help=f"Tokens of a prompt and its answer at most. [default: {CONTEXT}, or the model's if that is less]",
)
@click.option(
    "--rows", type=click.IntRange(1, 64), default=8, show_default=True, help="Answers that are computed together."
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Answers that wait for these; more get 429.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Of an answer whose request names no number.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    help="Of a request, waiting included; its answer ends with the block.",
)
@click.option(
    "--image-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory whose pictures requests may name. [default: none; data URLs alone]",
)
@DEVICE
@DTYPE
@click.option("--vram", type=Size(), help="Of the GPU, as 12GiB: experts beyond wait in host memory. [default: all]")
@REVISION
@ADAPTER
def serve(
    model: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    without_key: bool,
    context: int | None,
    rows: int,
    max_waiting: int,
    max_tokens: int,
    max_seconds: float,
    image_dir: Path | None,
    device: str,
    dtype: str,
    vram: int | None,
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
) -> None:
    """Answer OpenAI's HTTP interface (/v1/chat/completions, /v1/completions), and show a page with a chat at /."""
    _check_installed()
    from dgq.convert.cli.terminal.console import note
    from dgq.convert.run.request import RunRequest, open_run
    from dgq.runtime.serve.settings import ServeSettings

    keys = _keys(api_key_file)
    if not (keys or without_key or ServeSettings("", 1, host).loopback):
        raise InputError(f"--host {host}: others can reach it; give --api-key-file, or --without-key if that is meant")
    run = open_run(RunRequest(model, revision, adapters, device=device, dtype=dtype, vram=vram), note)
    most = run.artifact.config.context
    if context is not None and context > most:
        raise InputError(f"--context {context}: the model's is {most}")
    settings = ServeSettings(
        model if "/" in model and not Path(model).exists() else Path(model).resolve().name,
        context or min(CONTEXT, most),
        host,
        port,
        rows,
        max_waiting,
        max_tokens,
        max_seconds,
        keys,
        image_dir,
    )
    _serve(run, settings)


def _serve(run: OpenedRun, settings: ServeSettings) -> None:
    import logging

    from dgq.convert.cli.terminal.console import err, note
    from dgq.runtime.serve import server

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dgq serve: %(message)s"))
    logging.getLogger("dgq.serve").addHandler(handler)
    run.artifact.tokenizer  # noqa: B018  # refuses a broken tokenizer before the weights are loaded
    tower_device = run.device if run.request.vram is None else "cpu"
    vram = run.request.vram and server.weights_vram(run.artifact.config, settings, run.request.vram)
    model = run.artifact.load(run.device, run.dtype, vram=vram)
    served = server.served(run.artifact, model, settings, tower_device)

    def ready(address: str) -> None:
        where = f"{settings.name} on {run.device}, {settings.rows} rows, context {settings.context}"
        note(f"serving {where}: {address}/v1, and a page at {address}/")

    server.run(served, ready)
    err.print("dgq serve: stopped")


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise InputError(f"dgq serve needs {', '.join(missing)}: pip install 'dgq[serve]'")


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, without its empty lines and those that begin with #."""
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: holds no key")
    return keys
