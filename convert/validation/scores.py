"""From units' results to the numbers of the report: means with the bounds between which 95 % of them lie when the
questions are drawn anew. A triple is always [figure, lower bound, upper bound]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgq.convert.layerwise.measure import MEASURES, interval
from dgq.convert.validation.free import agreement, tokens_of
from dgq.convert.validation.losses import PARTS
from dgq.convert.validation.questions import LEVELS, Question
from dgq.convert.validation.reference import Reference
from dgq.convert.validation.sensitivity import Part
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.shape.settings import GenerationConfig

Json = dict[str, Any]
CONDITIONS = ("plain", "conditioned")
SHOWN = 12  # texts side by side
LONGEST = 600  # characters of a prompt shown


def fixed(measures: Tensor, questions: Sequence[Question]) -> Json:
    """measures (levels, 2, measures, questions, canvas) of one artifact."""
    everything = _row(measures)
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.group, []).append(number)
    return {
        "mean": everything,
        "by_level": {
            f"{level}": {"both": _row(measures[i : i + 1])}
            | {name: _row(measures[i : i + 1, c : c + 1]) for c, name in enumerate(CONDITIONS)}
            for i, level in enumerate(LEVELS)
        },
        "by_condition": {name: _row(measures[:, c : c + 1]) for c, name in enumerate(CONDITIONS)},
        "by_group": {group: _row(measures[:, :, :, rows]) | {"questions": len(rows)} for group, rows in groups.items()},
        "by_position": {name: measures[:, :, MEASURES.index(name)].mean((0, 1, 2)).tolist() for name in ("kl", "top1")},
    }


def _row(measures: Tensor) -> Json:
    """Every measure as a triple, over all but the measures' axis; questions are resampled."""
    each = measures.double().mean((0, 1, 4))  # (measures, questions)
    of = dict(zip(MEASURES, each, strict=True))
    found = {name: interval(of[name]) for name in ("kl", "reverse_kl", "top1", "top5", "entropy")}
    sure_a, sure_b = (measures[:, :, MEASURES.index(name)] for name in ("sure_a", "sure_b"))
    found["accepted"] = interval(of["sure_a"])
    found["accepted_ratio"] = interval(of["sure_b"], of["sure_a"])
    found["accepted_same"] = interval((sure_a == sure_b).double().mean((0, 1, 3)))
    return found


def free(
    ran: dict[str, Tensor], rows: Sequence[int], questions: Sequence[Question], generation: GenerationConfig,
    limit: int, tokenizer: Tokenizer, beside: dict[str, Tensor] | None, step_ms: float,
) -> Json:  # fmt: skip
    """ran: a model's canvases and steps, one row a question of `rows`; limit: its steps at most; beside: the
    reference's, None for itself; step_ms: of one prompt alone, whose tokens a second these steps give, where a block's
    commitment counts as one more (what ran here may have been the reference's operations, in batches)."""
    steps = ran["steps"].double().masked_fill(ran["steps"] < 0, torch.nan)
    said = tokens_of(ran["canvases"], generation)
    lengths = torch.tensor([float(len(tokens)) for tokens in said], dtype=torch.float64)
    texts = [tokenizer.decode(tokens) for tokens in said]
    flat = steps.flatten()
    found: Json = {
        "canvases": int((~flat.isnan()).sum()),
        "steps": interval(steps.nanmean(-1)),
        "histogram": {str(k): n for k, n in sorted(Counter(int(x) for x in flat[~flat.isnan()].tolist()).items())},
        "steps_limit": limit,
        "early": share(_early(steps, limit)),
        "tokens_per_step": interval(lengths, steps.nansum(-1)),
        "tokens": int(lengths.sum()),
        "seconds": float(ran["seconds"].sum()),
        "tokens_per_second": float(lengths.sum() * 1000 / ((flat.nansum() + (~flat.isnan()).sum()) * step_ms)),
        "texts": texts,
    }
    asked = [i for i, row in enumerate(rows) if questions[row].answer is not None]
    right = torch.tensor([float(questions[rows[i]].right(texts[i])) for i in asked], dtype=torch.float64)
    found["score"] = share(right) if asked else None
    found["by_task"] = _by_task([questions[rows[i]].group for i in asked], right)
    if beside is not None:
        found |= _beside(ran, beside, steps, generation, limit)
        if asked:
            theirs = tokens_of(beside["canvases"], generation)
            base = [float(questions[rows[i]].right(tokenizer.decode(theirs[i]))) for i in asked]
            found["score_drop"] = share(torch.tensor(base, dtype=torch.float64) - right, -1.0)
    return found


def _beside(
    ran: dict[str, Tensor], beside: dict[str, Tensor], steps: Tensor, generation: GenerationConfig, limit: int
) -> Json:
    base = beside["steps"].double().masked_fill(beside["steps"] < 0, torch.nan)
    canvas = ran["canvases"].shape[1] // ran["steps"].shape[1]
    first = [side["canvases"][:, :canvas] for side in (ran, beside)]
    return {
        "steps_ratio": interval(steps.nanmean(-1), base.nanmean(-1)),
        "early_drop": share(_early(base, limit) - _early(steps, limit), -1.0),
        "agreement": share(agreement(first[0], first[1], generation.pad_id).double()),
        "same_canvases": share((first[0] == first[1]).all(-1).double()),
    }


def share(each: Tensor, least: float = 0.0) -> list[float]:
    """interval() of what lies between `least` and 1, mostly at an end. Where all questions agree, resampling knows no
    doubt; the bounds are then those that so many equal answers leave."""
    middle, low, high = interval(each)
    if low == high:
        doubt = 1 - 0.025 ** (1 / len(each))
        low, high = max(low - doubt, least), min(high + doubt, 1.0)
    return [middle, low, high]


def _early(steps: Tensor, limit: int) -> Tensor:
    """Share (questions,) of canvases that stopped before the last step."""
    return ((steps < limit) & ~steps.isnan()).double().sum(-1) / (~steps.isnan()).double().sum(-1)


def _by_task(groups: Sequence[str], right: Tensor) -> dict[str, list[int]]:
    """Task -> right answers, questions."""
    asked, good = Counter(groups), Counter(g for g, r in zip(groups, right.tolist(), strict=True) if r)
    return {group: [good[group], asked[group]] for group in sorted(asked)}


def side_by_side(
    reference: Reference, tokenizer: Tokenizer, theirs: Json, found: dict[str, Json]
) -> list[dict[str, Any]]:
    """What was written to some prompts, half of them texts, by the reference and each artifact: those that differ come
    first."""
    rows = reference.about["rows"]
    order = sorted(range(len(rows)), key=lambda i: all(f["texts"][i] == theirs["texts"][i] for f in found.values()))
    texts = [i for i in order if reference.questions[rows[i]].group == "text"][: SHOWN // 2]
    others = [i for i in order if reference.questions[rows[i]].group != "text"][: SHOWN - len(texts)]
    shown = []
    for i in (*others, *texts):
        question = reference.questions[rows[i]]
        prompt = tokenizer.decode(list(question.prompt))
        shown.append({
            "group": question.group, "prompt": prompt if len(prompt) <= LONGEST else "…" + prompt[-LONGEST:],
            "answer": question.answer, "reference": theirs["texts"][i],
            "written": {name: one["texts"][i] for name, one in found.items()},
        })  # fmt: skip
    return shown


def weights(found: dict[str, Tensor], schemes: dict[str, str]) -> list[Json]:
    """One row a tensor, from losses.weight_errors()."""
    rows = []
    for name, scheme in schemes.items():
        error, worst, expert, middle = found[name].tolist()
        low, high = found[name + ".gain"].tolist()
        routed = ".experts." in name
        rows.append({
            "tensor": name, "scheme": scheme, "error": error, "worst_expert": int(expert) if routed else None,
            "worst_error": worst, "median_error": middle, "gain_low": low, "gain_high": high,
        })  # fmt: skip
    return rows


def layers(results: Sequence[dict[str, Tensor]]) -> list[Json]:
    """One row a layer, from losses.layer_errors() of every chunk."""
    total = {name: torch.stack([result[name] for result in results]).sum(0) for name in results[0]}
    error = (total["wrong"] / total["whole"].clamp(min=1e-30)).sqrt()
    overlap = total["overlap"][:, :2] / total["overlap"][:, 2:]
    return [
        dict(zip(PARTS, error[i].tolist(), strict=True)) | {
            "layer": i, "router_overlap": float(overlap[i, 0]), "router_overlap_own": float(overlap[i, 1]),
            "tokens": total["chosen"][0, i].long().tolist(), "tokens_artifact": total["chosen"][1, i].long().tolist(),
        }
        for i in range(len(error))
    ]  # fmt: skip


def sensitivity(base: Tensor, restored: dict[str, Tensor], parts: Sequence[Part]) -> list[Json]:
    """base, restored[part]: KL (questions,) of the artifact, and with that part in BF16."""
    rows = []
    for part in parts:
        recovered = interval(base - restored[part.name])
        megabytes = part.extra / 1e6
        rows.append({
            "part": part.name, "recovered": recovered, "share": recovered[0] / max(float(base.mean()), 1e-30),
            "megabytes": megabytes, "per_megabyte": recovered[0] / megabytes,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["per_megabyte"])


def joined(results: Callable[[int], dict[str, Tensor]], count: int) -> Tensor:
    """The batches' measures as one: (levels, 2, measures, questions, canvas)."""
    return torch.cat([results(number)["measures"] for number in range(count)], dim=3)
