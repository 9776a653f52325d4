"""What `dgq eval` found: the scores of lm-evaluation-harness's tasks, a row a task and model, as frozen dataclasses.

    EvaluationResult ── models: ModelEvaluation ── tasks: TaskEvaluation ── scores: Score

It stands in a file of its own, and in report.json below "evaluation" once it was joined to a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from pydantic import TypeAdapter

Json = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One metric of a task. filter: what the harness did to the answers before, "none" if nothing; value: the metric's
    aggregate; stderr: its standard error, None where the harness has none; samples: how many answers it is made of."""

    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True)
class TaskEvaluation:
    """A model on one task.

    version: the task's own; samples: prompts that were answered; blocks: canvases that were committed; steps: denoising
    steps of a canvas, their mean; unsettled: canvases that took all steps allowed, so that they may have changed still;
    tokens: of the answers; seconds: that the answers took.
    """

    task: str
    version: str
    samples: int
    blocks: int
    steps: float
    unsettled: int
    tokens: int
    seconds: float
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on all tasks. files: name -> bytes and SHA-256 of its weight files, by which a report knows an artifact
    again; reference: whether it is what the others are held against."""

    name: str
    path: str
    files: Mapping[str, Any]
    reference: bool
    tasks: tuple[TaskEvaluation, ...]


class ScoreRow(NamedTuple):
    """One score where it belongs."""

    model: ModelEvaluation
    task: TaskEvaluation
    score: Score


@dataclass(frozen=True)
class EvaluationResult:
    """The whole of `dgq eval`. harness: version of lm_eval; limit: prompts of a task at most, None for all; shots:
    worked examples before a prompt, None for the task's own number; steps_limit: of a canvas, None for the model's."""

    dgq: str
    harness: str
    device: str
    dtype: str
    seed: int
    limit: int | None
    shots: int | None
    steps_limit: int | None
    models: tuple[ModelEvaluation, ...]

    def rows(self) -> list[ScoreRow]:
        """Every score with its task and model; a task's metrics together, the models of each beside one another."""
        rows = [ScoreRow(model, task, score) for model in self.models for task in model.tasks for score in task.scores]
        order = list(dict.fromkeys((row.task.task, row.score.metric, row.score.filter) for row in rows))
        return sorted(rows, key=lambda row: order.index((row.task.task, row.score.metric, row.score.filter)))

    def to_json(self) -> Json:
        """What the file of an evaluation holds."""
        data: Json = _adapter().dump_python(self, mode="json")
        return data

    @classmethod
    def from_json(cls, data: Json) -> EvaluationResult:
        """Read to_json()'s mapping. ValueError (pydantic's ValidationError) names the key that is missing or wrong."""
        return _adapter().validate_python(data)


@cache
def _adapter() -> TypeAdapter[EvaluationResult]:
    return TypeAdapter(EvaluationResult)
