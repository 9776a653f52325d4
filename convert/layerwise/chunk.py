"""What goes through stream.py: chunks of sequences, their hidden states in a file, who looks at products."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Some sequences. prompts: their ids; canvases (n, canvas) int64, those of a prompt together, in its order;
    owner: of each canvas, its prompt; kind (n,) int64: any label; prompts' tokens have label 0. given: canvas ->
    what it was conditioned on when it was made, bfloat16 (canvas, hidden); for the others their own logits make it."""

    prompts: tuple[tuple[int, ...], ...]
    canvases: Tensor
    owner: tuple[int, ...]
    kind: Tensor
    given: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def encoded(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens(self) -> int:
        return self.encoded + self.canvases.numel()

    @property
    def run_tokens(self) -> int:
        """Tokens that go through the model: every canvas is run twice, plain and conditioned (samples.doubled)."""
        return self.encoded + 2 * self.canvases.numel()


class Watch(Protocol):
    """An Observer of products; see layers. kinds int64 (tokens,) is set before: labels of the rows, or of the tokens
    that an expert's rows are counted by."""

    kinds: Tensor

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor: ...


Sense = Callable[[str, Tensor, Tensor, int | None], None]
"""Told of products on the way back: the weight's name, x (…, in) that went in, the gradient g (…, out) at what came
out, and the expert's number."""


class _Tap(torch.autograd.Function):
    """The identity, which tells the gradient that comes back through it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.tell = tell
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell(gradient)
        return gradient, None


class Tapped:
    """A Watch by which `sense` is told of products on the way back."""

    kinds: Tensor

    def __init__(self, sense: Sense) -> None:
        self._sense = sense

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        kept = x.detach()

        def tell(gradient: Tensor) -> None:
            self._sense(name, kept, gradient, expert)

        tapped: Tensor = _Tap.apply(y, tell)  # type: ignore[no-untyped-call]
        return tapped


class States:
    """Hidden states of every chunk, flat (tokens, hidden), in an unbuffered file. tokens: of each chunk; pinned: those
    read, and those on their way to the file, lie in memory that a GPU copies from and to."""

    def __init__(
        self, file: BinaryIO, tokens: Sequence[int], hidden: int, dtype: torch.dtype, pinned: bool = False
    ) -> None:
        self.file, self._hidden, self._dtype, self._pinned = file, hidden, dtype, pinned
        self._starts = list(accumulate(tokens, initial=0))

    def write(self, number: int, x: Tensor) -> None:
        if self._pinned:
            x = torch.empty(x.shape, dtype=self._dtype, pin_memory=True).copy_(x)
        data = x.to(self._dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        at = self._starts[number] * self._hidden * self._dtype.itemsize
        while data:
            done = os.pwrite(self.file.fileno(), data, at)
            data, at = data[done:], at + done

    def read(self, number: int) -> Tensor:
        tokens = self._starts[number + 1] - self._starts[number]
        size, at = tokens * self._hidden * self._dtype.itemsize, self._starts[number] * self._hidden
        found = torch.empty(tokens, self._hidden, dtype=self._dtype, pin_memory=self._pinned)
        data, done = found.view(torch.uint8).numpy().data.cast("B"), 0
        while done < size:
            count = os.preadv(self.file.fileno(), [data[done:]], at * self._dtype.itemsize + done)
            if not count:
                raise OSError(f"hidden states of chunk {number} end after {done} of {size} bytes")
            done += count
        return found
