"""What is quantised at a time: a few rows or experts of one weight, read, checked and encoded by one thread.

On a GPU every thread has a stream of its own, so that one slice is copied while another is encoded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dgq.convert.plans.gguf_metadata import rope_freqs
from dgq.convert.plans.plan import Plan
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.write.settings import ConversionSettings, InputScales
from dgq.quant.errors import InputError
from dgq.quant.feedback.feedback import by_matrix, search
from dgq.quant.types import Packed, Scheme
from dgq.runtime.files import mmproj

SLICE = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements quantised at a time, or one expert: 4 and 64 MiB of float32


@dataclass(frozen=True)
class Slice:
    """A slice of a weight: run() reads it, checks it and quantises it.

    part: its rows or experts. last: no other slice of the weight follows. importance: of its columns. input_scale: of
    its inputs (W4A4). searched: effort fast of a scheme whose scales are searched for, instead of the reference's.
    """

    plan: Plan
    tensor: PlannedTensor
    part: slice
    last: bool
    scheme: Scheme
    importance: torch.Tensor | None
    device: str
    input_scale: float | None
    searched: bool

    def run(self) -> Packed:
        if self.tensor.source is None:
            factors = torch.tensor(rope_freqs(self.plan.source))
            return Packed(self.scheme, self.tensor.shape, self.scheme.quantize(factors))
        with _thread_stream() if self.device == "cuda" else nullcontext():
            return self.quantised(self._searched if self.searched else self._stock)

    def quantised(self, quantise: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]) -> Packed:
        """Read, checked and made into parts by `quantise`; on the CPU."""
        name = str(self.tensor.source)
        values = self.plan.source.rows(name, self.part.start, self.part.stop).to(self.device)
        if self.tensor.vision and self.plan.format.one_file:
            values = mmproj.stored(name, values)
        where = f"{self.plan.source.file(name)}: {name}"
        self._check(values, where)
        packed = Packed(self.scheme, tuple(values.shape), quantise(values))
        if self.importance is not None and not torch.isfinite(packed.dequantize()).all():
            raise InputError(f"{where}: the imatrix's importance overflows {self.scheme.name}; the imatrix is damaged")
        if self.input_scale is not None:
            scale = torch.full((*values.shape[:-1], 1), self.input_scale)
            packed = Packed(packed.scheme, packed.shape, {**packed.parts, "input_scale": scale})
        return packed.to("cpu")

    def _stock(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.scheme.quantize(values, self.importance)

    def _searched(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return by_matrix(lambda weight: search(weight, None, self.scheme), values)

    def _check(self, values: torch.Tensor, where: str) -> None:
        low, high = torch.aminmax(values)
        largest = max(-float(low), float(high))  # not a number if any value is none
        if largest <= self.scheme.max_abs:
            return
        wrong = (~torch.isfinite(values)).nonzero()
        if len(wrong):
            value = float(values[tuple(wrong[0])])
            index = [int(i) for i in wrong[0]]
            index[0] += self.part.start
            raise InputError(f"{where} holds {value} at {index}; the checkpoint is damaged")
        limit = f"{self.scheme.name} holds {self.scheme.max_abs:.6g} at most"
        raise InputError(f"{where} holds a weight of {largest:.4g}, {limit}; the checkpoint is damaged")


def slices(
    plan: Plan, tensor: PlannedTensor, settings: ConversionSettings, scales: InputScales | None, rows: int = 0
) -> Iterator[Slice]:
    """The slices of a tensor along its first axis, `rows` long or as suits the device."""
    weights = settings.imatrix.weights if settings.imatrix is not None else {}
    importance = weights.get(tensor.name)
    scheme = plan.slice_scheme(tensor)
    scale = scales.values.get(tensor.name) if scales else None
    length = tensor.shape[0] if tensor.shape else 1
    rows = rows or rows_at_once(tensor, settings.device)
    searched = settings.effort == "fast" and scheme.searched
    for start in range(0, length, rows):
        part = slice(start, min(start + rows, length))
        columns = importance[part] if importance is not None and importance.dim() == 2 else importance
        yield Slice(plan, tensor, part, part.stop == length, scheme, columns, settings.device, scale, searched)


def rows_at_once(tensor: PlannedTensor, device: str) -> int:
    """Rows, or experts, of a slice."""
    length = tensor.shape[0] if tensor.shape else 1
    if tensor.source is None or tensor.is_whole:
        return length
    return min(length, max(1, SLICE[device] // max(1, tensor.numel // length)))


def ordered(pool: ThreadPoolExecutor, jobs: Iterable[Slice], ahead: int) -> Iterator[tuple[Slice, Packed]]:
    """Run slices on the pool, at most `ahead` at a time, and yield them with their results in order."""
    running: deque[tuple[Slice, Future[Packed]]] = deque()
    try:
        for job in jobs:
            running.append((job, pool.submit(job.run)))
            if len(running) >= ahead:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
    finally:
        for _, future in running:
            future.cancel()


_streams = threading.local()


def _thread_stream() -> AbstractContextManager[Any]:
    """This thread's CUDA stream: memory is cached by stream, so there must not be one for every slice."""
    if not hasattr(_streams, "stream"):
        _streams.stream = torch.cuda.Stream()
    return torch.cuda.stream(_streams.stream)
