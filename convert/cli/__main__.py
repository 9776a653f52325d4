"""The command line. Each command is a few lines: parse, call one function, show what it returned.

Everything heavy is imported inside the command that needs it, so that `dgq --help` answers at once.
Exit codes: 0 done, 1 a check failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import click

from dgq.convert.cli.bench import bench
from dgq.convert.cli.calibrate import calibrate
from dgq.convert.cli.mix import mix
from dgq.convert.cli.publish import publish
from dgq.convert.cli.validate import validate
from dgq.convert.cli.verify import verify
from dgq.convert.source.sizes import Size
from dgq.convert.terminal.errors import OneLineErrors
from dgq.convert.terminal.options import ADAPTER, DEVICE, JSON, RAM, REVISION, SOURCE, VRAM
from dgq.quant.errors import InputError

# Before torch is imported: OpenMP threads that spin while they wait make small products a hundred times slower as soon
# as another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# And CUDA's memory in segments that grow: of those of fixed sizes 1 GiB lay between a loaded Q4_K_M's weights, unused.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dgq")
def main() -> None:
    """Quantise, inspect and run DiffusionGemma.

    SRC is a BF16 checkpoint directory, a Hub id (USER/NAME) or `tiny`, the small trained model that ships with dgq.
    """


_FORMATS = click.Choice(["nvfp4", "bnb4", "gguf"])
_TO = click.option("--to", "to", type=_FORMATS, required=True, help="Format of the artifact.")
_RECIPE = click.option("--recipe", help="Recipe name or .toml file. [default: nvfp4, bnb4, q4_k_m]")


@main.command()
@SOURCE
@click.option("--to", "to", type=_FORMATS, help="Format of the artifact. [default: the sizes of every recipe]")
@_RECIPE
@REVISION
@ADAPTER
@click.option("--threads", type=click.IntRange(1, 1024), help="To convert with. [default: CPU cores]")
@click.option("--no-probe", is_flag=True, help="Do not try how fast this machine is: no estimate of time.")
@JSON
def plan(
    src: str,
    to: str | None,
    recipe: str | None,
    revision: str | None,
    adapters: tuple[Path, ...],
    threads: int | None,
    no_probe: bool,
    as_json: bool,
) -> None:
    """Show what `convert` would write, and what you will need: disk, RAM, time, VRAM. Reads headers only."""
    from dgq.convert.estimate.choices import choices
    from dgq.convert.estimate.needs import needs
    from dgq.convert.estimate.probe import probe
    from dgq.convert.plans.plan import make_plan
    from dgq.convert.plans.recipes import find_recipe
    from dgq.convert.source.checkpoint import open_source
    from dgq.convert.terminal import console, show_choices

    if to is None and recipe is not None:
        raise InputError("--recipe: needs --to, the recipe's format; without both, plan shows every recipe's size")
    source = open_source(src, revision, weights=False, adapters=adapters)
    if to is None:
        found = choices(source)
        return console.print_json({"source": src, "recipes": found}) if as_json else show_choices.choices(src, found)
    planned = make_plan(source, find_recipe(to, recipe))
    threads = threads or os.cpu_count() or 1
    found = needs(planned, threads) | ({} if no_probe else {"estimate": probe(planned, threads)})
    console.print_json(planned.to_json() | found) if as_json else console.plan(planned, recipe, found)


@main.command()
@SOURCE
@_TO
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@_RECIPE
@REVISION
@ADAPTER
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="llama.cpp's importance matrix to weigh a GGUF's columns with, of llama-imatrix or `dgq calibrate`.",
)
@click.option(
    "--effort",
    type=click.Choice(["stock", "fast", "standard", "max"]),
    help="stock: exactly the bytes of the format's own quantiser. fast: the best scales without data. standard: error"
    " feedback by --stats; max: gone over twice more. [default: fast; standard with --stats; stock with --imatrix]",
)
@click.option("--stats", type=click.Path(path_type=Path), help="What `dgq calibrate` found out about SRC.")
@click.option(
    "--input-scale",
    default="calibrate",
    show_default=True,
    help="Of W4A4 NVFP4: 'calibrate' on the prompts that ship with dgq, or one number for all experts.",
)
@DEVICE
@click.option("--threads", type=click.IntRange(1, 1024), help="Slices quantised at once. [default: CPU cores]")
@RAM
@VRAM
@JSON
def convert(
    src: str,
    to: str,
    out: Path,
    recipe: str | None,
    revision: str | None,
    adapters: tuple[Path, ...],
    imatrix: Path | None,
    effort: str | None,
    stats: Path | None,
    input_scale: str,
    device: str,
    threads: int | None,
    ram: int | None,
    vram: int | None,
    as_json: bool,
) -> None:
    """Quantise SRC into the directory given with -o."""
    from dgq.convert.calibration.stats import read_stats
    from dgq.convert.estimate import needs
    from dgq.convert.layerwise.budget import Budget
    from dgq.convert.plans.plan import make_plan
    from dgq.convert.plans.recipes import find_recipe
    from dgq.convert.resume.journal import check_target
    from dgq.convert.source.checkpoint import open_source
    from dgq.convert.source.device import chosen_device
    from dgq.convert.source.hub import is_hub_id
    from dgq.convert.terminal import console
    from dgq.convert.write import pipeline
    from dgq.convert.write.input_scales import requested
    from dgq.convert.write.refine import refinable
    from dgq.convert.write.settings import CALIBRATED, ConversionSettings
    from dgq.quant.files.imatrix import read_imatrix

    effort = effort or ("standard" if stats else "stock" if imatrix else "fast")
    if (effort in CALIBRATED) != (stats is not None):
        raise InputError(
            f"--effort {effort}: {'takes no --stats' if stats else 'needs --stats; dgq calibrate makes them'}"
        )
    if imatrix and effort != "stock":
        raise InputError(f"--imatrix: weighs the columns of effort stock, not of {effort}")
    out = out.expanduser()
    check_target(out)
    device = chosen_device(device)
    policy = find_recipe(to, recipe)
    if is_hub_id(src):  # from headers: a recipe that does not fit is said before anything large is fetched
        revision = make_plan(open_source(src, revision, weights=False, adapters=adapters), policy).source.where.revision
    planned = make_plan(open_source(src, revision, adapters=adapters), policy)
    if stats and not any(refinable(tensor) for tensor in planned.tensors):
        raise InputError(f"--stats {stats}: recipe {policy.name} quantises nothing that they serve; leave them out")
    if not as_json:
        console.notices(planned)
    budget = Budget(ram, vram)
    threads = budget.threads(threads or os.cpu_count() or 1, *needs.slices_ram(planned), device)
    options = ConversionSettings(
        effort, read_imatrix(imatrix) if imatrix else None, threads, device,
        read_stats(stats, planned.source) if stats else None,
        requested(planned, input_scale), budget,
    )  # fmt: skip
    with console.bar("converting", planned.nbytes) as advance:
        done = pipeline.convert(planned, out, options, advance, console.note)
    about = {"output": str(done.file), "seconds": done.seconds, "resumed_weights": done.resumed}
    console.print_json({**about, **done.document}) if as_json else console.converted(planned, done)


@main.command()
@click.argument("artifact")
@REVISION
@JSON
def inspect(artifact: str, revision: str | None, as_json: bool) -> None:
    """Show what an artifact (or a checkpoint) holds and where it came from. Reads headers only; a published artifact
    is fetched whole. Of STATS: how many tokens each expert saw."""
    from dgq.convert.calibration.stats import counted
    from dgq.convert.terminal import console, show_stats
    from dgq.convert.verification.inspect import inspect_artifact

    if Path(artifact).is_file() and (stats := counted(Path(artifact))) is not None:
        return console.print_json(stats) if as_json else show_stats.counted(artifact, stats)
    found = inspect_artifact(artifact, revision)
    console.print_json(found) if as_json else console.inspected(found)


@main.command()
@click.argument("model", metavar="SRC|ARTIFACT")
@click.argument("prompt", required=False)
@click.option(
    "--chat",
    is_flag=True,
    help="Put PROMPT through the chat template; without one, converse, a line a turn (/image FILE: a picture for the"
    " next).",
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
@click.option("--max-new-tokens", type=click.IntRange(1), help="[default: the model's generation_config]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps a canvas at most. [default: generation_config]")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="The same seed gives the same text."
)
@DEVICE
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="Of activations. [auto: bf16 on CUDA]"
)
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
    max_new_tokens: int | None,
    steps: int | None,
    seed: int,
    device: str,
    dtype: str,
    activations: str | None,
    rng: Literal["counter", "torch"],
    vram: int | None,
    revision: str | None,
    adapters: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Write text from a prompt ("-" reads it from standard input) and watch the canvas take shape."""
    from dgq.convert.terminal import console
    from dgq.convert.verification.generate import generate_text

    if thinking is not None and not chat:
        raise InputError("--thinking: is a switch of the chat template; add --chat")
    if prompt is None:
        from dgq.convert.terminal.conversation import converse

        if not chat:
            raise click.MissingParameter(param_type="argument", param_hint="'PROMPT'")
        converse(
            model, revision=revision, thinking=thinking, max_new_tokens=max_new_tokens, steps=steps, seed=seed,
            device=device, dtype=dtype, activations=activations, rng=rng, vram=vram, as_json=as_json, adapters=adapters,
            images=images,
        )  # fmt: skip
        return
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()
    except UnicodeError:
        raise InputError("PROMPT is not valid UTF-8") from None
    answer = generate_text(
        model, text, images=images, revision=revision, chat=chat, max_new_tokens=max_new_tokens, steps=steps, seed=seed,
        device=device, dtype=dtype, activations=activations, rng=rng, vram=vram,
        draw=not as_json and sys.stdout.isatty(),
        thinking=thinking, adapters=adapters,
    )  # fmt: skip
    console.print_json(answer) if as_json else console.answer(answer)


main.add_command(bench)
main.add_command(calibrate)
main.add_command(mix)
main.add_command(validate)
main.add_command(verify)
main.add_command(publish)

if __name__ == "__main__":
    main()
