"""One artifact beside the reference: every unit of its judgement, and what they add up to."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dgq.convert.layerwise.measure import MEASURES, Head
from dgq.convert.resume.work import UnitResult, Work
from dgq.convert.source.hashes import describe
from dgq.convert.validation import losses, scores
from dgq.convert.validation.cost import cost
from dgq.convert.validation.fixed import measured
from dgq.convert.validation.free import free_batches, run
from dgq.convert.validation.gate import Gate
from dgq.convert.validation.limits import judged
from dgq.convert.validation.questions import LEVELS
from dgq.convert.validation.reference import Reference, combined
from dgq.convert.validation.sensitivity import Part, parts, restored
from dgq.convert.write.provenance import FILE, coverage_of
from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import SamplerConfig

Json = dict[str, Any]
BARE = ("eos_ids", "pad_id", "rope_partial")  # not in a .gguf's metadata, or not as such
LAYERED = 8  # questions whose layers are compared at once


@dataclass(frozen=True)
class Options:
    """prompts: the user's JSONL; seed: of noise and random tokens; quick: a first look; dtype None: the device's own;
    activations: "nvfp4" to round the inputs of W4A4 weights."""

    prompts: Path | None
    seed: int | None
    quick: bool
    device: str
    dtype: torch.dtype | None
    activations: str | None

    @property
    def size(self) -> Size:
        return QUICK if self.quick else FULL

    @property
    def precision(self) -> torch.dtype:
        return self.dtype or (torch.float32 if self.device == "cpu" else torch.bfloat16)


@dataclass(frozen=True)
class Size:
    """questions of each kind, texts continued, their canvases; batches, and noise levels (of LEVELS), of sensitivity;
    questions whose layers are compared."""

    questions: int
    texts: int
    blocks: int
    batches: int
    levels: tuple[int, ...]
    layered: int


FULL = Size(48, 24, 1, 1, (0, 1, 2, 3), 16)
QUICK = Size(12, 4, 1, 1, (2,), 4)


class Lazy:
    """A model that is loaded when it is first asked for, and can be dropped."""

    def __init__(self, artifact: Artifact, options: Options, activations: str | None) -> None:
        self._artifact, self._options, self._activations = artifact, options, activations
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self._load(kernels=False)  # whose parts can be put back
        return self._model

    def cost(self, prompt: tuple[int, ...]) -> UnitResult:
        """Load it and see what that costs."""
        self.drop()
        model, found = cost(self._load, prompt, self._artifact.generation, self._options.device)
        if model.kernels is None:
            self._model = model
        else:
            del model
            self.drop()  # before another one is loaded beside it
        return found

    def _load(self, kernels: bool | None = None) -> Model:
        options = self._options
        return self._artifact.load(options.device, options.precision, self._activations, kernels=kernels)

    def drop(self) -> None:
        """Free its memory now: a model and its session hold each other."""
        self._model = None
        gc.collect()
        if self._options.device == "cuda":
            torch.cuda.empty_cache()


class Judge:
    """One artifact beside the reference."""

    def __init__(
        self, name: str, artifact: Artifact, reference: Reference, source: Artifact | None, options: Options, work: Work
    ) -> None:
        self.name, self.artifact, self.reference, self.source = name, artifact, reference, source
        self.options, self.work = options, work
        self.seed, self.blocks = reference.about["seed"], reference.about["blocks"]
        self.base: Json = {}
        _check_same_shape(artifact, reference)
        self._scaled = has_input_scales(artifact)
        self._lazy = Lazy(artifact, options, options.activations if self._scaled else None)

    def judged(self, gate: Gate) -> Json:
        """Its part of the report."""
        found = self._structure()
        found |= {"fixed": self._fixed(), "free": self._free()}
        if self.source is not None:
            found |= {"weights": self._weights(), "layers": self._layers(), "sensitivity": self._sensitivity()}
        self._lazy.drop()
        found["gate"] = judged(gate, found)
        found["ok"] = all(line["ok"] is not False for line in found["gate"])
        del found["source"]
        return found

    def _structure(self) -> Json:
        artifact, about = self.artifact, self.reference.about
        stored = artifact.weights.everything()
        text = {name: stored[name] for name in artifact.weights}
        below = {name for name, weight in stored.items() if stored_bits(weight.scheme) < 16}
        routed = [name for name in text if ".experts." in name]
        spent = self.work.each(
            f"{self.name}-cost", 1, lambda unit: self._lazy.cost(self.reference.questions[0].prompt)
        )(0)
        self._step_ms = float(spent["step_ms"])
        numel = sum(weight.numel for weight in stored.values())
        return {
            "name": self.name, "kind": artifact.kind, "path": str(artifact.path), "files": _files(artifact),
            "bytes": sum(weight.nbytes for weight in stored.values()), "params": numel,
            "quantized_share": sum(stored[name].numel for name in below) / numel,
            "experts_share": sum(text[n].numel for n in routed if n in below) / sum(text[n].numel for n in routed),
            "schemes": {name: weight.scheme for name, weight in text.items()},
            "calibration": coverage_of(artifact),
            "config": self._config(), "generation": plain(asdict(artifact.generation)),
            "activations": self.options.activations if self._scaled else None, "device": self.options.device,
            "cost": {name: float(value) for name, value in spent.items()}, "source": about,
        }  # fmt: skip

    def _config(self) -> Json:
        """As the source has it, where a bare .gguf has no place for a key."""
        found: Json = plain(asdict(self.artifact.config))
        bare = self.artifact.path.is_file()
        return found | ({key: self.reference.about["config"][key] for key in BARE} if bare else {})

    def _fixed(self) -> Json:
        count = len(self.reference.batches)
        results = self.work.each(f"{self.name}-fixed", count, lambda unit: self._measured(self._lazy.model, unit))
        self._measures = scores.joined(results, count)
        return scores.fixed(self._measures, self.reference.questions)

    def _measured(self, model: Model, unit: int, levels: Sequence[int] = range(len(LEVELS))) -> UnitResult:
        reference = self.reference
        sampler = SamplerConfig(**reference.about["generation"]["sampler"])
        return measured(model, self._head, reference.states(unit), reference.questions, reference.batches[unit],
                        self.seed, sampler, levels)  # fmt: skip

    @cached_property
    def _head(self) -> Head:
        return self.reference.head(torch.device(self.options.device))

    def _free(self) -> Json:
        reference, generation, model = self.reference, self.artifact.generation, self.artifact.config
        texts = sum(1 for row in reference.about["rows"] if reference.questions[row].group == "text")
        ran = free_batches(reference.questions, texts, model.canvas, model.vocab)
        results = self.work.each(
            f"{self.name}-free", len(ran),
            lambda unit: run(self._lazy.model, generation, reference.questions, ran[unit], self.seed, self.blocks),
        )  # fmt: skip
        mine = combined([results(unit) for unit in range(len(ran))])
        tokenizer = (self.source or self.artifact).tokenizer
        rows, limit = reference.about["rows"], generation.sampler.steps
        theirs = (self.source or self.artifact).generation
        self.base = scores.free(
            reference.free, rows, reference.questions, theirs, theirs.sampler.steps, tokenizer, None,
            reference.about["cost"]["step_ms"],
        )  # fmt: skip
        return scores.free(mine, rows, reference.questions, generation, limit, tokenizer, reference.free, self._step_ms)

    def _weights(self) -> list[Json]:
        assert self.source is not None
        names = list(self.artifact.weights)
        stages = losses.stages(names, len(self.artifact.config.layers))
        source, other, device = self.source.weights, self.artifact.weights, self.options.device
        results = self.work.each(
            f"{self.name}-weights", len(stages), lambda unit: losses.weight_errors(source, other, stages[unit], device)
        )
        found = {name: value for unit in range(len(stages)) for name, value in results(unit).items()}
        stored = self.artifact.weights.everything()
        return scores.weights(found, {name: stored[name].scheme for stage in stages for name in stage})

    def _layers(self) -> list[Json]:
        source, several = self.source, self._layered()
        assert source is not None

        def one(unit: int) -> UnitResult:
            chunk = losses.layer_chunk(self.reference.questions, several[unit], self.seed, source.config.vocab)
            activations = self.options.activations if self._scaled else None
            return losses.layer_errors(source, self.artifact, chunk, self.options.device, self.options.precision,
                                       activations)  # fmt: skip

        results = self.work.each(f"{self.name}-layers", len(several), one)
        return scores.layers([results(unit) for unit in range(len(several))])

    def _layered(self) -> list[range]:
        """Questions whose layers are compared, some at a time: evenly from all kinds."""
        count, wanted = len(self.reference.questions), self.options.size.layered
        step = -(-count // wanted)
        return [range(i, min(i + step * LAYERED, count), step) for i in range(0, count, step * LAYERED)]

    def _sensitivity(self) -> list[Json]:
        found, levels = parts(self.artifact), self.options.size.levels
        several = range(min(self.options.size.batches, len(self.reference.batches)))
        put_back = {}
        for number, part in enumerate(found):
            with_part = _With(self._lazy, part, self.source)
            results = self.work.each(
                f"{self.name}-part-{number}", len(several), partial(self._with_part, with_part, levels)
            )
            put_back[part.name] = _kl(scores.joined(results, len(several)))
        count = sum(len(self.reference.batches[unit]) for unit in several)
        base = _kl(self._measures[list(levels)][:, :, :, :count])
        return scores.sensitivity(base, put_back, found)

    def _with_part(self, with_part: _With, levels: Sequence[int], unit: int) -> UnitResult:
        return self._measured(with_part.model, unit, levels)


class _With:
    """The model with one part put back, made when it is first asked for."""

    def __init__(self, lazy: Lazy, part: Part, source: Artifact | None) -> None:
        self._lazy, self._part, self._source = lazy, part, source

    @cached_property
    def model(self) -> Model:
        assert self._source is not None
        return self._lazy.model.replaced(restored(self._part, self._source.weights))


def _files(artifact: Artifact) -> Json:
    """What was judged: SHA-256 of its weight files and its dgq.json, by which `dgq publish` knows it again."""
    files = artifact.weights.files
    return {file.name: describe(file) for file in (*files, files[0].parent / FILE) if file.is_file()}


def _kl(measures: torch.Tensor) -> torch.Tensor:
    """(levels, 2, measures, questions, canvas) -> (questions,) float64."""
    return measures[:, :, MEASURES.index("kl")].double().mean((0, 1, 3))


def _check_same_shape(artifact: Artifact, reference: Reference) -> None:
    """That canvases and logits can be compared at all."""
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
    """As JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value
