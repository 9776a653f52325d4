"""What is done at once while a layer's weights are quantised by their Hessians.

    a layer's weights ──> at_once: experts, or rows of a matrix, that are inverted and quantised together
                      ──> trips:   ways back through the layer, each with the Hessians that there is room for

What is quantised together is fixed by shapes and device, so that the bytes of an artifact depend on no budget of
memory. Only the number of trips does. The Hessians of a layer of the 26B take 5.5 GB: without room for all of them,
the layer is gone back through several times. The least there must be room for are those that are inverted together.
The average of all experts is gathered the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgq.convert.plans.tensors import PlannedTensor
from dgq.runtime.shape.names import EMBEDDING

GROUP = {"cpu": 1 << 27, "cuda": 1 << 28}  # elements of the Hessians that are inverted at once
EXPERTS = {"cpu": 1 << 26, "cuda": 1 << 27}  # elements of experts quantised at once: a GPU's kernels want many
ROWS = {"cpu": 1 << 25, "cuda": 1 << 26}  # elements of a matrix whose rows are quantised each for itself
JOINED = "down_proj"  # the experts' weight whose results are added up: its G is one for all
WIDEST = 1 << 14  # rows of a weight at most of which G is made


@dataclass(frozen=True)
class Hessian:
    """What refining gathers for a weight.

    apart: bytes of one matrix, or of each expert. shared: bytes that all experts have together. rows, columns: of the
    matrix. outputs: whether G is made. joined: whether G is one for all experts.
    """

    apart: int
    shared: int
    rows: int
    columns: int
    outputs: bool
    joined: bool

    @classmethod
    def of(cls, tensor: PlannedTensor) -> Hessian:
        rows, columns = tensor.shape[-2:]
        outputs = tensor.source != EMBEDDING and rows <= WIDEST
        h, g = 4 * columns**2, 4 * rows**2 * outputs
        if len(tensor.shape) < 3:
            return cls(h + g, 0, rows, columns, outputs, False)
        joined = str(tensor.source).endswith(JOINED)
        return cls(h if joined else h + g, h + g, rows, columns, outputs, joined)


def at_once(tensor: PlannedTensor, device: str) -> int:
    """How many experts of a weight, or rows of a matrix, are quantised together. A matrix with a G is quantised whole,
    as G goes over all of its rows."""
    columns = tensor.shape[-1]
    if len(tensor.shape) == 3:
        fit = EXPERTS[device] // (tensor.shape[-2] * columns), GROUP[device] // columns**2
        return max(1, min(*fit, tensor.shape[0]))
    if Hessian.of(tensor).outputs or tensor.is_whole:
        return tensor.shape[0]
    return min(tensor.shape[0], max(1, ROWS[device] // columns))


def trips(tensors: Sequence[PlannedTensor], device: str, room: int) -> list[dict[str, slice]]:
    """Whose Hessians are gathered together: for each way back through a layer, a weight's name -> its experts, or
    slice(0, 1) for one matrix. They come in order, and take no more than `room` bytes at once."""
    planned: list[dict[str, slice]] = [{}]
    begun, held = 0, 0  # bytes: what experts share stays for the whole layer
    for tensor in tensors:
        name, gathered = str(tensor.source), Hessian.of(tensor)
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        step = at_once(tensor, device) if experts > 1 else 1
        begun += gathered.shared
        for first in range(0, experts, step):
            part = slice(first, min(first + step, experts))
            size = gathered.apart * (part.stop - part.start)
            if planned[-1] and begun + held + size > room:
                planned.append({})
                held = 0
            known = planned[-1].get(name)
            planned[-1][name] = slice(known.start, part.stop) if known else part
            held += size
    return planned
