"""What it costs to quantise some weights: KL(BF16 || the model with these alone quantised), on calibration's canvases.

    layer 0      layer 1      layer 2
    ┌──────┐     ┌──────┐     ┌──────┐
    │ BF16 │ ──> │ BF16 │ ──> │ BF16 │ ──> logits ──────────┐
    └──────┘ ╲   └──────┘ ╲   └──────┘                      KL, a trial
      trial    ╲─> BF16 ───╲─> BF16 ────> logits ───────────┤
      trial          trial   ╲─> BF16 ──> logits ───────────┘

All trials go through the model together: a layer is read once, and a trial costs nothing before the first layer that it
changes. One layer's weights are in memory, and one trial's of that layer; the hidden states of all trials lie in a
file. Everything is computed in float32: bfloat16's rounding would drown what 8 bits lose.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dgq.convert.passes import Rows
from dgq.convert.pipeline import GPU_THREADS
from dgq.convert.plan import Plan, PlannedTensor
from dgq.convert.samples import doubled
from dgq.convert.slices import Options, ordered, slices
from dgq.quant.errors import InputError
from dgq.quant.recipe import layer_of
from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed, Scheme
from dgq.runtime.chunk import Chunk, States
from dgq.runtime.names import EMBEDDING
from dgq.runtime.stream import LayerOf, Stream

Trial = Mapping[str, Scheme]  # canonical name -> what it is quantised by; the rest stays as it is


class _Over(Mapping[str, Packed]):
    """Weights, some of which are others."""

    def __init__(self, weights: Mapping[str, Packed], others: Mapping[str, Packed]) -> None:
        self._weights, self._others = weights, others

    def __getitem__(self, name: str) -> Packed:
        return self._others[name] if name in self._others else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Meter:
    """Measures trials of `source`'s model over `chunks`. folder: where hidden states may lie for that time."""

    def __init__(self, plan: Plan, chunks: Sequence[Chunk], folder: Path, device: str, threads: int) -> None:
        """plan: any of the source."""
        self._source, self._recipe, self._folder = plan.source, plan.recipe, folder
        self._options = Options(
            "fast", threads=threads if device == "cpu" else min(threads, GPU_THREADS), device=device
        )
        self._rows = Rows(plan.source)
        self._stream = Stream(plan.source.config, self._rows, device, torch.float32)
        self._chunks = chunks
        self._layers = len(plan.source.config.layers)
        self._files = ExitStack()

    def __enter__(self) -> Meter:
        self._pool = self._files.enter_context(ThreadPoolExecutor(self._options.threads))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def steps(self, trials: Sequence[Trial]) -> int:
        """What kl() counts: passes of all chunks through a layer."""
        return self._layers + sum(self._layers - max(0, _first(trial)) for trial in trials)

    def prepare(self, step: Callable[[], None]) -> None:
        """BF16's plain pass, on whose logits canvases are conditioned. Counts a step a layer."""
        self._plain = [self._stream.enter(chunk, None).cpu() for chunk in self._chunks]
        for index in range(self._layers):
            layer = self._stream.layer(index)
            self._plain = [layer(*both).cpu() for both in zip(self._chunks, self._plain, strict=True)]
            step()
        self._soft = [self._conditions(number, self._stream) for number in range(len(self._chunks))]
        self._both = [doubled(*both)[0] for both in zip(self._chunks, self._soft, strict=True)]

    def kl(self, trials: Sequence[Trial], step: Callable[[], None]) -> list[float]:
        """Of each trial, nats a position. InputError if the disk does not hold their hidden states."""
        sizes = [chunk.tokens for chunk in self._both]
        self._check_disk(sum(sizes) * (len(trials) + 1))
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            states = States(file, sizes * (len(trials) + 1), self._stream.config.hidden, torch.float32)
            begun = [self._enter({}, states, 0)] + [
                self._enter(trial, states, number) for number, trial in enumerate(trials, 1)
            ]
            for index in range(self._layers):
                layer = self._stream.layer(index)
                for number, trial in enumerate(trials, 1):
                    mine = {name: scheme for name, scheme in trial.items() if layer_of(name) == index}
                    if not mine and not begun[number]:
                        continue
                    own = self._stream.changed(layer, self._quantised(mine)) if mine else layer
                    self._through(own, states, number if begun[number] else 0, number)
                    begun[number] = True
                    step()
                self._through(layer, states, 0, 0)
                step()
                del layer
            return [self._lost(trial, states, number) for number, trial in enumerate(trials, 1)]

    def _through(self, layer: LayerOf, states: States, before: int, after: int) -> None:
        count = len(self._both)
        for number, chunk in enumerate(self._both):
            states.write(after * count + number, layer(chunk, states.read(before * count + number)))

    def _enter(self, trial: Trial, states: States, slot: int) -> bool:
        """Embed; whether the trial's states differ from BF16's here."""
        if slot and _first(trial) >= 0:
            return False
        stream = self._streamed(trial)
        for number, chunk in enumerate(self._chunks):
            soft = self._conditions(number, stream) if EMBEDDING in trial else self._soft[number]
            states.write(slot * len(self._chunks) + number, stream.enter(*doubled(chunk, soft)))
        self._stream.forget()
        return True

    def _lost(self, trial: Trial, states: States, slot: int) -> float:
        total, positions = 0.0, 0
        stream = self._streamed(trial) if EMBEDDING in trial else self._stream
        for number, chunk in enumerate(self._both):
            ours, theirs = (states.read(s * len(self._both) + number).to(stream.device) for s in (0, slot))
            pieces = zip(self._stream.leave(chunk, ours), stream.leave(chunk, theirs), strict=True)
            for (_, wanted), (_, found) in pieces:
                total += float(divergence(wanted, found).double().sum())
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
        weights = _Over(self._rows, self._quantised(outside))
        return Stream(self._stream.config, weights, self._stream.device, torch.float32)

    def _conditions(self, number: int, stream: Stream) -> Tensor:
        """What canvases are conditioned on: BF16's own logits through the stream's table."""
        chunk, x = self._chunks[number], self._plain[number].to(stream.device)
        return torch.cat([stream.soften(logits).cpu() for _, logits in self._stream.leave(chunk, x)])

    def _quantised(self, trial: Trial) -> dict[str, Packed]:
        """As `dgq convert` of effort fast does it, decoded."""
        found = {}
        for name, scheme in trial.items():
            shape = self._source.text[name].shape
            plan = Plan(self._source, self._recipe, ())
            jobs = slices(plan, PlannedTensor(name, name, shape, scheme), self._options, None)
            pieces = [piece for _, piece in ordered(self._pool, jobs, 2 * self._options.threads)]
            decoded = torch.cat([piece.to(self._stream.device).dequantize(torch.float32) for piece in pieces])
            found[name] = Packed(SCHEMES["f32"], shape, {"": decoded})
        return found

    def _check_disk(self, tokens: int) -> None:
        needed, free = 4 * tokens * self._stream.config.hidden, shutil.disk_usage(self._folder).free
        if needed > free:
            raise InputError(
                f"{self._folder}: needs {needed / 2**30:.1f} GiB of disk while it measures, for hidden states;"
                f" {free / 2**30:.1f} GiB are free. Fewer --groups or --chunks take less"
            )


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of logits (…, vocab)."""
    log_p = wanted.log_softmax(-1)
    return (log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1)


def _first(trial: Trial) -> int:
    """The first layer that it changes; -1: something before the layers."""
    return min(-1 if (layer := layer_of(name)) is None else layer for name in trial)
