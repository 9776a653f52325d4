"""Where the loss comes from: the error of each tensor, and of each layer's output on the reference's own activations.

weights   ‖Q - W‖ / ‖W‖ of a tensor, and of its worst expert; the gain <Q, W> / <W, W> of each block, which is near 1
          unless the block's scale is wrong (blocks with little energy for their tensor are left out)

layer     x ─┬─ reference's layer ─┬─ attention │ dense MLP, experts, router on the reference's residual │ output
             └─ artifact's layer ──┴─ the same parts, compared one by one: no part answers for another
          Beside it the artifact's layers follow each other from its own input: this shows how errors add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.stream import LayerOf, Stream
from dgq.convert.resume.work import UnitResult
from dgq.convert.validation.questions import LEVELS, Question, canvases
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.weights import Weights
from dgq.runtime.model.layers import DECODE_BUDGET
from dgq.runtime.shape.names import layer_of

PARTS = ("attention", "dense MLP", "experts", "output", "accumulated")
GAIN_BLOCK = 32  # weights at most that share a gain
LEAST_ENERGY = 0.05  # of the mean of a tensor's blocks: the gain of a block with less is not looked at


def stages(names: Sequence[str], layers: int) -> list[list[str]]:
    """Tensors that are compared in one unit: those outside of the layers, then those of each layer, the decoder's and
    the encoder's."""
    return [[name for name in names if layer_of(name) == layer] for layer in (None, *range(layers))]


def weight_errors(
    source: Mapping[str, Packed], other: Mapping[str, Packed], names: Sequence[str], device: str
) -> UnitResult:
    """Compare tensors by name, on `device`. For each of them "NAME" float64 (4,): the relative error, the worst
    expert's, that expert's number, the median expert's; and "NAME.gain" float64 (2,): the least and the largest gain of
    a block.
    """
    errors = {}
    for name in names:
        a, b = source[name], other[name]
        errors[name], errors[name + ".gain"] = _weight(a, b, device)
    return errors


def _weight(a: Packed, b: Packed, device: str) -> tuple[Tensor, Tensor]:
    block = min(GAIN_BLOCK, b.scheme.block) if b.scheme.bits < 16 else 1
    wrong, whole, low, high = [], [], 1.0, 1.0
    for start, stop in _pieces(a.shape):
        w, q = (side[start:stop].to(device).dequantize(torch.float32) for side in (a, b))
        wrong.append(
            (q - w).double().square().flatten(1).sum(1) if w.dim() > 2 else (q - w).double().square().sum()[None]
        )
        whole.append(w.double().square().flatten(1).sum(1) if w.dim() > 2 else w.double().square().sum()[None])
        if block > 1:
            ends = _gains(w.view(-1, block), q.view(-1, block))
            low, high = min(low, ends[0]), max(high, ends[1])
    errors, sizes = torch.cat(wrong), torch.cat(whole)
    if len(a.shape) < 3:
        errors, sizes = errors.sum()[None], sizes.sum()[None]
    each = (errors / sizes.clamp(min=1e-30)).sqrt()
    worst = int(each.argmax())
    total = (errors.sum() / sizes.sum().clamp(min=1e-30)).sqrt()
    values = [float(total), float(each[worst]), float(worst), float(each.median())]
    return torch.tensor(values, dtype=torch.float64), torch.tensor([low, high], dtype=torch.float64)


def _gains(w: Tensor, q: Tensor) -> tuple[float, float]:
    """w, q (blocks, block) float32 -> the least and the largest gain among blocks with enough energy."""
    energy = w.square().sum(1)
    enough = energy > LEAST_ENERGY * energy.mean()
    if not bool(enough.any()):
        return 1.0, 1.0
    gain = ((w * q).sum(1) / energy)[enough]
    return float(gain.min()), float(gain.max())


def _pieces(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and stop of slices along the first axis, of at most DECODE_BUDGET elements each."""
    row = 1
    for size in shape[1:]:
        row *= size
    step = max(1, DECODE_BUDGET // row)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class Unscaled(Mapping[str, Packed]):
    """Weights without their input scales, so that activations are not rounded."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Packed:
        weight = self._weights[name]
        return Packed(weight.scheme, weight.shape, {k: v for k, v in weight.parts.items() if k != "input_scale"})

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def layer_chunk(questions: Sequence[Question], rows: range, seed: int, vocab: int) -> Chunk:
    """The questions with these numbers as a chunk, each with its canvas at every noise level."""
    noised = canvases(questions, rows, seed, vocab).transpose(0, 1)  # (rows, levels, canvas)
    owner = tuple(i for i in range(len(rows)) for _ in LEVELS)
    prompts = tuple(questions[row].prompt for row in rows)
    return Chunk(prompts, noised.flatten(0, 1), owner, torch.ones(len(owner), dtype=torch.int64))


@torch.inference_mode()
def layer_errors(
    source: Artifact, other: Artifact, chunk: Chunk, device: str, dtype: torch.dtype, activations: str | None
) -> UnitResult:
    """Compare the layers of two models on a chunk. All results are sums over its tokens, float64.

    "wrong", "whole" (layers, parts): squares of the difference and of the reference's output, by PARTS; "overlap"
    (layers, 3): chosen experts in common on the reference's residual, in common when each has its own, and chosen in
    all; "chosen" (2, layers, experts): tokens of each expert in the reference and in the other, on their own residuals.
    """
    ours = Stream(source.config, source.weights, device, dtype)
    weights = other.weights if activations else Unscaled(other.weights)
    theirs = Stream(other.config, weights, device, dtype)
    layers, experts = len(source.config.layers), source.config.experts
    sums = {
        "wrong": torch.zeros(layers, len(PARTS), dtype=torch.float64),
        "whole": torch.zeros(layers, len(PARTS), dtype=torch.float64),
        "overlap": torch.zeros(layers, 3, dtype=torch.float64),
        "chosen": torch.zeros(2, layers, experts, dtype=torch.float64),
    }
    x, drifted = ours.enter(chunk, None), theirs.enter(chunk, None)
    for index in range(layers):
        a, b = ours.layer(index), theirs.layer(index)
        mixed = a.mixed(chunk, x)
        pairs = [(mixed - x, b.mixed(chunk, x) - x), (a.layer.dense(mixed), b.layer.dense(mixed)),
                 (a.layer.routed(mixed), b.layer.routed(mixed))]  # fmt: skip
        _router(a, b, mixed, b.mixed(chunk, drifted), sums, index)
        out, drifted = a(chunk, x), b(chunk, drifted)
        pairs += [(out, b(chunk, x)), (out, drifted)]
        for part, (right, given) in enumerate(pairs):
            sums["wrong"][index, part] = (given - right).double().square().sum().cpu()
            sums["whole"][index, part] = right.double().square().sum().cpu()
        x = out
    return sums


def _router(a: LayerOf, b: LayerOf, mixed: Tensor, drifted: Tensor, sums: UnitResult, index: int) -> None:
    right, given, alone = a.layer.route(mixed)[0], b.layer.route(mixed)[0], b.layer.route(drifted)[0]
    common = [float((right.unsqueeze(-1) == side.unsqueeze(-2)).sum()) for side in (given, alone)]
    sums["overlap"][index] = torch.tensor([*common, float(right.numel())], dtype=torch.float64)
    for side, picks in enumerate((right, alone)):
        experts = sums["chosen"].shape[-1]
        sums["chosen"][side, index] = torch.bincount(picks.flatten(), minlength=experts).double().cpu()
