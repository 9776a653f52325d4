"""What the grids of ggml's formats share: blocks of 32 with one half each, and the searches where the weight lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgq.quant.schemes.ggml import search


class HalfScaleGrid:
    """Blocks of 32 weights with a half each: w = scale * level. Candidates are multiples of largest |w| / `largest`.

    A format's grid says its levels, its factors and how a block's bytes look.
    """

    block = sub = 32
    level_values: tuple[float, ...]
    largest: float  # the magnitude of a level that the largest weight goes to
    factors: tuple[float, ...]

    def __init__(self, weight: Tensor) -> None:
        self.levels = torch.tensor(self.level_values, dtype=torch.float32, device=weight.device)

    def open(self, x: Tensor, cost: Tensor) -> None:
        return None

    def scales(self, x: Tensor, cost: Tensor, state: None, number: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        step = x.abs().amax(-1) / self.largest
        d = torch.stack([step * factor for factor in self.factors]).half().float()
        return d, None, (d,)

    def pack(self, codes: Tensor, notes: list[Tensor]) -> dict[str, Tensor]:
        shape = (*codes.shape[:-1], -1)
        d = notes[0].half().reshape(-1, 1)
        return {"": self.pack_blocks(d, codes.reshape(-1, 32).int()).reshape(shape)}

    def pack_blocks(self, d: Tensor, codes: Tensor) -> Tensor:
        """d float16 (blocks, 1) and codes int32 (blocks, 32) -> uint8 (blocks, bytes of a block)."""
        raise NotImplementedError


def searches(x: Tensor) -> Any:
    """search.py, or on a GPU search_kernel.py: one kernel for two thousand operations, whose sums are not ggml's to the
    bit."""
    if not x.is_cuda:
        return search
    from dgq.quant.schemes.ggml import search_kernel  # Triton is where CUDA is

    return search_kernel


def half_column(values: Tensor) -> Tensor:
    """Halves, one a row, whose bytes can be looked at: a single value would keep the stride that it came with."""
    return values.half().reshape(-1, 1).clone(memory_format=torch.contiguous_format)


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x != 0, 1 / x, 0.0)
