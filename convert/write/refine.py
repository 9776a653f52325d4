"""Quantising with STATS: layer after layer, what a change of its weights would be felt, then error feedback.

    samples of STATS ── both passes, all states kept ──> head ──> last layer ──> … ──> first layer     (the way back)
                                            each: H, G of its weights ──> quantise them ──> drop H, G

    H = sum of |g|² x x^T      of x, what goes into a weight, and g, the gradient at what comes out:
    G = sum of |x|² g g^T      the curvature of KL(this model || the quantised one) is about H by G (K-FAC)

So a token counts by how much its result is felt at the end, on either side of the model, and so does a row of a weight.
An expert of few tokens leans on its layer's: LEAN tokens of the average expert are added to each. If a layer's Hessians
are more than memory holds, it is gone back through several times (layerwise/schedule.py); the bytes are the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgq.convert.layerwise.estimate import Needs, Sizes
from dgq.convert.layerwise.passes import Rows, SamplePasses
from dgq.convert.layerwise.samples import used
from dgq.convert.layerwise.schedule import JOINED, WIDEST, at_once, trips
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.layerwise.stream import Stream
from dgq.convert.plans.plan import Plan
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.write.settings import ConversionSettings, InputScales
from dgq.convert.write.slices import Slice, slices
from dgq.quant.errors import InputError
from dgq.quant.feedback.feedback import by_matrix, feedback
from dgq.quant.files.places import free_bytes
from dgq.quant.types import Packed, Scheme
from dgq.runtime.shape.names import EMBEDDING, layer_of

LEAN = 1024.0
SWEEPS = {"standard": 0, "max": 2}
FEW = 1 << 22  # elements of experts that a thread of the CPU quantises at once


class Hessians:
    """A BackwardHook: H and G of the weights it was told to watch, of one matrix or of each expert; and what all
    experts of a weight give, added up the first time that the weight is watched. G of the experts' last weight is one
    for all."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._watched: dict[str, slice] = {}
        self._fresh: set[str] = set()
        self._alone: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._shared: dict[str, tuple[Tensor, Tensor]] = {}
        self._tokens: dict[str, Tensor] = {}

    def watch(self, watched: dict[str, slice]) -> None:
        """From now on these experts of these weights (of one matrix slice(0, 1)); what is one's own is dropped."""
        self._fresh = watched.keys() - self._shared.keys()
        self._watched = watched
        self._alone.clear()

    def __call__(self, name: str, x: Tensor, g: Tensor, expert: int | None) -> None:
        part = self._watched.get(name)
        if part is None:
            return
        wanted, fresh = part.start <= (expert or 0) < part.stop, expert is not None and name in self._fresh
        if not wanted and not fresh:
            return
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        rows = g.shape[-1] if 1 < g.shape[-1] <= WIDEST else 0
        sums = []
        if wanted:
            alone = expert is None or not name.endswith(JOINED)
            sums.append(_known(self._alone, (name, expert or 0), x, rows * alone))
        if fresh:
            sums.append(_known(self._shared, name, x, rows))
            if name not in self._tokens:
                self._tokens[name] = x.new_zeros(self._experts)
            self._tokens[name][expert] += g.any(-1).sum()  # what is not felt is no evidence
        _add([h for h, _ in sums], x, x * g.square().mean(-1, keepdim=True), expert is None)
        _add([k for _, k in sums if k.numel()], g, g * x.square().mean(-1, keepdim=True), expert is None)

    def of(self, name: str, part: slice) -> tuple[Tensor, Tensor | None]:
        """H (n, in, in) and G (n or 1, rows, rows) of experts `part`, or of the one matrix; G None for one too tall."""
        if name in self._shared:
            sides = [self._leaning(name, part, side) for side in (0, 1)]
        else:
            sides = [total.unsqueeze(0) for total in self._alone[name, 0]]
        for total in sides:
            if not bool(total.sum().isfinite()):
                raise InputError(f"{name}: its inputs or gradients are not numbers; the checkpoint is damaged")
        return sides[0], sides[1] if sides[1].numel() else None

    def _leaning(self, name: str, part: slice, side: int) -> Tensor:
        shared, tokens = self._shared[name][side], self._tokens[name]
        if side and name.endswith(JOINED):
            return shared.unsqueeze(0)
        alone = [self._alone.get((name, expert)) for expert in range(part.start, part.stop)]
        total = torch.stack([torch.zeros_like(shared) if one is None else one[side] for one in alone])
        average = shared / tokens.sum().clamp(min=1)  # zero if nothing is felt at all
        return total.add_(average, alpha=LEAN).div_((tokens[part] + LEAN).view(-1, 1, 1))


def _known(totals: dict[Any, tuple[Tensor, Tensor]], key: Any, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if key not in totals:
        totals[key] = (x.new_zeros(*2 * x.shape[-1:]), x.new_zeros(rows, rows))
    return totals[key]


def _add(totals: list[Tensor], x: Tensor, y: Tensor, matrix: bool) -> None:
    """Add x^T y to each. Those of experts are the same to the bit whichever of them there are."""
    if matrix:
        for total in totals:
            total.addmm_(x.t(), y)
    elif totals:
        product = x.t() @ y
        for total in totals:
            total += product


def refinable(tensor: PlannedTensor) -> bool:
    return tensor.source is not None and len(tensor.shape) > 1 and tensor.scheme.bits < 16


def refined(
    plan: Plan, todo: list[PlannedTensor], settings: ConversionSettings, scratch: Path, scales: InputScales | None,
    step: Callable[[str], None],
) -> Iterator[tuple[Slice, Packed]]:  # fmt: skip
    """The slices of `todo`, quantised; those of a weight in order, weights from the last layer to the first. settings:
    with stats; scratch: where hidden states may lie; step: told what is being done."""
    source, stats = plan.source, settings.stats
    if stats is None or not todo:
        return
    chunks, dtype = used(stats.chunks), _dtype(settings.device)
    room = check_memory(plan, todo, settings)
    stream = Stream(source.config, Rows(source), settings.device, dtype)
    wanted: dict[int | str, list[PlannedTensor]] = {}
    for tensor in todo:
        wanted.setdefault(_stage(str(tensor.source)), []).append(tensor)
    layers = len(source.config.layers)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=0)) for _ in range(layers + 2)]
        pool = stack.enter_context(one_thread(settings.device))
        passes = SamplePasses(stream, chunks, range(len(chunks)), files[0], files[1:])
        with shared_out(pool):
            step("samples, first pass")
            passes.first(lambda: step("samples, first pass"))
            step("samples, second pass")
            passes.enter(None)
            for index in range(layers):
                passes.layer(index, None)
                step("samples, second pass")
        last = min((_place(stage, layers) for stage in wanted), default=0)
        stages: list[int | str] = ["leave", *reversed(range(layers)), "enter"]
        for stage in stages:
            if _place(stage, layers) < last:
                break
            tensors = wanted.get(stage, [])
            sense = Hessians(source.config.experts)
            parts = trips(tensors, settings.device, room)
            for number, part in enumerate(parts, 1):
                step(f"samples, back to {stage}" + (f", {number} of {len(parts)}" if len(parts) > 1 else ""))
                sense.watch(part)
                with shared_out(pool):
                    passes.back(stage, sense, again=number < len(parts))
                if settings.device == "cuda":
                    torch.cuda.empty_cache()  # activations make room for matrices
                for tensor in tensors:
                    if str(tensor.source) in part:
                        yield from _quantised(plan, tensor, part[str(tensor.source)], sense, settings, scales, pool)


def check_scratch(plan: Plan, todo: list[PlannedTensor], settings: ConversionSettings, scratch: Path) -> None:
    """InputError if the samples' hidden states do not fit on the disk beside what `todo` will be."""
    assert settings.stats is not None
    tokens = sum(chunk.run_tokens for chunk in used(settings.stats.chunks))
    states = tokens * Needs(plan.source, settings.device, Sizes.of(settings.stats.chunks)).scratch
    free = free_bytes(scratch)
    if free < states + sum(tensor.nbytes for tensor in todo):
        raise InputError(
            f"{scratch}: needs {states / 2**30:.1f} GiB of disk beside the artifact for the time of the conversion, for"
            f" hidden states of {tokens} tokens; {free / 2**30:.1f} GiB are free; choose another -o"
        )


def check_memory(plan: Plan, todo: list[PlannedTensor], settings: ConversionSettings) -> int:
    """Bytes there are for Hessians. InputError if the budget does not hold what `todo` takes."""
    assert settings.stats is not None
    sizes = Sizes.of(used(settings.stats.chunks))
    return settings.budget.room(
        Needs(plan.source, settings.device, sizes, todo), settings.device, "converting with STATS"
    )


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _place(stage: int | str, layers: int) -> int:
    return stage if isinstance(stage, int) else {"enter": -1, "leave": layers}[stage]


def _stage(name: str) -> int | str:
    if name == EMBEDDING:
        return "leave"
    layer = layer_of(name)
    return "enter" if layer is None else layer


def _quantised(
    plan: Plan, tensor: PlannedTensor, part: slice, sense: Hessians, settings: ConversionSettings,
    scales: InputScales | None, pool: Executor | None,
) -> Iterator[tuple[Slice, Packed]]:  # fmt: skip
    """Of a matrix everything, of experts those of `part`."""
    name, columns = str(tensor.source), tensor.shape[-1]
    for job in slices(plan, tensor, settings, scales, at_once(tensor, settings.device)):
        if len(tensor.shape) == 3 and not part.start <= job.part.start < part.stop:
            continue
        inputs, outputs = sense.of(name, job.part)
        if tensor.source == EMBEDDING:  # a head to some, a table of vectors to others
            inputs = inputs + inputs.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns, device=inputs.device)
        quantise = partial(_few_at_once, inputs, outputs, job.scheme, SWEEPS[settings.effort], pool)
        yield job, job.quantised(partial(by_matrix, quantise))


def _few_at_once(
    hessian: Tensor, outputs: Tensor | None, scheme: Scheme, sweeps: int, pool: Executor | None, weight: Tensor
) -> dict[str, Tensor]:
    """feedback(), FEW elements or one expert for each of the pool's threads; without a pool all side by side."""

    def done(part: slice) -> dict[str, Tensor]:
        curvature = outputs if outputs is None or len(outputs) == 1 else outputs[part]
        return feedback(weight[part], hessian[part], scheme, curvature, sweeps=sweeps)

    step = max(1, FEW // weight[0].numel())
    if pool is None or step >= len(weight):
        return done(slice(None))
    pieces = list(pool.map(done, [slice(start, start + step) for start in range(0, len(weight), step)]))
    return {suffix: torch.cat([parts[suffix] for parts in pieces]) for suffix in pieces[0]}
