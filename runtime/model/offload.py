"""Routed experts that do not fit the GPU wait in pinned host memory; each layer's are copied into one of two places on
the GPU before the layer needs them.

    copies   │ layer 5 ──> A │ layer 8 ──> B │        │ layer 11 ──> A │ …        a stream of its own
    layers   0 1 2 3 4 5(A) 6 7 8(B) …                 └ as soon as layer 5 has used A

A pass ends when the first two layers are back in their places, so that every pass begins in the same state, whether in
a graph or not. After a pass that an error or Ctrl-C broke off, the next one puts them there before it begins. The
layers that stay on the GPU lie evenly between the others (placement.py), so that the sum of the copies is what limits a
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgq.runtime.kernels.repack import Tiles
from dgq.runtime.model.placement import PLACES, copied

_ALIGNED = 256  # bytes

Pair = tuple[Tiles, Tiles]


@dataclass(frozen=True)
class Host:
    """A layer's gate_up and down in one uint8 tensor, `flat`, their parts one behind the other. like: tiles of the same
    shapes and dtypes, on the meta device."""

    flat: Tensor
    like: Pair

    @classmethod
    def of(cls, pair: Pair) -> Host:
        """A copy of a layer's tiles; in pinned memory if they are on a GPU."""
        size = sum(_whole(part.nbytes) for tiles in pair for part in _parts(tiles))
        flat = torch.empty(size, dtype=torch.uint8, pin_memory=pair[0].codes.is_cuda)
        host = cls(flat, tuple(_meta(tiles) for tiles in pair))  # type: ignore[arg-type]
        for to, source in zip(host.inside(flat), pair, strict=True):
            for one, other in zip(_parts(to), _parts(source), strict=True):
                one.copy_(other)
        return host

    def inside(self, place: Tensor) -> Pair:
        """Views of the weights in `place`, uint8, which holds a copy of flat."""
        at, pair = 0, []
        for tiles in self.like:
            parts = []
            for part in _parts(tiles):
                parts.append(place[at : at + part.nbytes].view(part.dtype).view(part.shape))
                at += _whole(part.nbytes)
            pair.append(Tiles(tiles.form, tiles.shape, *parts))
        return pair[0], pair[1]


class Offload:
    """Brings each waiting layer's experts to the GPU in time. hosts: the waiting layers, rising; device: of the
    places."""

    def __init__(self, hosts: dict[int, Host], device: torch.device) -> None:
        self._hosts: Sequence[Host] = list(hosts.values())
        size = max(len(host.flat) for host in self._hosts)
        self._places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in hosts][:PLACES]
        self._numbers = {layer: number for number, layer in enumerate(hosts)}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._next = 0  # the waiting layer that a pass reaches next, counted among the waiting ones
        self._fill()

    def _fill(self) -> None:
        """Put the first two layers into their places."""
        self._arrived.clear()
        for number in range(len(self._places)):
            self._copy(number)
        if self._stream is not None:
            self._stream.synchronize()
        self._arrived.clear()

    def __contains__(self, layer: int) -> bool:
        return layer in self._numbers

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU: those of the places."""
        return sum(place.nbytes for place in self._places)

    @property
    def copied(self) -> int:
        """Bytes that every pass copies."""
        return copied([len(host.flat) for host in self._hosts])

    def weights(self, layer: int) -> Pair:
        """The layer's weights, which are there between arrive() and leave()."""
        number = self._numbers[layer]
        return self._hosts[number].inside(self._places[number % PLACES])

    def arrive(self, layer: int) -> None:
        """Make the current stream wait until weights(layer) have been copied."""
        number = self._numbers[layer]
        if number != self._next:  # the pass before was broken off
            self._fill()
        self._next = number + 1
        event = self._arrived.pop(number, None)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def leave(self, layer: int) -> None:
        """Start the next copy into the layer's place. After the last waiting layer, make the current stream wait until
        everything is as it was before the first."""
        number, count = self._numbers[layer], len(self._hosts)
        if number + PLACES < count:
            self._copy(number + PLACES)
        elif count > PLACES:  # the last layer that uses a place brings back the place's first layer
            self._copy(number % PLACES)
        if number == count - 1 and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._arrived.clear()
        self._next = (number + 1) % count

    def _copy(self, number: int) -> None:
        """Copy a waiting layer into its place, as soon as the current stream has done its work so far."""
        host, place = self._hosts[number], self._places[number % PLACES]
        if self._stream is None:
            place[: len(host.flat)].copy_(host.flat)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            place[: len(host.flat)].copy_(host.flat, non_blocking=True)
        self._arrived[number] = torch.cuda.Event()
        self._arrived[number].record(self._stream)


def _parts(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tiles.codes, tiles.scales, tiles.high, tiles.factors


def _meta(tiles: Tiles) -> Tiles:
    return Tiles(tiles.form, tiles.shape, *(part.to("meta") for part in _parts(tiles)))


def _whole(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
