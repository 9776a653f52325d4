"""What NVFP4 and NF4 share: pieces to work on, the largest weight of a block, sorting scaled weights into intervals.

A CPU works on pieces of 2^18 weights, whose temporaries stay in a core's second cache, by operations that are
vectorised there: the bits of an absolute value are ordered as integers, and numpy compares sixteen floats at a time
into bytes (torch compares them one by one, and its bucketize searches for each). These are comparisons and copies,
nothing is rounded: the results are those of amax and bucketize, which do the work on other devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_PIECE = 1 << 18
_BITS = {2: torch.int16, 4: torch.int32}


def pieces(numel: int, block: int, device: torch.device) -> Iterator[slice]:
    """Ranges of blocks to work on at once; elsewhere than on a CPU that is all of them."""
    blocks = numel // block
    step = max(1, _PIECE // block if device.type == "cpu" else blocks)
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def largest(weight: torch.Tensor, block: int) -> torch.Tensor:
    """weight (…, in) of 16 or 32 bits -> the largest |w| of each block, float32 (…, in / block); NaN if it has one."""
    blocks = weight.detach().reshape(-1, block)
    shape = (*weight.shape[:-1], weight.shape[-1] // block)
    if weight.device.type != "cpu":
        return blocks.abs().amax(-1).float().view(shape)
    amax_bits = torch.empty(len(blocks), dtype=_BITS[weight.itemsize])
    for part in pieces(weight.numel(), block, weight.device):
        bits = blocks[part].abs().view(amax_bits.dtype)
        if block == 16:  # too few for a fast reduction: the largest of every 16 in a row, then each 16th of those
            bits = bits.flatten()
            for step in (8, 4, 2, 1):
                bits = torch.maximum(bits[:-step], bits[step:])
            amax_bits[part] = bits[::16]
        else:
            torch.amax(bits, -1, out=amax_bits[part])
    return amax_bits.view(weight.dtype).float().view(shape)


def count_below(x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How many of the ascending float32 bounds are below x, float32 too; all of them for NaN. uint8 of x's shape."""
    if x.device.type != "cpu":
        return torch.bucketize(x, bounds.to(x.device), out_int32=True).to(torch.uint8)
    values = x.numpy()
    count, bits = np.zeros(values.shape, np.uint8), np.empty(values.shape, np.bool_)
    for bound in bounds.numpy():
        np.less_equal(values, bound, out=bits)  # the opposite of what is asked: NaN is less than nothing
        np.add(count, bits.view(np.uint8), out=count)
    return torch.from_numpy(np.subtract(np.uint8(len(bounds)), count, out=count))


def is_below(x: torch.Tensor, bound: float) -> torch.Tensor:
    """1 where float32 x < bound, else 0, also for NaN; uint8 of x's shape."""
    if x.device.type != "cpu":
        return (x < bound).to(torch.uint8)
    return torch.from_numpy(np.less(x.numpy(), np.float32(bound)).view(np.uint8))
