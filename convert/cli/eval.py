"""`dgq eval`: its options, its call, its page. Nothing heavy is imported before it runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dgq.convert.cli.terminal.options import ADAPTER, DEVICE, DTYPE, JSON, REVISION
from dgq.convert.cli.terminal.sizes import Size

if TYPE_CHECKING:
    from dgq.convert.source.adapter import AdapterChoice
    from dgq.convert.validation.evaluation.options import EvaluateOptions
    from dgq.convert.validation.report.evaluation import EvaluationResult


@click.command(name="eval")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1)
@click.option("--tasks", required=True, help="Of lm-evaluation-harness, by name: gsm8k,ifeval. `tiny` has dgq_tiny.")
@click.option("--against", metavar="SRC", help="The BF16 checkpoint they were made of, evaluated as well.")
@click.option(
    "--task-folder",
    "task_folders",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Folder of task files (YAML) of your own; the Python that they name is run.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="evaluation.json", show_default=True, help="To create."
)
@click.option("--report", type=click.Path(path_type=Path), help="Report of `dgq validate` to add the scores to.")
@click.option("--limit", type=click.IntRange(1), help="Prompts of a task at most. [default: all]")
@click.option("--shots", type=click.IntRange(0), help="Worked examples before a prompt. [default: the task's]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of random tokens.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps a canvas at most. [default: generation_config]")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of an answer. [default: the task's]")
@click.option("--thinking/--no-thinking", default=None, help="Think first; thoughts are not scored.")
@click.option("--unsafe-code", is_flag=True, help="Let tasks such as humaneval run the code that the model writes.")
@click.option("--vram", type=Size(), help="Of the GPU, as 12GiB: experts beyond wait in host memory. [default: all]")
@DEVICE
@DTYPE
@REVISION
@ADAPTER
@JSON
def evaluate(
    artifacts: tuple[str, ...],
    tasks: str,
    against: str | None,
    task_folders: tuple[Path, ...],
    output: Path,
    report: Path | None,
    limit: int | None,
    shots: int | None,
    seed: int,
    steps: int | None,
    max_new_tokens: int | None,
    thinking: bool | None,
    unsafe_code: bool,
    vram: int | None,
    device: Literal["auto", "cpu", "cuda"],
    dtype: Literal["auto", "fp32", "bf16"],
    revision: str | None,
    adapters: tuple[AdapterChoice, ...],
    as_json: bool,
) -> None:
    """Score models on tasks of lm-evaluation-harness (pip install 'dgq[eval]'), BF16 beside its quants.

    Goes on where it broke off. Tasks that compare log-likelihoods are refused: block denoising has none.
    """
    from dgq.convert.cli.terminal.console import count_bar, note, print_json
    from dgq.convert.validation.evaluation.evaluate import evaluate as evaluate_models
    from dgq.convert.validation.evaluation.options import EvaluateOptions

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = EvaluateOptions(
        tasks=names, task_folders=task_folders, against=against, output=output, report=report, limit=limit, shots=shots,
        seed=seed, steps=steps, max_new_tokens=max_new_tokens, thinking=thinking, unsafe_code=unsafe_code,
        device=device, dtype=dtype, vram=vram, revision=revision, adapters=adapters,
    )  # fmt: skip
    with count_bar("evaluating") as advance:
        result = evaluate_models(artifacts, options, advance, note)
    if result is not None:
        print_json(result.to_json()) if as_json else _page(result, options)


def _page(result: EvaluationResult, options: EvaluateOptions) -> None:
    """A row for each metric of each task and model."""
    from rich.table import Table

    from dgq.convert.cli.terminal.console import err, following, out

    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", "± stderr", "prompts", "steps", "unsettled", "seconds"):
        table.add_column(heading, justify="right")
    for row in result.rows():
        table.add_row(*_cells(row))
    out.print(table)
    out.print(f"{options.output}: all figures")
    if options.report is not None:
        out.print(f"{options.report / 'report.html'}: has them too")
        following(f"xdg-open {shlex.quote(str(options.report / 'report.html'))}")
    elif options.against is None:
        err.print("note: --against SRC shows BF16's scores beside these", style="yellow")


def _cells(row: Any) -> list[str]:
    score, task, model = row.score, row.task, row.model
    return [
        task.task, score.metric + ("" if score.filter == "none" else f" ({score.filter})"),
        model.name + (" (BF16)" if model.reference else ""), f"{score.value:.4f}",
        "" if score.stderr is None else f"{score.stderr:.4f}", str(score.samples), f"{task.steps:.2f}",
        f"{task.unsettled} of {task.blocks}", f"{task.seconds:.0f}",
    ]  # fmt: skip
