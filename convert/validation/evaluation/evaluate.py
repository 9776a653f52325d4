"""`dgq eval`: artifacts and the model they were made of, on tasks of lm-evaluation-harness, in one engine.

    tasks ──load_tasks──┐
    SRC, artifacts ── Examinee ── HarnessModel ── run_tasks ──> EvaluationResult ──> evaluation.json
                                                                       └── joined ──> a report of `dgq validate`

One model is in memory at a time. Every batch's answers lie in a file as soon as they are there, so that the same
command goes on where it broke off; under torchrun the batches are dealt out to the processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import torch

from dgq.convert.resume.ranks import process_group
from dgq.convert.resume.target import check_target
from dgq.convert.resume.work import Work
from dgq.convert.source.hashes import dgq_version
from dgq.convert.source.models import open_model
from dgq.convert.validation.evaluation.examinee import Examinee, TaskCost
from dgq.convert.validation.evaluation.harness import (
    HarnessModel,
    Loaded,
    harness_version,
    load_tasks,
    run_tasks,
)
from dgq.convert.validation.evaluation.joining import check_report, join
from dgq.convert.validation.evaluation.options import EvaluateOptions
from dgq.convert.validation.free import ROWS
from dgq.convert.validation.inputs import adapted, adapters_of, named
from dgq.convert.validation.judge import judged_files
from dgq.convert.validation.report.evaluation import EvaluationResult, ModelEvaluation, Score, TaskEvaluation
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact

Advance = Callable[[int, int], None]  # units done, units in all
Notice = Callable[[str], None]  # a line for the user


def evaluate(
    artifacts: Sequence[str], options: EvaluateOptions, advance: Advance | None = None, notice: Notice | None = None
) -> EvaluationResult | None:
    """Score models on tasks of lm-evaluation-harness (Python package lm_eval, extra dgq[eval]) and write the scores.

    artifacts: whatever `dgq run` opens: directories, .gguf files, BF16 checkpoints, Hub ids, `tiny`. advance is called
    with units done and units in all, notice with lines for the user. None comes back in all processes of torchrun but
    the first. InputError, one line, for whatever does not fit.
    """
    notice = notice or (lambda line: None)
    check_target(options.output)
    if not options.tasks:
        raise InputError("--tasks: name at least one task, as gsm8k, or dgq_tiny for tiny")
    if not artifacts and options.against is None:
        raise InputError("nothing to evaluate: name an artifact, or --against SRC")
    device, _ = options.placement()
    loaded = load_tasks(options.tasks, (_own_tasks(), *options.task_folders), options.shots)
    models = _opened(artifacts, options, notice)
    if options.report is not None:
        check_report(
            options.report, {name: judged_files(one) for name, one in models.items() if name != options.against}
        )
    with process_group(device), Work(
        options.output, _identity(artifacts, options, models), advance or (lambda done, total: None), notice,
        "evaluation",
    ) as work:  # fmt: skip
        work.total = len(models) * _units(loaded, options.limit)
        results = tuple(_examined(name, artifact, loaded, options, work) for name, artifact in models.items())
        result = _result(results, options)
        if work.rank == 0:
            text = json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
            options.output.write_text(text, "utf-8")
            if options.report is not None:
                join(result, options.report)
        return result if work.rank == 0 else None


def _own_tasks() -> Path:
    """The folder of the tasks that ship with dgq."""
    return Path(str(files("dgq.recipes"))) / "tasks"


def _opened(artifacts: Sequence[str], options: EvaluateOptions, notice: Notice) -> dict[str, Artifact]:
    """The models by name, SRC first."""
    if options.adapters and options.against is None:
        raise InputError("--adapter: needs --against SRC, beside whose weights it is applied")
    models: dict[str, Artifact] = {}
    if options.against is not None:
        models[options.against] = open_model(options.against, options.revision, options.adapters, notice)
    source = models.get(str(options.against))
    for asked in artifacts:
        artifact = open_model(asked, notice=notice)
        models[named(asked, models)] = adapted(artifact, source) if source and source.adapters else artifact
    return models


def _identity(artifacts: Sequence[str], options: EvaluateOptions, models: Mapping[str, Artifact]) -> dict[str, object]:
    """What must be the same for unfinished work to be gone on with."""
    stamps = {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for one in models.values()
        for path in one.weights.files
    }
    asked = {"dgq": dgq_version(), "harness": harness_version(), "models": list(artifacts), "files": stamps}
    return asked | vars(options) | {"adapters": [adapters_of(one) for one in models.values()]}


def _units(loaded: Loaded, limit: int | None) -> int:
    """The batches of one model; close enough for a progress bar."""
    count = 0
    for task in loaded["tasks"].values():
        documents = 0
        with suppress(Exception):  # A task may make its documents by a program of its own.
            documents = len(task.eval_docs)
        documents = documents if limit is None else min(limit, documents)
        count += -(-documents * (task.get_config("repeats") or 1) // ROWS)
    return count


def _examined(name: str, artifact: Artifact, loaded: Loaded, options: EvaluateOptions, work: Work) -> ModelEvaluation:
    examinee = Examinee(name, artifact, options, work)
    chats = artifact.tokenizer.chats
    try:
        scores = run_tasks(
            HarnessModel(examinee.answer, name if chats else None), loaded, options.limit, options.unsafe_code
        )
    finally:
        examinee.drop()
    children: Mapping[str, Sequence[str]] = loaded.get("group_map") or {}
    tasks = tuple(
        _row(task, found, _cost(task, examinee.costs, children), loaded) for task, found in scores.items() if found
    )
    return ModelEvaluation(name, str(artifact.path), judged_files(artifact), name == options.against, tasks)


def _cost(task: str, costs: Mapping[str, TaskCost], children: Mapping[str, Sequence[str]]) -> TaskCost:
    """A task's cost; a group's is that of all tasks below it."""
    if task in costs:
        return costs[task]
    return sum((_cost(child, costs, children) for child in children.get(task, ())), TaskCost())


def _row(task: str, scores: Sequence[Score], cost: TaskCost, loaded: Loaded) -> TaskEvaluation:
    version = loaded["tasks"][task].VERSION if task in loaded["tasks"] else ""
    return TaskEvaluation(
        task=task, version=str(version), samples=cost.samples, blocks=cost.blocks,
        steps=cost.steps / max(cost.blocks, 1), unsettled=cost.unsettled, tokens=cost.tokens, seconds=cost.seconds,
        scores=tuple(scores),
    )  # fmt: skip


def _result(models: tuple[ModelEvaluation, ...], options: EvaluateOptions) -> EvaluationResult:
    device, dtype = options.placement()
    return EvaluationResult(
        dgq=dgq_version(), harness=harness_version(),
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU", dtype=str(dtype), seed=options.seed,
        limit=options.limit, shots=options.shots, steps_limit=options.steps, models=models,
    )  # fmt: skip
