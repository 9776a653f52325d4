"""What `dgq validate` found, as frozen dataclasses. report.json, the CSV files, the page and a card are renderings of
it.

    ValidationResult ── reference: ReferenceResult ── cost, free (its own run)
                     └─ artifacts: ArtifactResult  ── cost
                                                   ├─ fixed        KL and agreement on fixed canvases
                                                   ├─ free         what it wrote, beside the reference's run
                                                   ├─ weights, layers, sensitivity    where the loss comes from
                                                   └─ gate         each limit, and whether it is kept

The order of the fields is the order of the keys of report.json. A field of type Absent has no key while it is None; any
other None is JSON's null. These stay mappings, because their keys are data: schemes (tensor -> scheme), files (name ->
bytes, sha256), config and generation (the model's own settings), calibration (as dgq.json holds it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter

from dgq.convert.validation.report.evaluation import EvaluationResult

T = TypeVar("T")
Absent = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
Json = dict[str, Any]


class Interval(NamedTuple):
    """A figure, and the bounds between which 95 % of it lie when the questions are drawn anew. In JSON a list of
    three."""

    figure: float
    low: float
    high: float


@dataclass(frozen=True)
class Divergence:
    """How far an artifact's predictions lie from the reference's, as means over positions.

    kl, reverse_kl: nats; top1, top5: shares of equal best tokens; entropy: the artifact's less the reference's, nats;
    accepted: share of positions that the reference's sampler accepts; accepted_ratio: the artifact's number of accepted
    positions over the reference's; accepted_same: share of positions on which both decide alike.
    """

    kl: Interval
    reverse_kl: Interval
    top1: Interval
    top5: Interval
    entropy: Interval
    accepted: Interval
    accepted_ratio: Interval
    accepted_same: Interval


@dataclass(frozen=True)
class GroupDivergence(Divergence):
    """The same for the questions of one group; questions: how many they are."""

    questions: int


@dataclass(frozen=True)
class ConditionDivergence:
    """The same without (plain) and with (conditioned) self-conditioning on the reference's logits."""

    plain: Divergence
    conditioned: Divergence


@dataclass(frozen=True)
class LevelDivergence:
    """The same at one noise level, for both conditions together and for each."""

    both: Divergence
    plain: Divergence
    conditioned: Divergence


@dataclass(frozen=True)
class PositionDivergence:
    """Means at each position of the canvas: KL in nats, and the share of equal best tokens."""

    kl: Sequence[float]
    top1: Sequence[float]


@dataclass(frozen=True)
class FixedResult:
    """An artifact on fixed canvases. by_level: noise level as text ("0.25") -> divergence."""

    mean: Divergence
    by_level: Mapping[str, LevelDivergence]
    by_condition: ConditionDivergence
    by_group: Mapping[str, GroupDivergence]
    by_position: PositionDivergence


@dataclass(frozen=True)
class FreeResult:
    """A model that wrote freely.

    canvases: how many it committed; steps: of a canvas; histogram: steps as text -> canvases; steps_limit: the
    sampler's most steps; early: share of canvases done before that; tokens_per_step; tokens: written in all; seconds:
    of all batches; tokens_per_second: of one prompt alone; score: share of exact answers, None where no question has
    one; by_task: task -> (right answers, questions).
    """

    canvases: int
    steps: Interval
    histogram: Mapping[str, int]
    steps_limit: int
    early: Interval
    tokens_per_step: Interval
    tokens: int
    seconds: float
    tokens_per_second: float
    score: Interval | None
    by_task: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class FreeComparison(FreeResult):
    """An artifact's free run beside the reference's on the same prompts and random numbers.

    steps_ratio: its steps over the reference's; early_drop, score_drop: how much smaller its shares are; agreement:
    share of equal tokens; same_canvases: share of canvases that are equal as a whole.
    """

    steps_ratio: Interval
    early_drop: Interval
    agreement: Interval
    same_canvases: Interval
    score_drop: Absent[Interval] = None


@dataclass(frozen=True)
class Cost:
    """What a model costs to run: seconds to load it, milliseconds of a step of one prompt, bytes of its weights in
    memory and of memory at the peak."""

    load_s: float
    step_ms: float
    weight_bytes: float
    peak_bytes: float


@dataclass(frozen=True)
class WeightError:
    """A tensor beside the reference's: relative errors (Frobenius norm of the difference over that of the tensor), and
    the least and largest gain of a block. worst_expert: None of a tensor that is not of the routed experts."""

    tensor: str
    scheme: str
    error: float
    worst_expert: int | None
    worst_error: float
    median_error: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class LayerError:
    """A layer's parts on the reference's activations: relative errors of their outputs. accumulated: of the output when
    the artifact's layers follow each other; router_overlap, router_overlap_own: share of chosen experts that the
    reference chose too, on its activations and on the artifact's own; tokens: that each expert saw."""

    attention: float
    dense_mlp: Annotated[float, Field(alias="dense MLP")]
    experts: float
    output: float
    accumulated: float
    layer: int
    router_overlap: float
    router_overlap_own: float
    tokens: Sequence[int]
    tokens_artifact: Sequence[int]

    def of(self, part: str) -> float:
        """The error of a part by its name in words, as in JSON: "attention", "dense MLP", "experts", "output"."""
        return float(getattr(self, part.lower().replace(" ", "_")))


@dataclass(frozen=True)
class PartRecovery:
    """One part put back in BF16. recovered: KL, nats; share: of the artifact's KL; megabytes: that this adds."""

    part: str
    recovered: Interval
    share: float
    megabytes: float
    per_megabyte: float


@dataclass(frozen=True)
class LimitCheck:
    """A limit of the gate; ok: None where this run has nothing to hold it against; observed: what there was, in words
    (report.json's "said")."""

    limit: str
    ok: bool | None
    observed: Annotated[str, Field(alias="said")]


@dataclass(frozen=True)
class ArtifactResult:
    """One artifact. bytes, params: of all its weights; quantized_share: of its parameters in fewer than 16 bits,
    experts_share: of the routed experts'; weights, layers, sensitivity: only where the source's weights are at hand."""

    name: str
    kind: str
    path: str
    files: Json
    bytes: int
    params: int
    quantized_share: float
    experts_share: float
    schemes: Mapping[str, str]
    calibration: Json | None
    config: Json
    generation: Json
    activations: str | None
    device: str
    cost: Cost
    fixed: FixedResult
    free: FreeComparison
    weights: Absent[tuple[WeightError, ...]] = None
    layers: Absent[tuple[LayerError, ...]] = None
    sensitivity: Absent[tuple[PartRecovery, ...]] = None
    gate: tuple[LimitCheck, ...] = ()
    ok: bool = True
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReferenceResult:
    """The model that artifacts are held against. weights_compared: whether its weights were at hand; free: its own run,
    absent where no artifact was judged."""

    name: str
    bytes: int
    cost: Cost
    dtype: str
    device: str
    weights_compared: bool
    free: Absent[FreeResult] = None


@dataclass(frozen=True)
class PromptSet:
    """Where the questions came from: files, SHA-256 of their bytes, how many questions, and how many ran freely."""

    names: tuple[str, ...]
    sha256: str
    questions: int
    run_freely: int


@dataclass(frozen=True)
class SideBySide:
    """What the reference and each artifact (name -> text) wrote to one prompt."""

    group: str
    prompt: str
    answer: str | None
    reference: str
    written: Mapping[str, str]


@dataclass(frozen=True)
class ValidationResult:
    """The whole of `dgq validate`. levels: shares of a canvas that are noise; ok: every artifact keeps its gate;
    evaluation: scores that `dgq eval` added."""

    dgq: str
    device: str
    dtype: str
    quick: bool
    seed: int
    activations: str | None
    levels: tuple[float, ...]
    questions: PromptSet
    reference: ReferenceResult
    ok: bool
    artifacts: tuple[ArtifactResult, ...]
    texts: Absent[tuple[SideBySide, ...]] = None
    evaluation: Absent[EvaluationResult] = None

    def to_json(self) -> Json:
        """What report.json holds."""
        return as_json(self)

    @classmethod
    def from_json(cls, data: Json) -> ValidationResult:
        """Read to_json()'s mapping. ValueError (pydantic's ValidationError) names the key that is missing or wrong."""
        kind: Any = cls
        result: ValidationResult = _adapter(kind).validate_python(data)
        return result


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def as_json(part: Any) -> Json:
    """A dataclass of this module as report.json has it; numbers are neither converted nor rounded."""
    kind: Any = type(part)
    data: Json = _adapter(kind).dump_python(part, by_alias=True)
    return data
