"""What NVFP4 and NF4 share: the largest weight of a block, sorting scaled weights into intervals, two codes a byte.

A CPU works on pieces of 2^17 weights, whose temporaries stay in a core's second cache, with the operations that are
vectorised there: an absolute value's bits order like an integer, so a block's largest is an integer maximum, and numpy
compares sixteen floats at a time into bytes (torch's comparisons go one by one, its bucketize by binary search). Only
comparisons and copies happen here, no rounding: the results are those of amax and bucketize, which other devices use.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_PIECE = 1 << 17
_BITS = {2: torch.int16, 4: torch.int32}


def pieces(numel: int, block: int, device: torch.device) -> Iterator[slice]:
    """Ranges of blocks to work on at once."""
    blocks = numel // block
    step = _PIECE // block if device.type == "cpu" else max(1, blocks)
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def largest(weight: torch.Tensor, block: int) -> torch.Tensor:
    """weight (…, in) of 16 or 32 bits -> the largest |w| of each block, float32 (…, in / block); NaN if there is one."""
    blocks = weight.reshape(-1, block)
    shape = (*weight.shape[:-1], weight.shape[-1] // block)
    if weight.device.type != "cpu":
        return blocks.abs().amax(-1).view(shape).float()
    found = torch.empty(len(blocks), dtype=_BITS[weight.itemsize])
    for part in pieces(weight.numel(), block, weight.device):
        bits = blocks[part].abs().view(found.dtype)
        if block >= 64:
            torch.amax(bits, -1, out=found[part])
        else:  # reductions of so few are slow: the largest of every `block` in a row, and every block-th of those
            bits = bits.view(-1)
            for step in _halves(block):
                bits = torch.maximum(bits[:-step], bits[step:])
            found[part] = bits[::block]
    return found.view(weight.dtype).view(shape).float()


def _halves(block: int) -> Iterator[int]:
    while block > 1:
        block //= 2
        yield block


def count_below(x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How many of the ascending float32 bounds are below x, also float32; all of them for NaN. uint8 of x's shape."""
    if x.device.type != "cpu":
        return torch.bucketize(x, bounds.to(x.device), out_int32=True).to(torch.uint8)
    values = x.numpy()
    count, at_or_above = np.zeros(values.shape, np.uint8), np.empty(values.shape, np.bool_)
    for bound in bounds.numpy():
        np.less_equal(values, bound, out=at_or_above)
        np.add(count, at_or_above.view(np.uint8), out=count)
    return torch.from_numpy(np.subtract(np.uint8(len(bounds)), count, out=count))


def is_below(x: torch.Tensor, bound: float) -> torch.Tensor:
    """1 where float32 x < bound, else 0 (also for NaN); uint8 of x's shape."""
    if x.device.type != "cpu":
        return (x < bound).to(torch.uint8)
    return torch.from_numpy(np.less(x.numpy(), np.float32(bound)).view(np.uint8))
