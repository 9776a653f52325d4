"""The processes of torchrun: how many there are, which one this is, and what they tell each other.

Without torchrun there is one process, of rank 0, and nothing here waits or sends. Work is dealt out by number: a
process takes the units rank, rank + world, rank + 2 world, …
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, and leave them at the end. With device "cuda" each process
    computes on the GPU of its place on the machine. Processes exchange data over gloo, on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("gloo")
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sent(value: T, sender: int = 0) -> T:
    """What the process of rank `sender` gives as the value, in every process."""
    if not dist.is_initialized():
        return value
    parcel = [value]
    dist.broadcast_object_list(parcel, src=sender)
    return parcel[0]


def add_up(value: Tensor, largest: bool = False) -> None:
    """In place: the sum over the processes of a tensor on the CPU, or element by element the largest."""
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
