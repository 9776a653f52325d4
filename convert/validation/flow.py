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

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import distributed as dist

from dgq.convert.resume.journal import check_target
from dgq.convert.resume.work import Work
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hashes import dgq_version
from dgq.convert.source.models import open_model
from dgq.convert.validation import scores
from dgq.convert.validation.fixed import FixedBatch, states
from dgq.convert.validation.free import free_batches, run
from dgq.convert.validation.judge import Judge, LazyModel, RunSettings, has_input_scales, plain
from dgq.convert.validation.questions import LEVELS, batches, questions, written
from dgq.convert.validation.reference import KeptReference, combined, read_reference
from dgq.convert.validation.report.gate import Gate, read_gate
from dgq.convert.validation.report.result import Cost, Json, PromptSet, ReferenceResult, ValidationResult
from dgq.convert.validation.sensitivity import parts
from dgq.convert.verification.inspect import provenance_of
from dgq.convert.verification.template import template_remarks
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import EMBEDDING

Advance = Callable[[int, int], None]  # units done, units in all
Notice = Callable[[str], None]  # a line for the user


@dataclass(frozen=True)
class ValidateOptions:
    """What `dgq validate` can be asked for.

    against: SRC, the BF16 model, into which `adapters` (directories) are merged; revision: of SRC on the Hub.
    output: the directory to create for the report. reference: a file with what SRC did; it is read if it is there, else
    written. At least one of the two is needed.
    gate: a TOML file of limits, None for dgq's own. prompts: a JSONL file, None for the prompts that ship with dgq.
    seed: of noise and random tokens, None for the reference's or 0. quick: fewer questions, wider bounds.
    activations: "nvfp4" rounds the inputs of W4A4 weights as such a kernel does. dtype: of activations, auto is bf16 on
    a GPU and fp32 on the CPU.
    """

    against: str | None = None
    output: Path | None = None
    reference: Path | None = None
    gate: Path | None = None
    prompts: Path | None = None
    seed: int | None = None
    quick: bool = False
    activations: Literal["nvfp4"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    revision: str | None = None
    adapters: Sequence[Path] = ()

    @property
    def target(self) -> Path:
        """What is written: the report, else the reference. Unfinished work lies beside it."""
        target = self.output or self.reference
        if target is None:
            raise InputError("nothing to write: give -o REPORT, or --reference FILE to keep the reference alone")
        return target

    def settings(self) -> RunSettings:
        """How models are run. InputError for a device that is not there."""
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        device = chosen_device(self.device)
        return RunSettings(self.prompts, self.seed, self.quick, device, dtype, self.activations)


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
    with _processes(settings.device):
        inputs = _open(artifacts, options, settings, notice)
        work = Work(options.target, inputs.identity(artifacts), advance or (lambda done, total: None), notice)
        work.total = inputs.units()
        try:
            result = _judge(inputs, gate, work)
        except InputError:
            work.remove_if_empty()
            raise
        if work.rank == 0 and options.output is not None:
            from dgq.convert.validation.report.render import write  # brings matplotlib

            write(result, options.output)
        if work.world > 1:
            dist.barrier()
        work.remove()
        return result if work.rank == 0 else None


@contextmanager
def _processes(device: str) -> Iterator[None]:
    """The process group of torchrun, if there is one, with a GPU for each process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Inputs:
    """What a validation starts from, opened and checked. artifacts: name -> artifact; source: the BF16 model; kept: the
    reference that a file holds; remarks: of each artifact, lines for the user. source or kept is there."""

    options: ValidateOptions
    settings: RunSettings
    source: Artifact | None
    artifacts: Mapping[str, Artifact]
    kept: KeptReference | None
    remarks: Mapping[str, tuple[str, ...]]

    def identity(self, asked: Sequence[str]) -> dict[str, object]:
        """What must be the same for unfinished work to be gone on with."""
        opened = (*self.artifacts.values(), *([self.source] if self.source else []))
        files = {
            str(path): [path.stat().st_size, path.stat().st_mtime_ns] for one in opened for path in one.weights.files
        }
        return {
            "dgq": dgq_version(), "artifacts": list(asked), "files": files, "options": asdict(self.settings),
            "reference": self.kept.about["weights"] if self.kept else str(self.options.reference),
            "adapters": _adapters(self.source),
        }  # fmt: skip

    def units(self) -> int:
        """What the progress bar counts to; close enough."""
        size, source = self.settings.size, self.source
        config = source.config if source else next(iter(self.artifacts.values())).config
        count = len(self.kept.questions) if self.kept else 2 * size.questions
        fixed = len(batches(count, config.canvas, config.vocab))
        ran = -(-size.questions // 8) + -(-size.texts // 8)
        each = fixed + ran + 1
        if source is not None:
            each += len(config.layers) + 1 + -(-size.layered // 4)
        restored = sum(len(parts(artifact)) for artifact in self.artifacts.values()) * size.batches if source else 0
        return each * len(self.artifacts) + restored + (0 if self.kept else fixed + ran + 1)


def _open(asked: Sequence[str], options: ValidateOptions, settings: RunSettings, notice: Notice) -> Inputs:
    """Open everything and check that it fits, before any work. InputError for what does not."""
    file, against, adapters = options.reference, options.against, options.adapters
    assert options.target
    if options.output is not None:
        check_target(options.output)
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"{file}: there is no directory {file.absolute().parent} to keep the reference in")
    there = file is not None and file.exists()
    if not there and against is None:
        raise InputError("--against SRC is needed, unless --reference names a file that is there")
    if adapters and against is None:
        raise InputError("--adapter: needs --against SRC, into which it is merged")
    source = open_model(against, options.revision, adapters, notice) if against else None
    artifacts = _open_artifacts(asked, options, notice)
    kept = read_reference(file) if there and file is not None else None
    remarks = {
        name: (*template_remarks(artifact, source), *_adapter_remarks(artifact, adapters, kept))
        for name, artifact in artifacts.items()
    }
    for name, lines in remarks.items():
        for line in lines:
            notice(f"{name}: {line}")
    if kept is not None:
        _check_kept(kept, options, source)
    return Inputs(options, settings, source, artifacts, kept, remarks)


def _open_artifacts(asked: Sequence[str], options: ValidateOptions, notice: Notice) -> dict[str, Artifact]:
    """Each artifact by a name of its own: the directory's, or the .gguf file's without its ending."""
    artifacts: dict[str, Artifact] = {}
    for one in asked:
        artifact = open_model(one, notice=notice)
        name = Path(one).stem if one.endswith(".gguf") else Path(one).name or one
        while name in artifacts:
            name += "'"
        artifacts[name] = artifact
    if options.activations and artifacts and not any(has_input_scales(artifact) for artifact in artifacts.values()):
        names = ", ".join(artifacts)
        raise InputError(f"--activations {options.activations}: none of {names} holds input scales (W4A4)")
    return artifacts


def _adapter_remarks(artifact: Artifact, given: Sequence[Path], kept: KeptReference | None) -> tuple[str, ...]:
    """A remark where the reference may not be what was quantised: dgq.json names adapters, and none was given. The name
    of a reference that was kept says what was merged into it (see _reference)."""
    merged = (provenance_of(artifact) or {}).get("adapters") or []
    held = str(kept.about["name"]).rpartition(" with ")[2].split(", ") if kept else []
    if not merged or given or held == merged:
        return ()
    names = " ".join(f"--adapter {name}" for name in merged)
    return (f"made with {names}, which was not given: unless the reference holds it, this is not what was quantised",)


def _adapters(source: Artifact | None) -> list[Json]:
    return [one.about for one in source.weights.adapters] if source and isinstance(source.weights, Source) else []


def _check_kept(kept: KeptReference, options: ValidateOptions, source: Artifact | None) -> None:
    """InputError unless the kept reference is what the other options ask for."""
    about, file = kept.about, options.reference
    if options.seed is not None and options.seed != about["seed"]:
        raise InputError(f"--seed {options.seed}: {file} was made with seed {about['seed']}")
    if options.quick and not about["quick"]:
        raise InputError(f"--quick: {file} is a full reference; leave --quick out, or name another file")
    if options.prompts is not None:
        raise InputError(f"--prompts: {file} has its own; leave it out, or name another file")
    if source is not None and isinstance(source.weights, Source) and source.weights.digest() != about["weights"]:
        raise InputError(f"{file}: was made from other weights than {source.path}; name another file")


def _judge(inputs: Inputs, gate: Gate, work: Work) -> ValidationResult:
    """Do all units that are not done: the reference's, then each artifact's."""
    reference = inputs.kept or _reference(inputs, work)
    if inputs.kept is None and inputs.options.reference is not None and work.rank == 0:
        reference.save(inputs.options.reference)
    judges = [
        Judge(name, artifact, reference, inputs.source, inputs.settings, work)
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
    merged = [str(one["name"]) for one in _adapters(source)]
    against, settings = inputs.options.against, inputs.settings
    return {
        "name": f"{against} with {', '.join(merged)}" if merged else against,
        "weights": source.weights.digest() if isinstance(source.weights, Source) else None,
        "config": asdict(source.config), "generation": asdict(source.generation),
        "bytes": sum(weight.nbytes for weight in source.weights.everything().values()),
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
