"""Keys and values in places that never move, for rows of different lengths: what a CUDA graph can read and write.

Token p of a row lies in slot p of a full layer, and in slot p mod (window - 1 + canvas) of a sliding one, so that a
canvas overwrites only what no later token looks back on:

    sliding, window 4, canvas 3      slot    0 1 2 3 4 5
    5 tokens committed, canvas 5 6 7         6 7 2 3 4 5      the canvas sees 2 3 4 and itself: every slot
    2 tokens committed, canvas 2 3 4         0 1 2 3 4 .      … the first 5 slots

A canvas thus sees the first min(length + canvas, slots) slots of either kind of layer, in whatever order they lie:
keys were turned by their positions before. Lengths are numbers on the device. Whoever writes and does not count on
leaves the committed tokens as they were: the decoder at every step, until the encoder writes the block in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.runtime.attention import encoder_mask
from dgq.runtime.config import ModelConfig


class Slots:
    """The key-value cache of `rows` rows of `capacity` tokens each, canvas included. lengths int64 (rows,): committed
    tokens of each; buffers: of a layer (2, rows, kv heads, slots, head_dim)."""

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.config, self.capacity, self.rows = config, capacity, rows
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        ring = min(capacity, config.window - 1 + config.canvas)
        self.sizes = {True: ring, False: capacity}  # by is_sliding
        # zeros, because a masked slot's value is multiplied by 0
        self.buffers = [
            torch.zeros(2, rows, one.kv_heads, self.sizes[one.is_sliding], one.head_dim, device=device, dtype=dtype)
            for one in config.layers
        ]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def keep(self, rows: Tensor) -> None:
        """Move `rows`, int64 and rising, to the front; the places behind are free."""
        for buffer in self.buffers:
            for to, row in enumerate(rows.tolist()):
                if to != row:
                    buffer[:, to].copy_(buffer[:, row])
        self.lengths[: len(rows)] = self.lengths[rows]


class Canvas:
    """How layers see the slots of the first `rows` rows while `new` tokens behind each row's are worked on."""

    stacked = True  # rows are computed as though each were alone, as far as the device allows

    def __init__(self, slots: Slots, rows: int, new: int) -> None:
        self._slots, self._rows, self._new = slots, rows, new
        self._lengths = slots.lengths[:rows]
        self._row = torch.arange(rows, device=self._lengths.device)[:, None]
        self._after = torch.arange(new, device=self._lengths.device)

    def positions(self) -> Tensor:
        """(rows, new) int64."""
        return self._lengths[:, None] + self._after

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (rows, kv heads, new, head_dim) in their slots; all slots, of which masks say more."""
        buffer = self._slots.buffers[layer][:, : self._rows]
        at = self.positions() % buffer.shape[3]
        buffer[0][self._row, :, at] = keys.transpose(1, 2)
        buffer[1][self._row, :, at] = values.transpose(1, 2)
        return buffer[0], buffer[1]

    def visible(self, sliding: bool) -> Tensor:
        """(rows,) int64: how many slots, the first ones, hold what a canvas sees."""
        return (self._lengths + self._new).clamp(max=self._slots.sizes[sliding])

    def decoder_mask(self, sliding: bool) -> Tensor:
        """bool (rows, 1, 1, slots)."""
        slot = torch.arange(self._slots.sizes[sliding], device=self._lengths.device)
        return (slot < self.visible(sliding)[:, None])[:, None, None]

    def encoder_mask(self, sliding: bool) -> Tensor:
        """bool (rows, 1, new, slots): causal, and on sliding layers the window."""
        size = self._slots.sizes[sliding]
        slot = torch.arange(size, device=self._lengths.device)
        last = self._lengths[:, None] + self._new - 1
        held = (last - (last - slot) % size)[:, None]  # the position that a slot holds
        query = self.positions()[:, :, None]
        seen = (held >= 0) & (held <= query)
        if sliding:
            seen &= query - held < self._slots.config.window
        return seen[:, None]


class Prompt:
    """How layers see one row's slots while `new` tokens of its prompt are encoded, `length` being there already."""

    stacked = False

    def __init__(self, slots: Slots, row: int, length: int, new: int) -> None:
        self._slots, self._row, self._length, self._new = slots, row, length, new

    def positions(self) -> Tensor:
        """(1, new) int64."""
        return torch.arange(self._length, self._length + self._new, device=self._slots.lengths.device)[None]

    def held(self, sliding: bool) -> int:
        """How many of the tokens before are looked at."""
        return min(self._length, self._slots.config.window - 1) if sliding else self._length

    def mask(self, sliding: bool) -> Tensor:
        """bool (1, 1, new, held + new)."""
        window = self._slots.config.window if sliding else None
        device = self._slots.lengths.device
        return encoder_mask(self._length, self._new, self.held(sliding), window, None, device)

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (1, kv heads, new, head_dim) in their slots; those held, in order, and the new ones."""
        buffer, sliding = self._slots.buffers[layer][:, self._row], self._slots.config.layers[layer].is_sliding
        size, end = buffer.shape[2], self._length + self._new
        if end <= size:
            buffer[0, :, self._length : end], buffer[1, :, self._length : end] = keys[0], values[0]
            first = self._length - self.held(sliding)
            return buffer[0, None, :, first:end], buffer[1, None, :, first:end]
        device = buffer.device
        before = torch.arange(self._length - self.held(sliding), self._length, device=device) % size
        new = torch.cat((keys, values))
        seen = torch.cat((buffer[:, :, before], new), dim=2)
        last = min(self._new, size)
        buffer[:, :, torch.arange(end - last, end, device=device) % size] = new[:, :, self._new - last :]
        return seen[:1], seen[1:]
