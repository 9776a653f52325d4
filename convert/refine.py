"""Quantising with STATS: layer after layer, Hessians of what goes through a weight, then error feedback.

    samples of STATS ── both passes ──> layer i: H = sum of (w x)(w x)^T ──> quantise its weights ──> drop H

Each side of the model counts half, however many tokens it had: errors in the prompt's keys and values reach every later
step. A token counts for an expert by the share that it has in the layer's output. An expert of few tokens leans on its
layer's: LEAN tokens of the average expert are added to each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dgq.convert.passes import Passes, Rows
from dgq.convert.plan import Plan, PlannedTensor
from dgq.convert.slices import InputScales, Options, Slice, slices
from dgq.convert.stats import READERS
from dgq.quant.errors import InputError
from dgq.quant.feedback import by_matrix, feedback
from dgq.quant.types import Packed
from dgq.runtime.names import DECODER, EMBEDDING
from dgq.runtime.stream import Chunk, Stream

LEAN = 128.0
GROUP = 1 << 28  # elements of the Hessians that are inverted at once
ROWS = 1 << 27  # elements of a weight quantised at once
_READS = {reader: first for first, others in READERS.items() for reader in others}


def watched_name(name: str) -> str:
    """The weight under whose name the input of `name` is watched."""
    _, dot, last = name.rpartition("proj.weight")
    if not dot or last or ".experts." in name:
        return name
    stem, _, kind = name.rpartition(".weight")[0].rpartition(".")
    return f"{stem}.{_READS.get(kind, kind)}.weight"


class Hessians:
    """A Watch: weighted second moments of the inputs of `names`."""

    kinds: Tensor

    def __init__(self, names: set[str], experts: int, weight: tuple[float, float]) -> None:
        """weight: of a prompt's token, and of a canvas's."""
        self._names, self._experts, self._weight = names, experts, weight
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, expert: int | None, tokens: Tensor | None, felt: Tensor | None) -> None:
        if name not in self._names:
            return
        x = x.reshape(-1, x.shape[-1]).float()
        kinds = self.kinds if tokens is None else self.kinds[tokens]
        side = torch.where(kinds == 0, self._weight[0] ** 0.5, self._weight[1] ** 0.5)
        x = x * (side if felt is None else side * felt).unsqueeze(-1)
        if name not in self._sums:
            several = 1 if expert is None else self._experts
            self._sums[name] = x.new_zeros(several, x.shape[-1], x.shape[-1])
            self._tokens[name] = x.new_zeros(several)
        self._sums[name][expert or 0].addmm_(x.t(), x)
        self._tokens[name][expert or 0] += len(x)

    def of(self, name: str, part: slice) -> Tensor:
        """(n, in, in) of experts `part`, or of the one matrix."""
        total, tokens = self._sums[name], self._tokens[name]
        if not bool(total.isfinite().all()):
            raise InputError(f"{name}: its inputs are not numbers; the checkpoint is damaged")
        if len(total) == 1:
            return total
        average = total.sum(0) / tokens.sum()
        return (total[part] + LEAN * average) / (tokens[part] + LEAN).view(-1, 1, 1)


def refinable(tensor: PlannedTensor) -> bool:
    return tensor.source is not None and len(tensor.shape) > 1 and tensor.scheme.bits < 16


def refined(
    plan: Plan, todo: list[PlannedTensor], options: Options, scratch: Path, scales: InputScales | None,
    step: Callable[[str], None],
) -> Iterator[tuple[Slice, Packed]]:  # fmt: skip
    """The slices of `todo`, quantised; those of a weight in order, weights layer by layer. options: with stats;
    scratch: where hidden states may lie; step: told what is being done."""
    source, stats = plan.source, options.stats
    if stats is None or not todo:
        return
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    stream = Stream(source.config, Rows(source), options.device, dtype)
    wanted: dict[str, list[PlannedTensor]] = {}
    for tensor in todo:
        wanted.setdefault(_stage(str(tensor.source)), []).append(tensor)
    weight = _side_weights(stats.chunks)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=0)) for _ in range(3)]
        passes = Passes(stream, stats.chunks, range(len(stats.chunks)), files)
        step("samples, first pass")
        passes.first(lambda: step("samples, first pass"))
        layers = len(source.config.layers)
        for stage in ("enter", *map(str, range(layers)), "leave"):
            tensors = wanted.get(stage, [])
            step(f"samples, {stage}")
            names = {watched_name(str(tensor.source)) for tensor in tensors}
            watch = Hessians(names, source.config.experts, weight) if tensors else None
            if stage == "enter":
                passes.enter(watch)
            elif stage == "leave":
                if watch is not None:
                    passes.leave(watch)
            else:
                passes.layer(int(stage), watch)
            for tensor in tensors:
                assert watch is not None
                yield from _quantised(plan, tensor, watch, options, scales)


def _stage(name: str) -> str:
    if name == EMBEDDING:
        return "leave"
    return name.removeprefix(DECODER + "layers.").split(".")[0] if ".layers." in name else "enter"


def _side_weights(chunks: list[Chunk]) -> tuple[float, float]:
    prompts = sum(chunk.encoded for chunk in chunks)
    canvases = 2 * sum(chunk.canvases.numel() for chunk in chunks)
    return 0.5 * (prompts + canvases) / max(1, prompts), 0.5 * (prompts + canvases) / canvases


def _quantised(
    plan: Plan, tensor: PlannedTensor, watch: Hessians, options: Options, scales: InputScales | None
) -> Iterator[tuple[Slice, Packed]]:
    name = watched_name(str(tensor.source))
    columns = tensor.shape[-1]
    per_row = tensor.numel // tensor.shape[0]
    experts = len(tensor.shape) == 3
    least = max(1, min(ROWS // per_row, GROUP // columns**2 if experts else ROWS))
    for job in slices(plan, tensor, options, scales, least):
        hessian = watch.of(name, job.part)
        if tensor.source == EMBEDDING:  # a head to some, a table of vectors to others
            hessian = hessian + hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns, device=hessian.device)
        quantise = partial(feedback, hessian=hessian, scheme=job.scheme)
        yield job, job.quantised(partial(by_matrix, quantise))
