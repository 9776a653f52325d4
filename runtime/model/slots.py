"""Keys and values in places that never move, for rows of different lengths: what a CUDA graph can read and write.

Token p of a row lies in slot p of a full layer, and in slot p mod size of a sliding one, whose size is window - 1 +
canvas or a little more, so that a canvas overwrites only what no later token looks back on:

    sliding, window 4, canvas 3      slot    0 1 2 3 4 5
    5 tokens committed, canvas 5 6 7         6 7 2 3 4 5      the canvas sees 2 3 4 and itself
    2 tokens committed, canvas 2 3 4         0 1 2 3 4 .      it sees everything that there is

In which order tokens lie does not matter, since keys were turned by their positions before. Lengths are numbers on the
device. Whoever writes and does not count on leaves the committed tokens as they were: the decoder at every step, until
the encoder writes the block in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgq.runtime.model.attention import encoder_mask
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.pictured import Pictures

PAGE = 64  # slots are allocated in such pieces


class Slots:
    """The key-value cache of `rows` rows of at least `capacity` tokens each, canvas included. lengths int32 (rows,):
    committed tokens of each; buffers: of a layer (2, rows, kv heads, slots, head_dim)."""

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.config, self.rows = config, rows
        self.capacity = whole(capacity)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        ring = min(self.capacity, whole(config.window - 1 + config.canvas))
        self.sizes = {True: ring, False: self.capacity}  # by is_sliding
        # zeros, because a masked slot's value is multiplied by 0
        self.buffers = [
            torch.zeros(2, rows, one.kv_heads, self.sizes[one.is_sliding], one.head_dim, device=device, dtype=dtype)
            for one in config.layers
        ]

        self.first = 0  # of a conversation's row: the first token that rings have, a canvas being written behind all

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, length: int) -> None:
        """Row 0, the only one, has so many tokens now."""
        self.lengths.fill_(length)
        self.reach(length)

    def reach(self, length: int) -> None:
        """It has so many, and a canvas may be written behind them: what that takes from the rings."""
        self.first = max(self.first, length + self.config.canvas - self.sizes[True])

    def windows(self, length: int) -> list[Tensor]:
        """Of that row: copies of its sliding layers' windows, (2, kv heads, held, head_dim) each."""
        at = torch.arange(max(0, length - self.config.window + 1), length, device=self.lengths.device)
        return [buffer[:, 0, :, at % self.sizes[True]] for buffer in self._rings()]

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        """Forget what comes after `length` tokens of that row. windows: of that length, where rings don't hold it."""
        first = min(self.first, length)
        if windows:
            first = length - windows[0].shape[2]
            at = torch.arange(first, length, device=self.lengths.device) % self.sizes[True]
            for buffer, window in zip(self._rings(), windows, strict=True):
                buffer[:, 0, :, at] = window
        self.first = first
        self.holds(length)

    def take(self, other: Slots, length: int) -> None:
        """What is in slots of one row that are no larger than these, its rings' tokens up to `length`."""
        at = torch.arange(other.first, max(other.first, length), device=self.lengths.device)
        for one, mine, its in zip(self.config.layers, self.buffers, other.buffers, strict=True):
            if one.is_sliding:
                mine[:, 0, :, at % mine.shape[3]] = its[:, 0, :, at % its.shape[3]]
            else:
                mine[:, :, :, : its.shape[3]] = its
        self.first = other.first
        self.holds(length)

    def _rings(self) -> list[Tensor]:
        return [buffer for one, buffer in zip(self.config.layers, self.buffers, strict=True) if one.is_sliding]

    def keep(self, rows: Tensor) -> None:
        """Move `rows`, int64 and rising, to the front; the places behind are free."""
        for to, row in enumerate(rows.tolist()):
            if to != row:
                for buffer in self.buffers:
                    buffer[:, to].copy_(buffer[:, row])
        self.lengths[: len(rows)] = self.lengths[rows]


def whole(tokens: int) -> int:
    """So many slots, and those that fill up a page."""
    return -(-tokens // PAGE) * PAGE


class Canvas:
    """How layers see the slots of the first `rows` rows while `new` tokens behind each row's are worked on."""

    stacked = True  # rows are computed as though each were alone, as far as the device allows

    def __init__(self, slots: Slots, rows: int, new: int) -> None:
        self._slots, self._rows, self._new = slots, rows, new
        self.lengths = slots.lengths[:rows]
        self._row = torch.arange(rows, device=self.lengths.device)[:, None]
        self._after = torch.arange(new, device=self.lengths.device)

    def positions(self) -> Tensor:
        """(rows, new) int64."""
        return self.lengths[:, None] + self._after

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (rows, kv heads, new, head_dim) in their slots; all slots, of which masks say more."""
        room = self.room(layer)
        at = self.positions() % room[0].shape[2]
        for buffer, new in zip(room, (keys, values), strict=False):
            buffer[self._row, :, at] = new.transpose(1, 2)
        return room[0], room[1]

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots for keys and values (rows, kv heads, slots, head_dim), and how many tokens are in each row's, int32."""
        buffer = self._slots.buffers[layer][:, : self._rows]
        return buffer[0], buffer[1], self.lengths

    def close(self, layer: int) -> None:
        """After looking at what was put in the room."""

    def decoder_mask(self, sliding: bool) -> Tensor:
        """bool (rows, 1, 1, slots): what a canvas sees."""
        held, length = self._held(sliding), self.lengths[:, None]
        seen = held >= 0
        if sliding:
            seen &= length - held < self._slots.config.window
        return seen[:, None, None]

    def encoder_mask(self, sliding: bool) -> Tensor:
        """bool (rows, 1, new, slots): causal, and on sliding layers the window."""
        held, query = self._held(sliding)[:, None], self.positions()[:, :, None]
        seen = (held >= 0) & (held <= query)
        if sliding:
            seen &= query - held < self._slots.config.window
        return seen[:, None]

    def _held(self, sliding: bool) -> Tensor:
        """(rows, slots): the position that each slot holds, once the new tokens are there; below 0: none."""
        size = self._slots.sizes[sliding]
        last = self.lengths[:, None] + self._new - 1
        return last - (last - torch.arange(size, device=last.device)) % size


class Prompt:
    """How layers see one row's slots while `new` tokens of its prompt are encoded, `length` being there already.

    A ring that the new tokens would overwrite too much of is copied for a layer's attention: room() to close().
    """

    stacked = False

    def __init__(self, slots: Slots, row: int, length: int, new: int) -> None:
        self._slots, self._row, self._length, self._new = slots, row, length, new
        device = slots.lengths.device
        self.lengths = torch.full((1,), length, dtype=torch.int32, device=device)
        self._held = min(length, slots.config.window - 1)  # by a sliding layer, of the tokens before
        self._held_too = torch.full((1,), self._held, dtype=torch.int32, device=device)
        self._copies: dict[tuple[int, ...], Tensor] = {}  # by shape

    def positions(self) -> Tensor:
        """(1, new) int64."""
        return torch.arange(self._length, self._length + self._new, device=self.lengths.device)[None]

    def mask(self, sliding: bool, images: Pictures | None = None) -> Tensor:
        """bool (1, 1, new, held + new). images: among the new tokens."""
        held, window = (self._held, self._slots.config.window) if sliding else (self._length, None)
        return encoder_mask(self._length, self._new, held, window, None, self.lengths.device, images)

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (1, kv heads, new, head_dim) in their slots; those held, in order, and the new ones."""
        k, v, length = self.room(layer)
        at = self._held if length is self._held_too else self._length
        end = at + self._new
        k[:, :, at:end], v[:, :, at:end] = keys, values
        first = at - self._held if self._slots.config.layers[layer].is_sliding else 0
        self.close(layer)
        return k[:, :, first:end], v[:, :, first:end]

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Canvas.room()."""
        buffer = self._slots.buffers[layer][:, self._row : self._row + 1]
        if not self._wraps(layer):
            return buffer[0], buffer[1], self.lengths
        copy = self._copy(layer)
        at = torch.arange(self._length - self._held, self._length, device=buffer.device) % buffer.shape[3]
        copy[:, :, :, : self._held] = buffer[:, :, :, at]
        return copy[0], copy[1], self._held_too

    def close(self, layer: int) -> None:
        """Put the new tokens into the ring, where they were put in a copy."""
        if not self._wraps(layer):
            return
        buffer = self._slots.buffers[layer][:, self._row : self._row + 1]
        last, end = min(self._new, buffer.shape[3]), self._held + self._new
        at = torch.arange(self._length + self._new - last, self._length + self._new, device=buffer.device)
        buffer[:, :, :, at % buffer.shape[3]] = self._copy(layer)[:, :, :, end - last : end]

    def _wraps(self, layer: int) -> bool:
        return self._length + self._new > self._slots.buffers[layer].shape[3]

    def _copy(self, layer: int) -> Tensor:
        shape = self._slots.config.layers[layer]
        size = 2, 1, shape.kv_heads, whole(self._held + self._new), shape.head_dim
        if size not in self._copies:
            self._copies[size] = self._slots.buffers[layer].new_zeros(size)
        return self._copies[size]
