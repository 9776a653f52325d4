"""The keys and values of committed tokens, with room behind them for the tokens that are being worked on.

One layer's buffer (rows, kv heads, capacity, head_dim):

    |<-------- held -------->|<---- new ---->|  slack  |
     committed by the encoder  write() puts here; commit() makes it held, the next write() overwrites it

The encoder writes a block and commits it. The decoder writes its canvas into the same place at every step and never
commits it, so that no step copies the cache. A full layer holds every token and doubles its buffer when it is full. A
sliding layer keeps the last window-1 tokens, which are all that a later token may look back on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgq.runtime.shape.config import ModelConfig


class Cache:
    """The key-value cache of one batch.

    length: committed tokens, padding included. real: bool (rows, length), False on padding; None as long as there is no
    padding. A row of a stacked cache has a gap on its left instead, which holds nothing and which no position counts.
    """

    def __init__(
        self, config: ModelConfig, rows: int, device: torch.device | str, dtype: torch.dtype, capacity: int = 0
    ) -> None:
        """capacity: tokens (prompt, answer and a canvas) that buffers are made for, so that they need not grow."""
        self.length = 0
        self.real: Tensor | None = None
        self.rows = rows
        self._device = torch.device(device)
        self._gaps: list[int] = []  # of each row, in tokens; empty unless the cache is stacked
        self._keep = [config.window - 1 if layer.is_sliding else None for layer in config.layers]
        self._held = [0 for _ in config.layers]
        room = [max(1, capacity if keep is None else min(capacity, keep + config.canvas)) for keep in self._keep]
        self._buffers = [
            torch.empty(2, rows, layer.kv_heads, tokens, layer.head_dim, device=device, dtype=dtype)
            for layer, tokens in zip(config.layers, room, strict=True)
        ]

    def stack(self, caches: Sequence[Cache]) -> None:
        """Fill this new cache with caches of one row each, their last tokens aligned.

        row 0     t t t t t t|      every row is what it would be alone: the same positions, the same keys
        row 1     . . t t t t|      a gap holds nothing, and attention starts behind it
        """
        self.length = max(cache.length for cache in caches)
        self._gaps = [self.length - cache.length for cache in caches]
        for layer, buffer in enumerate(self._buffers):
            end = self._held[layer] = max(cache.held(layer) for cache in caches)
            for row, cache in enumerate(caches):
                held = cache.held(layer)
                buffer[:, row, :, end - held : end] = cache._buffers[layer][:, 0, :, :held]

    @property
    def stacked(self) -> bool:
        """Whether every row is computed as though it were alone, to the bit where the device allows it."""
        return bool(self._gaps)

    def as_stacked(self, stacked: bool) -> None:
        """Set whether a cache of one row is stacked from now on."""
        self._gaps = [0] if stacked else []

    def positions(self, new: int) -> Tensor:
        """The positions of the next tokens, (rows or 1, new) int64."""
        after = torch.arange(self.length, self.length + new, device=self._device).unsqueeze(0)
        return after - torch.tensor(self._gaps, device=self._device).unsqueeze(-1) if any(self._gaps) else after

    def starts(self, layer: int) -> list[int] | None:
        """How many of the tokens that a layer holds lie in each row's gap; None if none do in any row."""
        gone = self.length - self._held[layer]
        starts = [max(0, gap - gone) for gap in self._gaps]
        return starts if any(starts) else None

    def held(self, layer: int) -> int:
        """How many committed tokens a layer still has; they are the last ones."""
        return self._held[layer]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (rows, kv heads, new, head_dim) behind the held ones. Returns views of all of them, held
        + new long."""
        held = self._held[layer]
        end = held + keys.shape[2]
        buffer = self._buffers[layer]
        if end > buffer.shape[3]:
            shape = list(buffer.shape)
            shape[3] = end if self._keep[layer] is not None else max(end, 2 * shape[3])
            grown = buffer.new_empty(shape)
            grown[:, :, :, :held] = buffer[:, :, :, :held]
            self._buffers[layer] = buffer = grown
        buffer[0, :, :, held:end] = keys
        buffer[1, :, :, held:end] = values
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def seen(self, new: int, padding: Tensor | None) -> Tensor | None:
        """`real` for `new` more tokens. padding: bool (rows, new), True on padding; None: there is none."""
        if self.real is None and padding is None:
            return None
        old = self.real
        if old is None:
            old = torch.ones(self.rows, self.length, dtype=torch.bool, device=self._device)
        if padding is None:
            padding = torch.zeros(self.rows, new, dtype=torch.bool, device=self._device)
        return torch.cat((old, ~padding), dim=1)

    def commit(self, new: int, real: Tensor | None) -> None:
        """Make the `new` tokens that were written to every layer part of the cache. real: what seen() returned."""
        for layer, keep in enumerate(self._keep):
            total = self._held[layer] + new
            if keep is not None and total > keep:
                buffer = self._buffers[layer]
                buffer[:, :, :, :keep] = buffer[:, :, :, total - keep : total].clone()
                total = keep
            self._held[layer] = total
        self.length += new
        self.real = real

    def keep(self, rows: Tensor) -> None:
        """Drop the rows of the batch that are not in `rows`, int64 and rising."""
        self.rows = len(rows)
        # One layer after another, so that old and new buffer exist together for one layer only.
        for layer, buffer in enumerate(self._buffers):
            self._buffers[layer] = buffer[:, rows]
        if self.real is not None:
            self.real = self.real[rows]
        if self._gaps:
            self._gaps = [self._gaps[row] for row in rows.tolist()]

    @property
    def first(self) -> int:
        """The first token that every layer still holds."""
        return self.length - min(self._held)

    def windows(self) -> list[Tensor]:
        """Copies of what the sliding layers of a cache of one row hold, each (2, kv heads, held, head_dim)."""
        return [
            buffer[:, 0, :, :held].clone()
            for buffer, held, keep in zip(self._buffers, self._held, self._keep, strict=True)
            if keep is not None
        ]

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        """Forget all but the first `length` tokens. windows: what windows() returned at that length, where the sliding
        layers no longer hold that window."""
        saved = iter(windows or ())
        for layer, keep in enumerate(self._keep):
            if keep is None or not length:
                self._held[layer] = length
            elif windows is None:
                self._held[layer] = length - (self.length - self._held[layer])
            else:
                window = next(saved)
                self._held[layer] = window.shape[2]
                self._buffers[layer][:, 0, :, : window.shape[2]] = window
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)
