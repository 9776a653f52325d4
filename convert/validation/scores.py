"""From the results of units to the numbers of the report.

    measures (levels, 2, measures, questions, canvas)  ->  FixedResult
    canvases, steps of a free run                      ->  FreeResult, or FreeComparison beside the reference's
    errors of tensors, sums over layers                ->  WeightError, LayerError, a row each

Figures are means with the bounds between which 95 % of them lie when the questions are drawn anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgq.convert.layerwise.measure import MEASURES, interval
from dgq.convert.validation.free import agreement, tokens_of
from dgq.convert.validation.losses import PARTS
from dgq.convert.validation.questions import LEVELS, Question
from dgq.convert.validation.reference import KeptReference
from dgq.convert.validation.report.result import (
    ConditionDivergence,
    Divergence,
    FixedResult,
    FreeComparison,
    FreeResult,
    GroupDivergence,
    Interval,
    LayerError,
    LevelDivergence,
    PartRecovery,
    PositionDivergence,
    SideBySide,
    WeightError,
)
from dgq.convert.validation.sensitivity import ModelPart
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.shape.settings import GenerationConfig

SHOWN = 12  # texts side by side
LONGEST = 600  # characters of a prompt that are shown


def fixed(measures: Tensor, questions: Sequence[Question]) -> FixedResult:
    """The result on fixed canvases from measures float32 (levels, 2, measures, questions, canvas) of one artifact; of
    the two conditions the second is self-conditioned."""
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.group, []).append(number)
    kl, top1 = (measures[:, :, MEASURES.index(name)].mean((0, 1, 2)).tolist() for name in ("kl", "top1"))
    return FixedResult(
        mean=_divergence(measures),
        by_level={f"{level}": _at_level(measures[i : i + 1]) for i, level in enumerate(LEVELS)},
        by_condition=ConditionDivergence(_divergence(measures[:, :1]), _divergence(measures[:, 1:])),
        by_group={group: _of_group(measures[:, :, :, rows], len(rows)) for group, rows in groups.items()},
        by_position=PositionDivergence(kl, top1),
    )


def _at_level(measures: Tensor) -> LevelDivergence:
    return LevelDivergence(_divergence(measures), _divergence(measures[:, :1]), _divergence(measures[:, 1:]))


def _of_group(measures: Tensor, count: int) -> GroupDivergence:
    return GroupDivergence(**vars(_divergence(measures)), questions=count)


def _divergence(measures: Tensor) -> Divergence:
    """Every measure over all axes but its own; the bounds come from resampling the questions."""
    each = dict(zip(MEASURES, measures.double().mean((0, 1, 4)), strict=True))  # of (questions,)
    sure_a, sure_b = (measures[:, :, MEASURES.index(name)] for name in ("sure_a", "sure_b"))
    return Divergence(
        kl=_interval(each["kl"]),
        reverse_kl=_interval(each["reverse_kl"]),
        top1=_interval(each["top1"]),
        top5=_interval(each["top5"]),
        entropy=_interval(each["entropy"]),
        accepted=_interval(each["sure_a"]),
        accepted_ratio=_interval(each["sure_b"], each["sure_a"]),
        accepted_same=_interval((sure_a == sure_b).double().mean((0, 1, 3))),
    )


def _interval(a: Tensor, b: Tensor | None = None) -> Interval:
    return Interval(*interval(a, b))


@dataclass(frozen=True)
class FreeRun:
    """A model's free run. canvases int64 (prompts, tokens); steps int64 (prompts, blocks), below 0 where the answer had
    ended; questions: of the prompts, in their order; step_ms: milliseconds of a step of one prompt alone."""

    canvases: Tensor
    steps: Tensor
    seconds: float
    questions: Sequence[Question]
    generation: GenerationConfig
    tokenizer: Tokenizer
    step_ms: float

    @property
    def limit(self) -> int:
        """The most steps that the sampler takes."""
        return self.generation.sampler.steps

    @property
    def written(self) -> list[list[int]]:
        """Each answer's tokens."""
        return tokens_of(self.canvases, self.generation)

    @property
    def texts(self) -> list[str]:
        return [self.tokenizer.decode(tokens) for tokens in self.written]

    @property
    def valid_steps(self) -> Tensor:
        """steps float64, NaN where the answer had ended."""
        return self.steps.double().masked_fill(self.steps < 0, torch.nan)

    def right(self) -> Tensor:
        """1.0 or 0.0 for each question that has an exact answer, float64."""
        asked = [(q, text) for q, text in zip(self.questions, self.texts, strict=True) if q.answer is not None]
        return torch.tensor([float(question.right(text)) for question, text in asked], dtype=torch.float64)


def free(run: FreeRun) -> FreeResult:
    """The numbers of a free run. Tokens a second are what step_ms gives with these steps, where a block's commitment
    counts as one step more: what ran here may have been the reference's operations, in batches."""
    steps, flat = run.valid_steps, run.valid_steps.flatten()
    counted = flat[~flat.isnan()]
    lengths = torch.tensor([float(len(tokens)) for tokens in run.written], dtype=torch.float64)
    groups = [question.group for question in run.questions if question.answer is not None]
    right = run.right()
    return FreeResult(
        canvases=len(counted),
        steps=_interval(steps.nanmean(-1)),
        histogram={str(k): n for k, n in sorted(Counter(int(x) for x in counted.tolist()).items())},
        steps_limit=run.limit,
        early=share(_early(steps, run.limit)),
        tokens_per_step=_interval(lengths, steps.nansum(-1)),
        tokens=int(lengths.sum()),
        seconds=run.seconds,
        tokens_per_second=float(lengths.sum() * 1000 / ((flat.nansum() + (~flat.isnan()).sum()) * run.step_ms)),
        score=share(right) if groups else None,
        by_task=_by_task(groups, right),
    )


def free_comparison(run: FreeRun, base: FreeRun) -> FreeComparison:
    """The numbers of an artifact's free run beside the reference's, of the same prompts and random numbers."""
    steps, theirs = run.valid_steps, base.valid_steps
    canvas = run.canvases.shape[1] // run.steps.shape[1]
    first = [side.canvases[:, :canvas] for side in (run, base)]
    alone = free(run)
    return FreeComparison(
        **vars(alone),
        steps_ratio=_interval(steps.nanmean(-1), theirs.nanmean(-1)),
        early_drop=share(_early(theirs, run.limit) - _early(steps, run.limit), -1.0),
        agreement=share(agreement(first[0], first[1], run.generation.pad_id).double()),
        same_canvases=share((first[0] == first[1]).all(-1).double()),
        score_drop=None if alone.score is None else share(_right_as(run, base) - run.right(), -1.0),
    )


def _right_as(run: FreeRun, base: FreeRun) -> Tensor:
    """The reference's right answers, its texts read with the artifact's end-of-sequence tokens."""
    texts = [run.tokenizer.decode(tokens) for tokens in tokens_of(base.canvases, run.generation)]
    asked = [(q, text) for q, text in zip(run.questions, texts, strict=True) if q.answer is not None]
    return torch.tensor([float(question.right(text)) for question, text in asked], dtype=torch.float64)


def share(each: Tensor, least: float = 0.0) -> Interval:
    """The interval of what lies between `least` and 1, mostly at an end. Where all questions agree, resampling knows no
    doubt; the bounds are then those that so many equal answers leave."""
    middle, low, high = interval(each)
    if low == high:
        doubt = 1 - 0.025 ** (1 / len(each))
        low, high = max(low - doubt, least), min(high + doubt, 1.0)
    return Interval(middle, low, high)


def _early(steps: Tensor, limit: int) -> Tensor:
    """The share (questions,) of canvases that stopped before the last step."""
    return ((steps < limit) & ~steps.isnan()).double().sum(-1) / (~steps.isnan()).double().sum(-1)


def _by_task(groups: Sequence[str], right: Tensor) -> dict[str, tuple[int, int]]:
    """Task -> right answers, questions."""
    asked, good = Counter(groups), Counter(g for g, r in zip(groups, right.tolist(), strict=True) if r)
    return {group: (good[group], asked[group]) for group in sorted(asked)}


def side_by_side(
    reference: KeptReference, tokenizer: Tokenizer, base: Sequence[str], others: Mapping[str, Sequence[str]]
) -> tuple[SideBySide, ...]:
    """What the reference (base) and each artifact wrote to some prompts, half of them texts. Those that differ come
    first."""
    rows = reference.about["rows"]
    order = sorted(range(len(rows)), key=lambda i: all(texts[i] == base[i] for texts in others.values()))
    continued = [i for i in order if reference.questions[rows[i]].group == "text"][: SHOWN // 2]
    answered = [i for i in order if reference.questions[rows[i]].group != "text"][: SHOWN - len(continued)]
    shown = []
    for i in (*answered, *continued):
        question = reference.questions[rows[i]]
        prompt = tokenizer.decode(list(question.prompt))
        prompt = prompt if len(prompt) <= LONGEST else "…" + prompt[-LONGEST:]
        written = {name: texts[i] for name, texts in others.items()}
        shown.append(SideBySide(question.group, prompt, question.answer, base[i], written))
    return tuple(shown)


def weights(errors: Mapping[str, Tensor], schemes: Mapping[str, str]) -> tuple[WeightError, ...]:
    """A row for each tensor. errors: of losses.weight_errors(); schemes: tensor -> scheme, in the order of the rows."""
    rows = []
    for name, scheme in schemes.items():
        error, worst, expert, middle = errors[name].tolist()
        low, high = errors[name + ".gain"].tolist()
        worst_expert = int(expert) if ".experts." in name else None
        rows.append(WeightError(name, scheme, error, worst_expert, worst, middle, low, high))
    return tuple(rows)


def layers(results: Sequence[Mapping[str, Tensor]]) -> tuple[LayerError, ...]:
    """A row for each layer. results: of losses.layer_errors() for every chunk."""
    total = {name: torch.stack([result[name] for result in results]).sum(0) for name in results[0]}
    error = (total["wrong"] / total["whole"].clamp(min=1e-30)).sqrt()
    overlap = total["overlap"][:, :2] / total["overlap"][:, 2:]
    chosen = total["chosen"].long()
    rows = []
    for i in range(len(error)):
        parts = dict(zip(PARTS, error[i].tolist(), strict=True))
        rows.append(LayerError(
            attention=parts["attention"], dense_mlp=parts["dense MLP"], experts=parts["experts"],
            output=parts["output"], accumulated=parts["accumulated"], layer=i, router_overlap=float(overlap[i, 0]),
            router_overlap_own=float(overlap[i, 1]), tokens=chosen[0, i].tolist(),
            tokens_artifact=chosen[1, i].tolist(),
        ))  # fmt: skip
    return tuple(rows)


def sensitivity(base: Tensor, restored: Mapping[str, Tensor], parts: Sequence[ModelPart]) -> tuple[PartRecovery, ...]:
    """A row for each part, those that recover most a megabyte first. base: KL float64 (questions,) of the artifact;
    restored: part -> the same with that part in BF16."""
    rows = []
    for part in parts:
        recovered = _interval(base - restored[part.name])
        megabytes = part.extra / 1e6
        of_all = recovered.figure / max(float(base.mean()), 1e-30)
        rows.append(PartRecovery(part.name, recovered, of_all, megabytes, recovered.figure / megabytes))
    return tuple(sorted(rows, key=lambda row: -row.per_megabyte))


def joined(results: Callable[[int], Mapping[str, Tensor]], count: int) -> Tensor:
    """The batches' measures as one tensor (levels, 2, measures, questions, canvas)."""
    return torch.cat([results(number)["measures"] for number in range(count)], dim=3)
