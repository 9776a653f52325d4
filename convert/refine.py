"""Quantising with STATS: layer after layer, what a change of its weights would be felt, then error feedback.

    samples of STATS ── both passes, all states kept ──> head ──> last layer ──> … ──> first layer     (the way back)
                                            each: H, G of its weights ──> quantise them ──> drop H, G

    H = sum of |g|² x x^T      of x, what goes into a weight, and g, the gradient at what comes out:
    G = sum of |x|² g g^T      the curvature of KL(this model || the quantised one) is about H by G (K-FAC)

So a token counts by how much its result is felt at the end, on either side of the model, and so does a row of a weight.
An expert of few tokens leans on its layer's: LEAN tokens of the average expert are added to each.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dgq.convert.passes import Passes, Rows
from dgq.convert.plan import Plan, PlannedTensor
from dgq.convert.slices import InputScales, Options, Slice, slices
from dgq.quant.errors import InputError
from dgq.quant.feedback import by_matrix, feedback
from dgq.quant.types import Packed
from dgq.runtime.names import DECODER, EMBEDDING
from dgq.runtime.stream import Chunk, Stream

LEAN = 128.0
GROUP = 1 << 27  # elements of the Hessians that are inverted at once
ROWS = 1 << 27  # elements of a weight quantised at once
WIDEST = 1 << 14  # rows of a weight of which G is made
TOKENS = 1 << 18  # of the samples at most: their states lie on disk, 47 GB for the 26B in bfloat16


class Hessians:
    """A Sense: H and G of the weights `names`, of each expert or of the one matrix. What experts give is added up: G of
    their last weight is one for all."""

    def __init__(self, names: set[str], experts: int) -> None:
        self._names, self._experts = names, experts
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, g: Tensor, expert: int | None) -> None:
        if name not in self._names:
            return
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        if name not in self._sums:
            several = 1 if expert is None else self._experts
            rows = g.shape[-1] if 1 < g.shape[-1] <= WIDEST else 0
            apart = 1 if name.endswith("down_proj") else several
            self._sums[name] = (x.new_zeros(several, *2 * x.shape[-1:]), x.new_zeros(apart, rows, rows))
            self._tokens[name] = x.new_zeros(several)
        inputs, outputs = self._sums[name]
        inputs[expert or 0].addmm_(x.t(), x * g.square().mean(-1, keepdim=True))
        if outputs.numel():
            outputs[(expert or 0) % len(outputs)].addmm_(g.t(), g * x.square().mean(-1, keepdim=True))
        self._tokens[name][expert or 0] += g.any(-1).sum()  # what is not felt is no evidence

    def of(self, name: str, part: slice) -> tuple[Tensor, Tensor | None]:
        """H (n, in, in) and G (n or 1, rows, rows) of experts `part`, or of the one matrix; G None for one too tall."""
        tokens = self._tokens[name]
        found = []
        for total in self._sums[name]:
            if not bool(total.sum().isfinite()):
                raise InputError(f"{name}: its inputs or gradients are not numbers; the checkpoint is damaged")
            if len(total) > 1:
                average = total.sum(0) / tokens.sum().clamp(min=1)  # zero if nothing is felt at all
                total = (total[part] + LEAN * average) / (tokens[part] + LEAN).view(-1, 1, 1)
            found.append(total)
        return found[0], found[1] if found[1].numel() else None


def refinable(tensor: PlannedTensor) -> bool:
    return tensor.source is not None and len(tensor.shape) > 1 and tensor.scheme.bits < 16


def refined(
    plan: Plan, todo: list[PlannedTensor], options: Options, scratch: Path, scales: InputScales | None,
    step: Callable[[str], None],
) -> Iterator[tuple[Slice, Packed]]:  # fmt: skip
    """The slices of `todo`, quantised; those of a weight in order, weights from the last layer to the first. options:
    with stats; scratch: where hidden states may lie; step: told what is being done."""
    source, stats = plan.source, options.stats
    if stats is None or not todo:
        return
    chunks, dtype = used(stats.chunks), _dtype(options)
    stream = Stream(source.config, Rows(source), options.device, dtype)
    wanted: dict[int | str, list[PlannedTensor]] = {}
    for tensor in todo:
        wanted.setdefault(_stage(str(tensor.source)), []).append(tensor)
    layers = len(source.config.layers)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=0)) for _ in range(layers + 2)]
        passes = Passes(stream, chunks, range(len(chunks)), files[0], files[1:])
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
            step(f"samples, back to {stage}")
            tensors = wanted.get(stage, [])
            sense = Hessians({str(tensor.source) for tensor in tensors}, source.config.experts)
            passes.back(stage, sense)
            if options.device == "cuda":
                torch.cuda.empty_cache()  # activations make room for matrices
            for tensor in tensors:
                yield from _quantised(plan, tensor, sense, options, scales)


def used(chunks: list[Chunk]) -> list[Chunk]:
    """The first of the samples, TOKENS of them or one chunk. They were shuffled."""
    tokens = list(accumulate(chunk.encoded + 2 * chunk.canvases.numel() for chunk in chunks))
    return chunks[: max(1, sum(total <= TOKENS for total in tokens))]


def check_scratch(plan: Plan, todo: list[PlannedTensor], options: Options, scratch: Path) -> None:
    """InputError if the samples' hidden states do not fit on the disk beside what `todo` will be."""
    assert options.stats is not None
    config = plan.source.config
    tokens = sum(chunk.encoded + 2 * chunk.canvases.numel() for chunk in used(options.stats.chunks))
    states = (len(config.layers) + 2) * tokens * config.hidden * _dtype(options).itemsize
    free = shutil.disk_usage(scratch).free
    if free < states + sum(tensor.nbytes for tensor in todo):
        raise InputError(
            f"{scratch}: needs {states / 2**30:.1f} GiB of disk beside the artifact for the time of the conversion, for"
            f" hidden states of {tokens} tokens; {free / 2**30:.1f} GiB are free; choose another -o"
        )


def _dtype(options: Options) -> torch.dtype:
    return torch.float32 if options.device == "cpu" else torch.bfloat16


def _place(stage: int | str, layers: int) -> int:
    return stage if isinstance(stage, int) else {"enter": -1, "leave": layers}[stage]


def _stage(name: str) -> int | str:
    if name == EMBEDDING:
        return "leave"
    return int(name.removeprefix(DECODER + "layers.").split(".")[0]) if ".layers." in name else "enter"


def _quantised(
    plan: Plan, tensor: PlannedTensor, sense: Hessians, options: Options, scales: InputScales | None
) -> Iterator[tuple[Slice, Packed]]:
    name, columns = str(tensor.source), tensor.shape[-1]
    per_row = tensor.numel // tensor.shape[0]
    experts = len(tensor.shape) == 3
    most = max(1, min(ROWS // per_row, GROUP // columns**2) if experts else ROWS // columns)
    rows = most if experts or tensor.source == EMBEDDING else tensor.shape[0]  # G goes over all rows
    for job in slices(plan, tensor, options, scales, rows):
        inputs, outputs = sense.of(name, job.part)
        if tensor.source == EMBEDDING:  # a head to some, a table of vectors to others
            inputs = inputs + inputs.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns, device=inputs.device)
        quantise = partial(feedback, hessian=inputs, scheme=job.scheme, outputs=outputs)
        yield job, job.quantised(partial(by_matrix, quantise))
