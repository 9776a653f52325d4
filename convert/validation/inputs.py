"""What a validation starts from: what is asked for, opened and checked before any work.

ValidateOptions ── RunSettings (how models are run)
     └─ artifacts, SRC, the file of a kept reference ── open_inputs ──> Inputs
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from dgq.convert.resume.target import check_target
from dgq.convert.source.adapter import AdapterChoice, AdapterLike, about
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hashes import dgq_version
from dgq.convert.source.models import open_model
from dgq.convert.validation.judge import RunSettings, has_input_scales
from dgq.convert.validation.questions import batches
from dgq.convert.validation.reference import KeptReference, read_reference
from dgq.convert.validation.report.result import Json
from dgq.convert.validation.sensitivity import parts
from dgq.convert.verification.inspect import provenance_of
from dgq.convert.verification.template import template_remarks
from dgq.convert.write.provenance import FILE
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact

Notice = Callable[[str], None]  # a line for the user


@dataclass(frozen=True)
class ValidateOptions:
    """What `dgq validate` can be asked for.

    against: SRC, the BF16 model; revision: of SRC on the Hub. adapters: LoRA adapters that are applied beside SRC's
    weights, and beside those of each artifact that was made without adapters.
    output: the directory to create for the report. reference: a file with what SRC did; it is read if it is there, else
    written. At least one of the two is needed.
    gate: a TOML file of limits, None for dgq's own. prompts: a JSONL file, None for the prompts that ship with dgq.
    seed: of noise and random tokens, None for the reference's or 0. quick: fewer questions, wider bounds.
    activations: "nvfp4" rounds the inputs of W4A4 weights as such a kernel does. device: where models run, auto is a
    GPU if there is any. dtype: of activations, auto is bf16 on a GPU and fp32 on the CPU.
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
    adapters: Sequence[AdapterLike] = ()

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


@dataclass(frozen=True)
class Inputs:
    """What a validation starts from, opened and checked. artifacts: name -> artifact; source: the BF16 model; kept: the
    reference that a file holds; remarks: of each artifact, lines for the user. source or kept is there. merged: of
    each artifact that adapters were merged into, the source with the same ones merged: what was quantised."""

    options: ValidateOptions
    settings: RunSettings
    source: Artifact | None
    artifacts: Mapping[str, Artifact]
    kept: KeptReference | None
    remarks: Mapping[str, tuple[str, ...]]
    merged: Mapping[str, Artifact] = field(default_factory=dict)

    def identity(self, asked: Sequence[str]) -> dict[str, object]:
        """What must be the same for unfinished work to be gone on with."""
        opened = (*self.artifacts.values(), *([self.source] if self.source else []))
        files = {
            str(path): [path.stat().st_size, path.stat().st_mtime_ns] for one in opened for path in one.weights.files
        }
        return {
            "dgq": dgq_version(), "artifacts": list(asked), "files": files, "options": asdict(self.settings),
            "reference": self.kept.about["weights"] if self.kept else str(self.options.reference),
            "adapters": adapters_of(self.source),
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


def open_inputs(asked: Sequence[str], options: ValidateOptions, settings: RunSettings, notice: Notice) -> Inputs:
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
        raise InputError("--adapter: needs --against SRC, beside whose weights it is applied")
    source = open_model(against, options.revision, adapters, notice) if against else None
    if source is not None and options.prompts is None and not source.tokenizer.chats:
        notice(f"{against}: has no chat template: judged on texts alone, the chat tasks are left out")
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
    if source is not None and source.adapters:
        artifacts = {name: adapted(artifact, source) for name, artifact in artifacts.items()}
    return Inputs(options, settings, source, artifacts, kept, remarks, _merged_sources(artifacts, source, options))


def _open_artifacts(asked: Sequence[str], options: ValidateOptions, notice: Notice) -> dict[str, Artifact]:
    """Each artifact by a name of its own, see named()."""
    artifacts: dict[str, Artifact] = {}
    for one in asked:
        artifact = open_model(one, notice=notice)
        artifacts[named(one, artifacts)] = artifact
    if options.activations and artifacts and not any(has_input_scales(artifact) for artifact in artifacts.values()):
        names = ", ".join(artifacts)
        raise InputError(f"--activations {options.activations}: none of {names} holds input scales (W4A4)")
    return artifacts


def named(asked: str, taken: Container[str]) -> str:
    """A name for an artifact that is not taken: its directory's, or its .gguf file's without the ending."""
    name = Path(asked).stem if asked.endswith(".gguf") else Path(asked).name or asked
    while name in taken:
        name += "'"
    return name


def _adapter_remarks(artifact: Artifact, given: Sequence[AdapterLike], kept: KeptReference | None) -> tuple[str, ...]:
    """A remark where the reference may not be what was quantised: dgq.json names adapters, and none was given. The name
    of a reference that was kept says what was merged into it (see _reference)."""
    merged = (provenance_of(artifact) or {}).get("adapters") or []
    held = str(kept.about["name"]).rpartition(" with ")[2].split(", ") if kept else []
    if not merged or given or held == merged:
        return ()
    names = " ".join(f"--adapter {name}" for name in merged)
    return (f"made with {names}, which was not given: unless the reference holds it, this is not what was quantised",)


def adapted(artifact: Artifact, source: Artifact) -> Artifact:
    """The artifact with the source's adapters beside its weights, unless some were merged into these."""
    merged = (provenance_of(artifact) or {}).get("adapters")
    return artifact if merged else replace(artifact, adapters=source.adapters, active=source.active)


def _merged_sources(
    artifacts: Mapping[str, Artifact], source: Artifact | None, options: ValidateOptions
) -> dict[str, Artifact]:
    """For each artifact that was made with the adapters that are given: the source with them merged as dgq.json
    says."""
    given = {} if source is None else {one.name: one.path for one in source.adapters}
    sources = {}
    for name, artifact in artifacts.items():
        listed = read_json(artifact.path / FILE).get("adapters") if (artifact.path / FILE).is_file() else None
        if listed and source is not None and all(one["name"] in given for one in listed):
            choices = [AdapterChoice(given[one["name"]], one.get("side"), one["name"]) for one in listed]
            weights = open_source(str(options.against), options.revision, adapters=choices)
            sources[name] = replace(source, weights=weights, adapters=(), active=None)
    return sources


def adapters_of(source: Artifact | None) -> list[Json]:
    return [about(adapter) for adapter in source.adapters] if source else []


def _check_kept(kept: KeptReference, options: ValidateOptions, source: Artifact | None) -> None:
    """InputError unless the kept reference is what the other options ask for."""
    held, file = kept.about, options.reference
    if options.seed is not None and options.seed != held["seed"]:
        raise InputError(f"--seed {options.seed}: {file} was made with seed {held['seed']}")
    if options.quick and not held["quick"]:
        raise InputError(f"--quick: {file} is a full reference; leave --quick out, or name another file")
    if options.prompts is not None:
        raise InputError(f"--prompts: {file} has its own; leave it out, or name another file")
    if source is not None and isinstance(source.weights, Source) and source.weights.digest() != held["weights"]:
        raise InputError(f"{file}: was made from other weights than {source.path}; name another file")
    if source is not None and held.get("adapters", []) != adapters_of(source):
        raise InputError(f"{file}: was made with other adapters; give the same --adapter, or name another file")
