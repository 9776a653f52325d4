"""The choice of an option for every part: the least loss within a number of bytes.

    beginnings     (bytes, loss) of the first k parts, those that no other beats in both, sorted by bytes
    next part      every beginning x every option, of which the same is kept

The bytes that the rest takes at least are left free. In the end the best beginning is followed back part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

STATES = 1 << 15  # beginnings that are kept


class Option(NamedTuple):
    """A part in a scheme: the bytes it takes, and the KL in nats a position that it loses."""

    scheme: str
    bytes: int
    kl: float


def choose(options: Sequence[Sequence[Option]], room: int) -> list[int]:
    """The number of each part's option, so that together they lose least within `room` bytes.

    `room` must hold the smallest options. The choice is exact while no more than STATES beginnings are worth going on
    with; beyond that, only the best one of those that are alike in bytes is kept.
    """
    ends = [sum(min(option.bytes for option in each) for each in options[i + 1 :]) for i in range(len(options))]
    size, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail = []
    for each, end in zip(options, ends, strict=True):
        sizes = (size[:, None] + torch.tensor([option.bytes for option in each])).flatten()
        losses = (loss[:, None] + torch.tensor([option.kl for option in each], dtype=torch.float64)).flatten()
        order = losses.argsort(stable=True)
        order = order[sizes[order].argsort(stable=True)]
        order = order[sizes[order] <= room - end]
        best = losses[order].cummin(0).values
        order = order[torch.cat((torch.ones(1, dtype=torch.bool), losses[order][1:] < best[:-1]))]
        if len(order) > STATES:
            cell = sizes[order] * STATES // room
            order = order[torch.cat((cell[1:] != cell[:-1], torch.ones(1, dtype=torch.bool)))]
        trail.append((order // len(each), order % len(each)))
        size, loss = sizes[order], losses[order]
    picked, at = [], len(size) - 1
    for before, option in reversed(trail):
        picked.append(int(option[at]))
        at = int(before[at])
    return picked[::-1]
