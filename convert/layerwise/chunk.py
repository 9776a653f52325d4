"""What goes through the model layer by layer: a chunk of sequences, and the file of the chunks' hidden states.

tokens of a chunk    p p p p p p p p | c c c c | c c c c | …        prompts one after the other, then the canvases
file of states       chunk 0 (tokens, hidden) | chunk 1 | …         flat, in the dtype of the computation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import BinaryIO

import torch
from torch import Tensor

from dgq.quant.files.positions import read_at, write_at


@dataclass(frozen=True)
class Chunk:
    """Some prompts, and the canvases behind them.

    prompts: their ids. canvases: (n, canvas) int64; those of a prompt lie together, in the order of the prompts. owner:
    the prompt of each canvas. kind: (n,) int64, a label of each canvas; the prompts' tokens have label 0. given: canvas
    -> what it was conditioned on when it was made, (canvas, hidden) bfloat16; the others are conditioned on what their
    own logits make.
    """

    prompts: tuple[tuple[int, ...], ...]
    canvases: Tensor
    owner: tuple[int, ...]
    kind: Tensor
    given: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def encoded(self) -> int:
        """Tokens of the prompts."""
        return sum(map(len, self.prompts))

    @property
    def tokens(self) -> int:
        """Tokens of prompts and canvases, each once."""
        return self.encoded + self.canvases.numel()

    @property
    def run_tokens(self) -> int:
        """Tokens that go through the model: every canvas is run twice, plain and conditioned (samples.doubled)."""
        return self.encoded + 2 * self.canvases.numel()


class States:
    """Hidden states of every chunk in an unbuffered file. tokens: of each chunk; pinned: what is read, and what is on
    its way to the file, lies in memory that a GPU copies from and to."""

    def __init__(
        self, file: BinaryIO, tokens: Sequence[int], hidden: int, dtype: torch.dtype, pinned: bool = False
    ) -> None:
        self.file, self._hidden, self._dtype, self._pinned = file, hidden, dtype, pinned
        self._starts = list(accumulate(tokens, initial=0))

    def write(self, number: int, x: Tensor) -> None:
        """Write the states (tokens, hidden) of a chunk to its place."""
        if self._pinned:
            x = torch.empty(x.shape, dtype=self._dtype, pin_memory=True).copy_(x)
        data = x.to(self._dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        at = self._starts[number] * self._hidden * self._dtype.itemsize
        while data:
            done = write_at(self.file, data, at)
            data, at = data[done:], at + done

    def read(self, number: int) -> Tensor:
        """The states (tokens, hidden) of a chunk, on the CPU. OSError if the file is too short."""
        tokens = self._starts[number + 1] - self._starts[number]
        size, at = tokens * self._hidden * self._dtype.itemsize, self._starts[number] * self._hidden
        states = torch.empty(tokens, self._hidden, dtype=self._dtype, pin_memory=self._pinned)
        data, done = states.view(torch.uint8).numpy().data.cast("B"), 0
        while done < size:
            count = read_at(self.file, data[done:], at * self._dtype.itemsize + done)
            if not count:
                raise OSError(f"hidden states of chunk {number} end after {done} of {size} bytes")
            done += count
        return states
