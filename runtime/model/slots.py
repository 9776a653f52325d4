"""A key-value cache in memory that never moves, for rows of different lengths: CUDA graphs can read and write it.

Token p of a row lies in slot p of a full layer. A sliding layer is a ring: token p lies in slot p mod size, and size is
at least window - 1 + canvas, so that a canvas overwrites only tokens that no later token looks back on:

    sliding, window 4, canvas 3      slot    0 1 2 3 4 5
    5 tokens committed, canvas 5 6 7         6 7 2 3 4 5      the canvas sees 2 3 4 and itself
    2 tokens committed, canvas 2 3 4         0 1 2 3 4 .      the canvas sees every token that is there

The order of tokens in a ring does not matter to attention, because RoPE turned each key by its position before it was
written. Lengths are numbers on the device. Tokens that are written behind a row's length without raising it are not
committed: the decoder writes its canvas there at every step, and the encoder then writes the finished block over it.

Layers see the slots through a view: CanvasView while canvases are worked on, PromptView while a prompt is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgq.runtime.model.attention import encoder_mask
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.pictured import Pictures

PAGE = 64  # the number of slots of a layer is a multiple of this


class Slots:
    """The keys and values of `rows` rows of at least `capacity` tokens each, canvas included.

    lengths: int32 (rows,), the committed tokens of each row. buffers: for each layer (2, rows, kv heads, slots,
    head_dim). sizes: the slots of a sliding layer (True) and of a full one (False).

    Conversations use slots of a single row (holds, reach, windows, rewind, take). For them, `first` is the first token
    that the rings still have when a canvas is written behind all tokens.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.config, self.rows = config, rows
        self.capacity = whole(capacity)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        ring = min(self.capacity, whole(config.window - 1 + config.canvas))
        self.sizes = {True: ring, False: self.capacity}
        # Zeros, because a masked slot's value is multiplied by 0, which a NaN would survive.
        self.buffers = [
            torch.zeros(2, rows, one.kv_heads, self.sizes[one.is_sliding], one.head_dim, device=device, dtype=dtype)
            for one in config.layers
        ]
        self.first = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, length: int) -> None:
        """Set the length of the only row."""
        self.lengths.fill_(length)
        self.reach(length)

    def reach(self, length: int) -> None:
        """Note that the row has `length` tokens: a canvas written behind them overwrites the oldest in the rings."""
        self.first = max(self.first, length + self.config.canvas - self.sizes[True])

    def windows(self, length: int) -> list[Tensor]:
        """Copies of the sliding layers' last window before `length`, each (2, kv heads, tokens, head_dim)."""
        at = torch.arange(max(0, length - self.config.window + 1), length, device=self.lengths.device)
        return [buffer[:, 0, :, at % self.sizes[True]] for buffer in self._rings()]

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        """Forget the row's tokens from `length` on. windows: what windows(length) returned earlier, where the rings no
        longer hold that window."""
        first = min(self.first, length)
        if windows:
            first = length - windows[0].shape[2]
            at = torch.arange(first, length, device=self.lengths.device) % self.sizes[True]
            for buffer, window in zip(self._rings(), windows, strict=True):
                buffer[:, 0, :, at] = window
        self.first = first
        self.holds(length)

    def take(self, other: Slots, length: int) -> None:
        """Copy the row of other slots, which are not larger than these. length: how many tokens the row has."""
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
        """Move the rows `rows`, int64 and rising, to the front; the places behind them are free."""
        for to, row in enumerate(rows.tolist()):
            if to != row:
                for buffer in self.buffers:
                    buffer[:, to].copy_(buffer[:, row])
        self.lengths[: len(rows)] = self.lengths[rows]


def whole(tokens: int) -> int:
    """The number of slots for so many tokens: rounded up to whole pages."""
    return -(-tokens // PAGE) * PAGE


class CanvasView:
    """The slots of the first `rows` rows while `new` tokens behind each row's length are worked on."""

    stacked = True  # each row is computed as though it were alone, as far as the device allows

    def __init__(self, slots: Slots, rows: int, new: int) -> None:
        self._slots, self._rows, self._new = slots, rows, new
        self.span = 0, rows  # the first row, and how many
        self.lengths = slots.lengths[:rows]
        self._row = torch.arange(rows, device=self.lengths.device)[:, None]
        self._after = torch.arange(new, device=self.lengths.device)

    def positions(self) -> Tensor:
        """The new tokens' positions, (rows, new) int64."""
        return self.lengths[:, None] + self._after

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (rows, kv heads, new, head_dim) in their slots. Returns all slots of the layer; masks say
        which of them a token sees."""
        room = self.room(layer)
        at = self.positions() % room[0].shape[2]
        for buffer, new in zip(room, (keys, values), strict=False):
            buffer[self._row, :, at] = new.transpose(1, 2)
        return room[0], room[1]

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's slots of keys and of values, both (rows, kv heads, slots, head_dim), and each row's length,
        int32: where kernels put the new tokens."""
        buffer = self._slots.buffers[layer][:, : self._rows]
        return buffer[0], buffer[1], self.lengths

    def close(self, layer: int) -> None:
        """End what room() began: nothing is to be done here."""

    def decoder_mask(self, sliding: bool) -> Tensor:
        """The slots that a canvas sees, bool (rows, 1, 1, slots)."""
        held, length = self._held(sliding), self.lengths[:, None]
        seen = held >= 0
        if sliding:
            seen &= length - held < self._slots.config.window
        return seen[:, None, None]

    def encoder_mask(self, sliding: bool) -> Tensor:
        """The slots that each new token sees, bool (rows, 1, new, slots): causal, and on sliding layers the window."""
        held, query = self._held(sliding)[:, None], self.positions()[:, :, None]
        seen = (held >= 0) & (held <= query)
        if sliding:
            seen &= query - held < self._slots.config.window
        return seen[:, None]

    def _held(self, sliding: bool) -> Tensor:
        """The position that each slot holds once the new tokens are written, (rows, slots); below 0: no token."""
        size = self._slots.sizes[sliding]
        last = self.lengths[:, None] + self._new - 1
        return last - (last - torch.arange(size, device=last.device)) % size


class PromptView:
    """The slots of one row while `new` tokens of its prompt are encoded behind `length` tokens.

    In a ring, the new tokens may overwrite tokens that the first of them still see. A layer's attention then works on
    a copy, in order: room() makes it, and close() puts its new tokens into the ring.
    """

    stacked = False

    def __init__(self, slots: Slots, row: int, length: int, new: int) -> None:
        self._slots, self._row, self._length, self._new = slots, row, length, new
        self.span = row, 1
        device = slots.lengths.device
        self.lengths = torch.full((1,), length, dtype=torch.int32, device=device)
        self._held = min(length, slots.config.window - 1)  # earlier tokens that a sliding layer's new ones see
        self._held_length = torch.full((1,), self._held, dtype=torch.int32, device=device)
        self._copies: dict[tuple[int, ...], Tensor] = {}  # by shape, shared by the layers of that shape

    def positions(self) -> Tensor:
        """The new tokens' positions, (1, new) int64."""
        return torch.arange(self._length, self._length + self._new, device=self.lengths.device)[None]

    def mask(self, sliding: bool, images: Pictures | None = None) -> Tensor:
        """The keys that each new token sees, bool (1, 1, new, held + new). images: those among the new tokens."""
        held, window = (self._held, self._slots.config.window) if sliding else (self._length, None)
        return encoder_mask(self._length, self._new, held, window, None, self.lengths.device, images)

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (1, kv heads, new, head_dim) in their slots. Returns the held ones and the new ones, in
        order: what mask() is about."""
        k, v, length = self.room(layer)
        at = self._held if length is self._held_length else self._length
        end = at + self._new
        k[:, :, at:end], v[:, :, at:end] = keys, values
        first = at - self._held if self._slots.config.layers[layer].is_sliding else 0
        self.close(layer)
        return k[:, :, first:end], v[:, :, first:end]

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """See CanvasView.room(); of a ring that would be overwritten, the copy."""
        buffer = self._slots.buffers[layer][:, self._row : self._row + 1]
        if not self._wraps(layer):
            return buffer[0], buffer[1], self.lengths
        copy = self._copy(layer)
        at = torch.arange(self._length - self._held, self._length, device=buffer.device) % buffer.shape[3]
        copy[:, :, :, : self._held] = buffer[:, :, :, at]
        return copy[0], copy[1], self._held_length

    def close(self, layer: int) -> None:
        """Put the new tokens into the ring if attention worked on a copy of it."""
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
