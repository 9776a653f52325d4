"""`dgq validate`: what artifacts lost beside the model they were made of, in numbers, pictures and a verdict.

    reference   writes freely ── fixed canvases ──> its states (in a file, if one is named)
    artifact    fixed canvases beside them ── writes freely ── cost ── weights, layers ── parts put back in BF16
                                                                                 │
    gate <── ValidationResult <──────────────────────────────────────────────────┘──> report.html, .json, .csv

One model is in memory at a time. The result of every unit of work lies in a file as soon as it is there
(resume/work.py), so that the same command goes on where it broke off. Under torchrun units are dealt out to the
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from dgq.convert.resume.ranks import process_group
from dgq.convert.resume.work import Work
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import dgq_version
from dgq.convert.validation import scores
from dgq.convert.validation.fixed import FixedBatch, states
from dgq.convert.validation.free import free_batches, run
from dgq.convert.validation.inputs import Inputs, Notice, ValidateOptions, adapters_of, open_inputs
from dgq.convert.validation.judge import Judge, LazyModel, plain
from dgq.convert.validation.questions import LEVELS, batches, questions, written
from dgq.convert.validation.reference import KeptReference, combined
from dgq.convert.validation.report.gate import Gate, read_gate
from dgq.convert.validation.report.result import Cost, Json, PromptSet, ReferenceResult, ValidationResult
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import EMBEDDING

Advance = Callable[[int, int], None]  # units done, units in all


def validate(
    artifacts: Sequence[str], options: ValidateOptions, advance: Advance | None = None, notice: Notice | None = None
) -> ValidationResult | None:
    """Say what artifacts lost against the model they were made of, and write the report.

    artifacts: directories or .gguf files; without any, only options.reference is made. advance is called with units
    done and units in all, notice with lines for the user. The result's `ok` is False where a limit of the gate is
    broken; None comes back in all processes of torchrun but the first. InputError, one line, for whatever does not fit.
    """
    if options.output is not None:
        options = replace(options, output=options.output.expanduser())
    settings, gate = options.settings(), read_gate(options.gate)
    notice = notice or (lambda line: None)
    with process_group(settings.device):
        inputs = open_inputs(artifacts, options, settings, notice)
        identity = inputs.identity(artifacts)
        with Work(options.target, identity, advance or (lambda done, total: None), notice) as work:
            work.total = inputs.units()
            result = _judge(inputs, gate, work)
            if work.rank == 0 and options.output is not None:
                from dgq.convert.validation.report.render import write  # brings matplotlib

                write(result, options.output)
            return result if work.rank == 0 else None


def _judge(inputs: Inputs, gate: Gate, work: Work) -> ValidationResult:
    """Do all units that are not done: the reference's, then each artifact's."""
    reference = inputs.kept or _reference(inputs, work)
    if inputs.kept is None and inputs.options.reference is not None and work.rank == 0:
        reference.save(inputs.options.reference)
    judges = [
        Judge(name, artifact, reference, inputs.merged.get(name, inputs.source), inputs.settings, work)
        for name, artifact in inputs.artifacts.items()
    ]
    results = [replace(judge.result(gate), remarks=inputs.remarks[judge.name]) for judge in judges]
    whole = replace(_about(reference, inputs), artifacts=tuple(results))
    if not judges:
        return whole
    base, tokenizer = judges[0].base_run, (inputs.source or judges[0].artifact).tokenizer
    others = {judge.name: judge.free_run.texts for judge in judges}
    return replace(
        whole, ok=all(one.ok for one in results),
        reference=replace(whole.reference, free=scores.free(base)),
        texts=scores.side_by_side(reference, tokenizer, base.texts, others),
    )  # fmt: skip


def _reference(inputs: Inputs, work: Work) -> KeptReference:
    """Do all units of the reference model: its cost, its free run, its states on fixed canvases."""
    source, against, settings = inputs.source, inputs.options.against, inputs.settings
    assert source is not None and against is not None
    size, config, seed = settings.size, source.config, settings.seed or 0
    asked, prompts = questions(source, against, settings.prompts, size.questions)
    lazy = LazyModel(source, settings, None)
    spent = work.each("reference-cost", 1, lambda unit: lazy.cost(asked[0].prompt))(0)
    running = free_batches(asked, size.texts, config.canvas, config.vocab)
    ran = work.each(
        "reference-free", len(running),
        lambda unit: run(lazy.model, source.generation, asked, running[unit], seed, size.blocks),
    )  # fmt: skip
    free = combined([ran(unit) for unit in range(len(running))])
    rows = [row for batch in running for row in batch]
    first = {row: free["canvases"][i : i + 1] for i, row in enumerate(rows)}
    asked = [written([q], first[i], config.canvas)[0] if q.canvas is None else q for i, q in enumerate(asked)]
    together = batches(len(asked), config.canvas, config.vocab)
    kept = work.each(
        "reference-fixed", len(together), lambda unit: states(lazy.model, FixedBatch(asked, together[unit], seed))
    )
    lazy.drop()
    about = _about_reference(source, inputs) | {
        "prompts": prompts, "seed": seed, "rows": rows, "blocks": size.blocks,
        "cost": {name: float(value) for name, value in spent.items()},
    }  # fmt: skip
    return KeptReference(plain(about), asked, source.weights[EMBEDDING], free, lambda number: kept(number)["states"])


def _about_reference(source: Artifact, inputs: Inputs) -> Json:
    """What is known of the reference model before it runs."""
    merged = [str(one["name"]) for one in adapters_of(source)]
    against, settings = inputs.options.against, inputs.settings
    return {
        "name": f"{against} with {', '.join(merged)}" if merged else against,
        "weights": source.weights.digest() if isinstance(source.weights, Source) else None,
        "config": asdict(source.config), "generation": asdict(source.generation),
        "bytes": sum(weight.nbytes for weight in source.weights.everything().values()),
        "adapters": adapters_of(source),
        "quick": settings.quick, "dtype": str(settings.precision), "device": _device_name(settings.device),
    }  # fmt: skip


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _about(reference: KeptReference, inputs: Inputs) -> ValidationResult:
    """The result before any artifact is judged."""
    about, settings = reference.about, inputs.settings
    prompts = about["prompts"]
    return ValidationResult(
        dgq=dgq_version(), device=_device_name(settings.device), dtype=str(settings.precision), quick=about["quick"],
        seed=about["seed"], activations=settings.activations, levels=LEVELS,
        questions=PromptSet(tuple(prompts["names"]), prompts["sha256"], prompts["questions"], len(about["rows"])),
        reference=ReferenceResult(
            about["name"], about["bytes"], Cost(**about["cost"]), about["dtype"], about["device"],
            weights_compared=inputs.source is not None,
        ),
        ok=True, artifacts=(),
    )  # fmt: skip
