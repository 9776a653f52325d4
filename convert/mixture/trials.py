"""What it costs to quantise some weights: KL(BF16 || the model with these alone quantised), on calibration's canvases.

    layer 0      layer 1      layer 2
    ┌──────┐     ┌──────┐     ┌──────┐
    │ BF16 │ ──> │ BF16 │ ──> │ BF16 │ ──> logits ──────────┐
    └──────┘ ╲   └──────┘ ╲   └──────┘                      KL, a trial
      trial    ╲─> BF16 ───╲─> BF16 ────> logits ───────────┤
      trial          trial   ╲─> BF16 ──> logits ───────────┘

Up to BATCH trials that begin with the same layer go through the model together: a layer is read once for all of them,
and a trial costs nothing before the first layer that it changes. One layer's weights are in memory, and one trial's of
that layer; hidden states lie in files: BF16's before every layer, and those of the trials that are under way.
Everything is computed in float32: bfloat16's rounding would drown what 8 bits lose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dgq.convert.layerwise.budget import SLICES, UNSAID, Budget
from dgq.convert.layerwise.chunk import Chunk, States
from dgq.convert.layerwise.estimate import Moments, Needs, Sizes
from dgq.convert.layerwise.measure import divergence
from dgq.convert.layerwise.passes import Rows, SamplePasses
from dgq.convert.layerwise.samples import BINS, conditioned, doubled
from dgq.convert.layerwise.stream import LayerOf, Stream
from dgq.convert.plans.plan import Plan
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.write.pipeline import GPU_THREADS
from dgq.convert.write.ram import slices_ram
from dgq.convert.write.settings import ConversionSettings
from dgq.convert.write.slices import SLICE, ordered, slices
from dgq.quant.errors import InputError
from dgq.quant.files.places import free_bytes
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed, Scheme
from dgq.runtime.shape.names import EMBEDDING, layer_of

BATCH = 18  # trials that go through the model together: of a group of layers, nine matrices in two schemes
POSITIONS = 64  # whose logits are compared at once

Trial = Mapping[str, Scheme]  # canonical name -> what it is quantised by; the rest stays as it is


class TrialNeeds(Needs):
    """Bytes while measuring: activations in float32, and a trial's weights, decoded, beside those of the layer or the
    table. plan: any plan of the source, by which slices are counted."""

    def __init__(self, plan: Plan, device: str, sizes: Sizes) -> None:
        super().__init__(plan.source, device, sizes, width=4)
        text = plan.source.text
        layers: dict[int | None, int] = {}
        for name, spec in text.items():
            if len(spec.shape) > 1 and ".router." not in name:
                layers[layer_of(name)] = layers.get(layer_of(name), 0) + 4 * spec.numel
        self._table = layers.pop(None)
        self._changed = max(layers.values())
        self.slices = slices_ram(plan)[1] if device == "cpu" else SLICES * GPU_THREADS

    def moments(self) -> Moments:
        moments = super().moments()
        layer = {part: moments["layer"][part] for part in ("libraries", "weights")} | {"a trial's": self._changed}
        return {
            "head": moments["head"] | {"a trial's": self._table},
            "layer": moments["layer"] | layer,
            "quantising": layer | {"slices of a thread": self.slices},
        }

    def ram(self) -> dict[str, int]:
        return super().ram() | {"slices": 4 * GPU_THREADS * SLICE["cuda"]}


class Meter:
    """Measures trials of a model over `chunks`. The losses depend on neither the budget of memory nor the threads."""

    def __init__(
        self, plan: Plan, chunks: Sequence[Chunk], folder: Path, device: str, threads: int, budget: Budget = UNSAID
    ) -> None:
        """plan: any plan of the model. folder: where hidden states lie meanwhile. InputError if the memory is too
        small."""
        budget.enforce()
        needs = TrialNeeds(plan, device, Sizes.of(chunks))
        budget.room(needs, device, "measuring")
        if device == "cpu":
            others = sum(needs.moments()["quantising"].values()) - needs.slices
            threads = budget.threads(threads, others, needs.slices, device)
        else:
            threads = min(threads, GPU_THREADS)
        self._source, self._recipe, self._folder = plan.source, plan.recipe, folder
        self._options = ConversionSettings("fast", threads=threads, device=device)
        self._stream = Stream(plan.source.config, Rows(plan.source), device, torch.float32)
        self._chunks = chunks
        self._both = [doubled(chunk) for chunk in chunks]
        self._sizes = [chunk.tokens for chunk in self._both]
        self._layers = len(plan.source.config.layers)
        self._files = ExitStack()

    @property
    def tokens(self) -> int:
        """Tokens of a pass."""
        return sum(self._sizes)

    def __enter__(self) -> Meter:
        """InputError if the disk does not hold the hidden states."""
        self._check_disk()
        self._pool = self._files.enter_context(ThreadPoolExecutor(self._options.threads))
        files = [
            self._files.enter_context(tempfile.TemporaryFile(dir=self._folder, buffering=0))  # noqa: SIM115
            for _ in range(self._layers + 3)
        ]
        self._passes = SamplePasses(self._stream, self._chunks, range(len(self._chunks)), files[0], files[2:])
        self._states = States(files[1], self._sizes * BATCH, self._stream.config.hidden, torch.float32)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def steps(self, trials: Sequence[Trial]) -> int:
        """How often kl() calls its step for these trials: passes of all chunks through a layer."""
        return sum(self._layers - max(0, _first(trial)) for trial in trials)

    def prepare(self, step: Callable[[], None]) -> None:
        """Run BF16's two passes, on whose logits canvases are conditioned; before kl(). It takes two steps a layer."""
        self._passes.first(step)
        self._passes.enter(None)
        for index in range(self._layers):
            self._passes.layer(index, None)
            step()
        self._stream.forget()

    def kl(self, trials: Sequence[Trial], step: Callable[[], None]) -> list[float]:
        """The loss of each trial, KL in nats a position. At most BATCH trials."""
        begun = [self._enter(trial, slot) for slot, trial in enumerate(trials)]
        for index in range(max(0, min(map(_first, trials))), self._layers):
            layer = self._stream.layer(index)
            for slot, trial in enumerate(trials):
                mine = {name: scheme for name, scheme in trial.items() if layer_of(name) == index}
                if mine or begun[slot]:
                    self._through(layer, mine, slot, index, begun[slot])
                    begun[slot] = True
                    step()
            del layer
        return [self._lost(trial, slot) for slot, trial in enumerate(trials)]

    def _through(self, layer: LayerOf, changes: Trial, slot: int, index: int, begun: bool) -> None:
        """Bring all chunks of a trial through a layer. They are BF16's before it, if nothing was changed yet."""
        changed = self._stream.changed(layer, self._quantised(changes)) if changes else layer
        for number, chunk in enumerate(self._both):
            x = self._states.read(self._at(slot, number)) if begun else self._passes.before(index, number)
            self._states.write(self._at(slot, number), changed(chunk, x))

    def _at(self, slot: int, number: int) -> int:
        return slot * len(self._both) + number

    def _enter(self, trial: Trial, slot: int) -> bool:
        """Embed the chunks; whether the trial's states differ from BF16's before the first layer."""
        if _first(trial) >= 0:
            return False
        stream = self._streamed(trial)
        for number, chunk in enumerate(self._chunks):
            table = EMBEDDING in trial
            soft = conditioned(chunk, self._conditions(number, stream)) if table else self._passes.soft(number)
            self._states.write(self._at(slot, number), stream.enter(self._both[number], soft))
        self._stream.forget()
        return True

    def _lost(self, trial: Trial, slot: int) -> float:
        total, positions = 0.0, 0
        stream = self._streamed(trial) if EMBEDDING in trial else self._stream
        for number, chunk in enumerate(self._both):
            states = self._passes.before(self._layers, number), self._states.read(self._at(slot, number))
            ours, theirs = (x.to(stream.device) for x in states)
            pieces = zip(self._stream.leave(chunk, ours), stream.leave(chunk, theirs), strict=True)
            for (_, wanted), (_, other) in pieces:
                total += _apart(wanted, other)
                positions += wanted[..., 0].numel()
        if not total < float("inf"):
            raise InputError(f"{self._source.path}: its logits are no numbers; the checkpoint is damaged")
        return max(0.0, total / positions)

    def _streamed(self, trial: Trial) -> Stream:
        """The stream, or one with what the trial changes outside of the layers."""
        outside = {name: scheme for name, scheme in trial.items() if layer_of(name) is None}
        if not outside:
            return self._stream
        self._stream.forget()
        weights = Rows(self._source, self._quantised(outside))
        return Stream(self._stream.config, weights, self._stream.device, torch.float32)

    def _conditions(self, number: int, stream: Stream) -> Tensor:
        """What canvases are conditioned on: BF16's own logits through the stream's table, (n, canvas, hidden)."""
        both, x = self._both[number], self._passes.before(self._layers, number).to(stream.device)
        plain = both.kind <= BINS
        pieces = [stream.soften(logits[plain[rows]]).cpu() for rows, logits in self._stream.leave(both, x)]
        return torch.cat(pieces)

    def _quantised(self, trial: Trial) -> dict[str, Packed]:
        """The trial's weights, quantised as `dgq convert` of effort fast does it, and decoded."""
        weights = {}
        for name, scheme in trial.items():
            shape = self._source.text[name].shape
            plan = Plan(self._source, self._recipe, ())
            jobs = slices(plan, PlannedTensor(name, name, shape, scheme), self._options, None)
            decoded = torch.empty(shape, device=self._stream.device)
            for job, piece in ordered(self._pool, jobs, 2 * self._options.threads):
                decoded[job.part] = piece.to(decoded.device).dequantize(torch.float32)
            weights[name] = Packed(SCHEMES["f32"], shape, {"": decoded})
        return weights

    def _check_disk(self) -> None:
        needed = 4 * self._stream.config.hidden * self.tokens * (self._layers + 2 + BATCH)
        free = free_bytes(self._folder)
        if needed > free:
            raise InputError(
                f"{self._folder}: needs {needed / 2**30:.1f} GiB of disk while it measures, for hidden states;"
                f" {free / 2**30:.1f} GiB are free. Fewer --chunks take less"
            )


def batches(trials: Sequence[Trial]) -> list[list[int]]:
    """The trials' numbers in the batches in which kl() takes them: those that begin with the same layer together."""
    firsts: dict[int, list[int]] = {}
    for number, trial in enumerate(trials):
        firsts.setdefault(_first(trial), []).append(number)
    return [same[i : i + BATCH] for _, same in sorted(firsts.items()) for i in range(0, len(same), BATCH)]


def _apart(wanted: Tensor, other: Tensor) -> float:
    """The sum over positions of KL(wanted || other) in nats, of logits (…, vocab)."""
    sides = (logits.flatten(0, -2).split(POSITIONS) for logits in (wanted, other))
    return sum(
        float(divergence(p.log_softmax(-1), q.log_softmax(-1)).double().sum()) for p, q in zip(*sides, strict=True)
    )


def _first(trial: Trial) -> int:
    """The first layer that it changes; -1: something before the layers."""
    return min(-1 if (layer := layer_of(name)) is None else layer for name in trial)
