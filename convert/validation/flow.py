"""`dgq validate`: what artifacts lost beside the model they were made of, in numbers, pictures and an exit code.

    reference   writes freely ── fixed canvases ──> its states (in FILE, with --reference)
    artifact    fixed canvases beside them ── writes freely ── cost ── weights, layers ── parts put back in BF16
                                                                                 │
    gate <── numbers <───────────────────────────────────────────────────────────┘──> report.html, .json, .csv

One model is in memory at a time; every unit's result lies in a file as soon as it is there (resume/work.py), so the
same command goes on where it broke off, and under torchrun units are dealt out to the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dgq.convert.resume.ranks import process_group
from dgq.convert.resume.target import check_target
from dgq.convert.resume.work import Work
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import dgq_version
from dgq.convert.validation import scores
from dgq.convert.validation.fixed import states
from dgq.convert.validation.free import free_batches, run
from dgq.convert.validation.gate import Gate
from dgq.convert.validation.judge import Json, Judge, Lazy, Options, has_input_scales, plain
from dgq.convert.validation.questions import LEVELS, batches, questions, written
from dgq.convert.validation.reference import Reference, combined, read_reference
from dgq.convert.validation.sensitivity import parts
from dgq.convert.verification.generate import open_model
from dgq.convert.verification.inspect import provenance_of
from dgq.convert.verification.template import template_remarks
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import EMBEDDING


def validate(
    asked: list[str], against: str | None, out: Path | None, file: Path | None, gate: Gate, options: Options,
    advance: Callable[[int, int], None], notice: Callable[[str], None], revision: str | None = None,
    adapters: Sequence[Path] = (),
) -> Json | None:  # fmt: skip
    """Judge artifacts and write the report to the directory `out`; the content of its report.json, None in all
    processes of torchrun but the first. Without artifacts only the reference `file` is made."""
    with process_group(options.device):
        return _validate(asked, against, out, file, gate, options, advance, notice, revision, adapters)


def _validate(
    asked: list[str], against: str | None, out: Path | None, file: Path | None, gate: Gate, options: Options,
    advance: Callable[[int, int], None], notice: Callable[[str], None], revision: str | None,
    adapters: Sequence[Path],
) -> Json | None:  # fmt: skip
    target = out or file
    if target is None:
        raise InputError("nothing to write: give -o REPORT, or --reference FILE to keep the reference alone")
    if out is not None:
        check_target(out)
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"{file}: there is no directory {file.absolute().parent} to keep the reference in")
    there = file is not None and file.exists()
    if not there and against is None:
        raise InputError("--against SRC is needed, unless --reference names a file that is there")
    if adapters and against is None:
        raise InputError("--adapter: needs --against SRC, into which it is merged")
    source = open_model(against, revision, adapters) if against else None
    artifacts = _open(asked, options)
    kept = read_reference(file) if there and file is not None else None
    remarks = {
        name: (*template_remarks(artifact, source), *_adapter_remarks(artifact, adapters, kept))
        for name, artifact in artifacts.items()
    }
    for name, lines in remarks.items():
        for line in lines:
            notice(f"{name}: {line}")
    if kept is not None:
        _check_kept(kept, file, source, options)
    with Work(target, _identity(asked, artifacts, source, kept, file, options), advance, notice) as work:
        work.total = _units(source, artifacts, kept, options)
        reference = kept or _reference(source, against, options, work)
        if kept is None and file is not None and work.rank == 0:
            reference.save(file)
        judges = [Judge(name, artifact, reference, source, options, work) for name, artifact in artifacts.items()]
        report = {**_about(reference, source, options), "artifacts": [judge.judged(gate) for judge in judges]}
        for one in report["artifacts"]:
            one["remarks"] = list(remarks[one["name"]])
        if judges:
            _beside(report, reference, judges, source)
        if work.rank == 0 and out is not None:
            from dgq.convert.validation.report import write  # brings matplotlib

            write(report, out)
        return report if work.rank == 0 else None


def _beside(report: Json, reference: Reference, judges: list[Judge], source: Artifact | None) -> None:
    """Add what the reference wrote, and texts side by side in the place of all."""
    tokenizer = (source or judges[0].artifact).tokenizer
    base, found = judges[0].base, {one["name"]: one["free"] for one in report["artifacts"]}
    report["reference"]["free"] = base
    report["texts"] = scores.side_by_side(reference, tokenizer, base, found)
    for one in (base, *found.values()):
        del one["texts"]
    report["ok"] = all(one["ok"] for one in report["artifacts"])


def _open(asked: list[str], options: Options) -> dict[str, Artifact]:
    """By a name of its own."""
    found: dict[str, Artifact] = {}
    for one in asked:
        artifact = open_model(one)
        name = Path(one).stem if one.endswith(".gguf") else Path(one).name or one
        while name in found:
            name += "'"
        found[name] = artifact
    if options.activations and found and not any(has_input_scales(artifact) for artifact in found.values()):
        raise InputError(f"--activations {options.activations}: none of {', '.join(found)} holds input scales (W4A4)")
    return found


def _identity(
    asked: list[str], artifacts: dict[str, Artifact], source: Artifact | None, kept: Reference | None,
    file: Path | None, options: Options,
) -> dict[str, object]:  # fmt: skip
    files = {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for opened in (*artifacts.values(), *([source] if source else []))
        for path in opened.weights.files
    }
    return {
        "dgq": dgq_version(), "artifacts": asked, "files": files, "options": asdict(options),
        "reference": kept.about["weights"] if kept else str(file), "adapters": _adapters(source),
    }  # fmt: skip


def _adapter_remarks(artifact: Artifact, given: Sequence[Path], kept: Reference | None) -> tuple[str, ...]:
    """That the reference may not be what was quantised: dgq.json names adapters, and none was given. A reference that
    is kept tells by its name what was merged into it (see _reference)."""
    merged = (provenance_of(artifact) or {}).get("adapters") or []
    held = str(kept.about["name"]).rpartition(" with ")[2].split(", ") if kept else []
    if not merged or given or held == merged:
        return ()
    names = " ".join(f"--adapter {name}" for name in merged)
    return (f"made with {names}, which was not given: unless the reference holds it, this is not what was quantised",)


def _adapters(source: Artifact | None) -> list[Json]:
    return [one.about for one in source.weights.adapters] if source and isinstance(source.weights, Source) else []


def _units(source: Artifact | None, artifacts: dict[str, Artifact], kept: Reference | None, options: Options) -> int:
    """What the progress bar counts to; close enough."""
    size = options.size
    config = source.config if source else next(iter(artifacts.values())).config
    count = len(kept.questions) if kept else 2 * size.questions
    fixed = len(batches(count, config.canvas, config.vocab))
    ran = -(-size.questions // 8) + -(-size.texts // 8)
    each = fixed + ran + 1
    if source is not None:
        each += len(config.layers) + 1 + -(-size.layered // 4)
    parted = sum(len(parts(artifact)) for artifact in artifacts.values()) * size.batches if source else 0
    return each * len(artifacts) + parted + (0 if kept else fixed + ran + 1)


def _check_kept(kept: Reference, file: Path | None, source: Artifact | None, options: Options) -> None:
    """That FILE is what the other options ask for."""
    about = kept.about
    if options.seed is not None and options.seed != about["seed"]:
        raise InputError(f"--seed {options.seed}: {file} was made with seed {about['seed']}")
    if options.quick and not about["quick"]:
        raise InputError(f"--quick: {file} is a full reference; leave --quick out, or name another file")
    if options.prompts is not None:
        raise InputError(f"--prompts: {file} has its own; leave it out, or name another file")
    if source is not None and isinstance(source.weights, Source) and source.weights.digest() != about["weights"]:
        raise InputError(f"{file}: was made from other weights than {source.path}; name another file")


def _reference(source: Artifact | None, against: str | None, options: Options, work: Work) -> Reference:
    """Everything that is asked of the reference model."""
    assert source is not None and against is not None
    size, config, seed = options.size, source.config, options.seed or 0
    found, about = questions(source, against, options.prompts, size.questions)
    lazy = Lazy(source, options, None)
    spent = work.each("reference-cost", 1, lambda unit: lazy.cost(found[0].prompt))(0)
    ran = free_batches(found, size.texts, config.canvas, config.vocab)
    said = work.each(
        "reference-free", len(ran),
        lambda unit: run(lazy.model, source.generation, found, ran[unit], seed, size.blocks),
    )  # fmt: skip
    free = combined([said(unit) for unit in range(len(ran))])
    rows = [row for batch in ran for row in batch]
    first = {row: free["canvases"][i : i + 1] for i, row in enumerate(rows)}
    found = [written([q], first[i], config.canvas)[0] if q.canvas is None else q for i, q in enumerate(found)]
    several = batches(len(found), config.canvas, config.vocab)
    kept = work.each("reference-fixed", len(several), lambda unit: states(lazy.model, found, several[unit], seed))
    lazy.drop()
    table = source.weights[EMBEDDING]
    merged = [str(one["name"]) for one in _adapters(source)]
    said_of = {
        "name": f"{against} with {', '.join(merged)}" if merged else against,
        "weights": source.weights.digest() if isinstance(source.weights, Source) else None,
        "config": asdict(config), "generation": asdict(source.generation),
        "bytes": sum(weight.nbytes for weight in source.weights.everything().values()),
        "prompts": about, "seed": seed, "quick": options.quick, "dtype": str(options.precision), "rows": rows,
        "blocks": size.blocks, "device": _device_name(options.device),
        "cost": {name: float(value) for name, value in spent.items()},
    }  # fmt: skip
    return Reference(plain(said_of), found, table, free, lambda number: kept(number)["states"])


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _about(reference: Reference, source: Artifact | None, options: Options) -> Json:
    about = reference.about
    return {
        "dgq": dgq_version(), "device": _device_name(options.device), "dtype": str(options.precision),
        "quick": about["quick"], "seed": about["seed"], "activations": options.activations, "levels": list(LEVELS),
        "questions": about["prompts"] | {"run_freely": len(about["rows"])},
        "reference": {"name": about["name"], "bytes": about["bytes"], "cost": about["cost"], "dtype": about["dtype"],
                      "device": about["device"], "weights_compared": source is not None},
        "ok": True,
    }  # fmt: skip
