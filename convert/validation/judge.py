"""One artifact beside the reference: every unit of its judgement, and what the units add up to.

    structure, cost ── fixed canvases ── free run ── weights, layers, parts put back ──> ArtifactResult ── gate

The model is loaded when a unit first needs it: where all results lie in files already, it is not loaded at all.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dgq.convert.layerwise.measure import MEASURES, Head
from dgq.convert.resume.work import UnitResult, Work
from dgq.convert.source.hashes import describe
from dgq.convert.validation import losses, scores
from dgq.convert.validation.cost import cost
from dgq.convert.validation.fixed import FixedBatch, ReferenceStates, measures
from dgq.convert.validation.free import free_batches, run
from dgq.convert.validation.questions import LEVELS
from dgq.convert.validation.reference import KeptReference, combined
from dgq.convert.validation.report.gate import Gate
from dgq.convert.validation.report.limits import check_limits
from dgq.convert.validation.report.result import (
    ArtifactResult,
    Cost,
    FixedResult,
    FreeComparison,
    Json,
    LayerError,
    PartRecovery,
    WeightError,
)
from dgq.convert.validation.sensitivity import ModelPart, parts, restored
from dgq.convert.write.provenance import FILE, coverage_of
from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import SamplerConfig

BARE = ("eos_ids", "pad_id", "rope_partial")  # settings that a .gguf's metadata does not hold, or not as such
LAYERED = 8  # questions whose layers are compared at once


@dataclass(frozen=True)
class SampleSize:
    """How much is looked at. questions: of each kind; texts: that are continued, with `blocks` canvases each; batches,
    levels (positions in LEVELS): of sensitivity; layered: questions whose layers are compared."""

    questions: int
    texts: int
    blocks: int
    batches: int
    levels: tuple[int, ...]
    layered: int


FULL = SampleSize(48, 24, 1, 1, (0, 1, 2, 3), 16)
QUICK = SampleSize(12, 4, 1, 1, (2,), 4)


@dataclass(frozen=True)
class RunSettings:
    """How models are run. prompts: the user's JSONL; seed: of noise and random tokens, None for the reference's or 0;
    quick: a first look; device: "cpu" or "cuda"; dtype: of activations, None for the device's usual one; activations:
    "nvfp4" to round the inputs of W4A4 weights."""

    prompts: Path | None
    seed: int | None
    quick: bool
    device: str
    dtype: torch.dtype | None
    activations: str | None

    @property
    def size(self) -> SampleSize:
        return QUICK if self.quick else FULL

    @property
    def precision(self) -> torch.dtype:
        return self.dtype or (torch.float32 if self.device == "cpu" else torch.bfloat16)


class LazyModel:
    """A model that is loaded when it is first asked for, and can be dropped."""

    def __init__(self, artifact: Artifact, settings: RunSettings, activations: str | None) -> None:
        self._artifact, self._settings, self._activations = artifact, settings, activations
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self._load(kernels=False)  # whose parts can be put back
        return self._model

    def cost(self, prompt: tuple[int, ...]) -> UnitResult:
        """Load the model and measure what that costs: see cost.cost()."""
        self.drop()
        model, spent = cost(self._load, prompt, self._artifact.generation, self._settings.device)
        if model.kernels is None:
            self._model = model
        else:
            del model
            self.drop()  # before another one is loaded beside it
        return spent

    def _load(self, kernels: bool | None = None) -> Model:
        settings = self._settings
        return self._artifact.load(settings.device, settings.precision, self._activations, kernels=kernels)

    def drop(self) -> None:
        """Free the model's memory now: a model and its session hold each other."""
        self._model = None
        gc.collect()
        if self._settings.device == "cuda":
            torch.cuda.empty_cache()


class Judge:
    """Judges one artifact by the reference. source: the BF16 model, None where only what was kept of it is at hand."""

    def __init__(
        self, name: str, artifact: Artifact, reference: KeptReference, source: Artifact | None, settings: RunSettings,
        work: Work,
    ) -> None:  # fmt: skip
        """InputError if the artifact has not the reference's shape."""
        self.name, self.artifact, self.reference, self.source = name, artifact, reference, source
        self.settings, self.work = settings, work
        self.seed, self.blocks = reference.about["seed"], reference.about["blocks"]
        _check_same_shape(artifact, reference)
        self._activations = settings.activations if has_input_scales(artifact) else None
        self._lazy = LazyModel(artifact, settings, self._activations)

    def result(self, gate: Gate) -> ArtifactResult:
        """Do all units that are not done, and hold the result against the gate."""
        one = self._measured()
        self._lazy.drop()
        checks = check_limits(gate, one, self.reference.about)
        return replace(one, gate=checks, ok=all(check.ok is not False for check in checks))

    def _measured(self) -> ArtifactResult:
        artifact, stored = self.artifact, self.artifact.weights.everything()
        text = {name: stored[name] for name in artifact.weights}
        below = {name for name, weight in stored.items() if stored_bits(weight.scheme) < 16}
        routed = [name for name in text if ".experts." in name]
        numel = sum(weight.numel for weight in stored.values())
        compared = self.source is not None
        return ArtifactResult(
            name=self.name, kind=artifact.kind, path=str(artifact.path), files=judged_files(artifact),
            bytes=sum(weight.nbytes for weight in stored.values()), params=numel,
            quantized_share=sum(stored[name].numel for name in below) / numel,
            experts_share=sum(text[n].numel for n in routed if n in below) / sum(text[n].numel for n in routed),
            schemes={name: weight.scheme for name, weight in text.items()}, calibration=coverage_of(artifact),
            config=self._config(), generation=plain(asdict(artifact.generation)), activations=self._activations,
            device=self.settings.device, cost=self._cost, fixed=self._fixed(), free=self._free(),
            weights=self._weights() if compared else None, layers=self._layers() if compared else None,
            sensitivity=self._sensitivity() if compared else None,
        )  # fmt: skip

    @cached_property
    def _cost(self) -> Cost:
        prompt = self.reference.questions[0].prompt
        spent = self.work.each(f"{self.name}-cost", 1, lambda unit: self._lazy.cost(prompt))(0)
        return Cost(**{name: float(value) for name, value in spent.items()})

    def _config(self) -> Json:
        """The model's settings; where a .gguf alone has no place for one, the source's."""
        config: Json = plain(asdict(self.artifact.config))
        bare = self.artifact.path.is_file()
        return config | ({key: self.reference.about["config"][key] for key in BARE} if bare else {})

    def _fixed(self) -> FixedResult:
        return scores.fixed(self._measures, self.reference.questions)

    @cached_property
    def _measures(self) -> torch.Tensor:
        """(levels, 2, measures, questions, canvas)."""
        count = len(self.reference.batches)
        results = self.work.each(f"{self.name}-fixed", count, lambda unit: self._measures_of(self._lazy.model, unit))
        return scores.joined(results, count)

    def _measures_of(self, model: Model, unit: int, levels: Sequence[int] = range(len(LEVELS))) -> UnitResult:
        reference = self.reference
        sampler = SamplerConfig(**reference.about["generation"]["sampler"])
        batch = FixedBatch(reference.questions, reference.batches[unit], self.seed)
        return measures(model, batch, ReferenceStates(reference.states(unit), self._head, sampler), levels)

    @cached_property
    def _head(self) -> Head:
        return self.reference.head(torch.device(self.settings.device))

    @cached_property
    def base_run(self) -> scores.FreeRun:
        """The reference's free run."""
        origin, about = self.source or self.artifact, self.reference.about
        return self._run(self.reference.free, origin, about["cost"]["step_ms"])

    @cached_property
    def free_run(self) -> scores.FreeRun:
        """The artifact's free run on the same prompts."""
        reference, generation, config = self.reference, self.artifact.generation, self.artifact.config
        texts = sum(1 for row in reference.about["rows"] if reference.questions[row].group == "text")
        batches = free_batches(reference.questions, texts, config.canvas, config.vocab)
        results = self.work.each(
            f"{self.name}-free", len(batches),
            lambda unit: run(self._lazy.model, generation, reference.questions, batches[unit], self.seed, self.blocks),
        )  # fmt: skip
        ran = combined([results(unit) for unit in range(len(batches))])
        return self._run(ran, self.artifact, self._cost.step_ms)

    def _run(self, ran: UnitResult, model: Artifact, step_ms: float) -> scores.FreeRun:
        questions = [self.reference.questions[row] for row in self.reference.about["rows"]]
        tokenizer = (self.source or self.artifact).tokenizer
        seconds = float(ran["seconds"].sum())
        return scores.FreeRun(ran["canvases"], ran["steps"], seconds, questions, model.generation, tokenizer, step_ms)

    def _free(self) -> FreeComparison:
        return scores.free_comparison(self.free_run, self.base_run)

    def _weights(self) -> tuple[WeightError, ...]:
        assert self.source is not None
        stages = losses.stages(list(self.artifact.weights), len(self.artifact.config.layers))
        source, other, device = self.source.weights, self.artifact.weights, self.settings.device
        results = self.work.each(
            f"{self.name}-weights", len(stages), lambda unit: losses.weight_errors(source, other, stages[unit], device)
        )
        errors = {name: value for unit in range(len(stages)) for name, value in results(unit).items()}
        stored = self.artifact.weights.everything()
        return scores.weights(errors, {name: stored[name].scheme for stage in stages for name in stage})

    def _layers(self) -> tuple[LayerError, ...]:
        source, chunks, settings = self.source, self._layered(), self.settings
        assert source is not None

        def errors(unit: int) -> UnitResult:
            chunk = losses.layer_chunk(self.reference.questions, chunks[unit], self.seed, source.config.vocab)
            return losses.layer_errors(source, self.artifact, chunk, settings.device, settings.precision,
                                       self._activations)  # fmt: skip

        results = self.work.each(f"{self.name}-layers", len(chunks), errors)
        return scores.layers([results(unit) for unit in range(len(chunks))])

    def _layered(self) -> list[range]:
        """The questions whose layers are compared, LAYERED at a time: evenly from all kinds."""
        count, wanted = len(self.reference.questions), self.settings.size.layered
        step = -(-count // wanted)
        return [range(i, min(i + step * LAYERED, count), step) for i in range(0, count, step * LAYERED)]

    def _sensitivity(self) -> tuple[PartRecovery, ...]:
        model_parts, levels = parts(self.artifact), self.settings.size.levels
        batches = range(min(self.settings.size.batches, len(self.reference.batches)))
        put_back = {}
        for number, part in enumerate(model_parts):
            restoring = _Restored(self._lazy, part, self.source)
            measure = partial(self._with_part, restoring, levels)
            results = self.work.each(f"{self.name}-part-{number}", len(batches), measure)
            put_back[part.name] = _kl(scores.joined(results, len(batches)))
        count = sum(len(self.reference.batches[unit]) for unit in batches)
        base = _kl(self._measures[list(levels)][:, :, :, :count])
        return scores.sensitivity(base, put_back, model_parts)

    def _with_part(self, restoring: _Restored, levels: Sequence[int], unit: int) -> UnitResult:
        return self._measures_of(restoring.model, unit, levels)


class _Restored:
    """The model with one part put back in BF16, made when it is first asked for."""

    def __init__(self, lazy: LazyModel, part: ModelPart, source: Artifact | None) -> None:
        self._lazy, self._part, self._source = lazy, part, source

    @cached_property
    def model(self) -> Model:
        assert self._source is not None
        return self._lazy.model.replaced(restored(self._part, self._source.weights))


def judged_files(artifact: Artifact) -> Json:
    """Size and SHA-256 of its weight files and its dgq.json, by which `dgq publish` knows it again."""
    files = artifact.weights.files
    return {file.name: describe(file) for file in (*files, files[0].parent / FILE) if file.is_file()}


def _kl(measures: torch.Tensor) -> torch.Tensor:
    """measures (levels, 2, measures, questions, canvas) -> KL float64 (questions,), nats."""
    return measures[:, :, MEASURES.index("kl")].double().mean((0, 1, 3))


def _check_same_shape(artifact: Artifact, reference: KeptReference) -> None:
    """InputError if canvases and logits cannot be compared at all."""
    config = reference.about["config"]
    for key in ("vocab", "canvas", "hidden", "experts"):
        ours, theirs = config[key], getattr(artifact.config, key)
        if ours != theirs:
            raise InputError(
                f"{artifact.path}: {key} is {theirs}, but {ours} in {reference.about['name']}; it was not made of it"
            )
    if len(config["layers"]) != len(artifact.config.layers):
        raise InputError(f"{artifact.path}: has {len(artifact.config.layers)} layers, not {len(config['layers'])}")


def has_input_scales(artifact: Artifact) -> bool:
    """Whether it is W4A4: all experts have input scales, or none."""
    routed = next(name for name in artifact.weights if ".experts." in name)
    return "input_scale" in artifact.weights[routed].parts


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value
