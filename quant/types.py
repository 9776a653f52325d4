"""The few types everything else speaks in.

    Spec      a tensor that was announced by a file's header and not yet read
    Scheme    how a block of weights becomes bits and back, and every fact that is true of that scheme alone
    Grid      what a scheme leaves a calibrated quantiser to choose
    Packed    a quantised weight: which scheme, which shape, which bytes
    Layout    the tensors on disk that a format makes of one quantised weight

One weight's way through dgq:

    source header -> Spec -> read -> scheme.quantize -> Packed -> Writer.add
                                                          |
    Reader[name] -> Packed -> decode then matmul (or a kernel)

A fused expert weight is ONE weight of shape (E, out, in): blocks run along the last axis, so it quantises to
the same bytes as each expert alone, and `packed[e]` is a view of one expert's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Spec:
    """A tensor as its file's header announces it: nothing was read yet.

    dtype is the file format's own name (safetensors: BF16, F16, F32, U8, …); file holds the bytes from byte
    `start` (counted from the beginning of the file) to `stop`. pieces: of a tensor that lies in several places, equal
    parts of its rows in their order; stop - start is then the sum of their bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int
    pieces: tuple[Spec, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def places(self) -> tuple[Spec, ...]:
        """Where its bytes lie."""
        return self.pieces or (self,)


@dataclass(frozen=True)
class GGMLType:
    """What ggml and llama.cpp call a scheme. name: of the type, as gguf.GGMLQuantizationType has it; id: its number;
    file_type: general.file_type of a file that is mostly in it (LLAMA_FTYPE_MOSTLY_…), None if there is none; fallback:
    the scheme that ggml takes instead for rows that the block does not divide, None if ggml refuses them."""

    name: str
    id: int
    file_type: int | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Table:
    """A scheme of 16 values: weight = scale * values[code]. group: weights that share a scale, 64 or 32;
    codes_and_scales: parts of a weight (…, in) -> codes uint8 (…, in) and scales float32 (…, in / group)."""

    values: tuple[float, ...]
    group: int
    codes_and_scales: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class GPUForm:
    """How the runtime's kernels hold a weight of a scheme. Every scheme decides; there is no default.

    tiles: a kind of tiles that runtime/kernels/repack.py makes; "bf16" decodes the weight. bits: of GPU memory that a
    weight takes so; embedding: whether the embedding's table stays as its file has it; table: for tiles "table".
    """

    tiles: str
    bits: float
    embedding: bool = False
    table: Table | None = None


DECODED = GPUForm("bf16", bits=16.0)
"""The decision for a scheme without a kernel: its weights are bfloat16 on the GPU."""


class Grid(Protocol):
    """One scheme over one weight, as error feedback sees it (quant/feedback): value = scale * levels[code] + low.

    block: columns that share what open() fixes; sub: columns that share a scale; levels: ascending, float32.
    """

    block: int
    sub: int
    levels: torch.Tensor

    def open(self, x: torch.Tensor, cost: torch.Tensor) -> Any:
        """x (B, rows, block) -> what scales() needs of the block. cost (B, 1, block): of a squared error in each
        column."""
        ...

    def scales(
        self, x: torch.Tensor, cost: torch.Tensor, state: Any, number: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Candidates for columns x (B, rows, sub), the number-th of the block: scale (C, B, rows), low or None (= 0),
        and each candidate's notes (C, B, rows), which pack() gets back."""
        ...

    def pack(self, codes: torch.Tensor, notes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """codes uint8 (B, rows, in) and notes (B, rows, in / sub), in the row's order -> parts."""
        ...


class Scheme(Protocol):
    """One way to store a weight: pure functions on tensors, no state, and the facts that are true of it alone.

    name: what recipes, dgq.json and plans call it.
    block: elements along the last axis that share scales; rows that it does not divide are refused.
    bits: stored bits per weight, scales included.
    max_abs: the largest weight it can hold.
    shared: parts that belong to the whole weight and are not sliced with it.
    whole: whether the rows of a matrix share a scale, so that a matrix must be quantised in one piece.
    ggml: its type in a GGUF; None if dgq writes no GGUF with it.
    gpu: how the runtime's kernels hold it.
    grid: makes the Grid of a weight (B, rows, in) float32; None if there is nothing to choose.
    searched: whether effort fast chooses its scales by quant/feedback's search; False where the reference's own choice
    leaves nothing to gain without data.
    in_mix: whether `dgq mix` tries it, in the formats that hold it.
    """

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def bits(self) -> float: ...
    @property
    def max_abs(self) -> float: ...
    @property
    def shared(self) -> frozenset[str]: ...
    @property
    def whole(self) -> bool: ...
    @property
    def ggml(self) -> GGMLType | None: ...
    @property
    def gpu(self) -> GPUForm: ...
    @property
    def grid(self) -> Callable[[torch.Tensor], Grid] | None: ...
    @property
    def searched(self) -> bool: ...
    @property
    def in_mix(self) -> bool: ...

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """weight (…, in) of any float dtype -> parts. importance (in,) or (E, in) float32 weighs the columns."""
        ...

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """parts -> weight (…, in) in `dtype`, on the device where the parts live."""
        ...

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of this shape takes on disk."""
        ...


@dataclass(frozen=True)
class Packed:
    """A quantised weight. parts maps an on-disk suffix ("" = the tensor itself) to a tensor.

    Every part but the scheme's shared ones keeps the weight's leading axes, so that row and expert slices of the
    parts are the slices of the weight: for a ggml scheme parts[""] is uint8 (…, rows, bytes of a row). One part is
    no part of the weight: "input_scale" float32 (…, rows, 1), the scale to round the weight's INPUT with (W4A4); inf
    where the files have none, and the input is not rounded.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight, decoded: shape `self.shape`, on the parts' device."""
        return self.scheme.dequantize(self.parts, dtype)

    def __getitem__(self, index: int | slice | torch.Tensor) -> Packed:
        """Slice along the first axis (an expert, a range of rows, or rows picked by an index tensor)."""
        shared = self.scheme.shared
        parts = {suffix: part if suffix in shared else part[index] for suffix, part in self.parts.items()}
        lead = parts[""].shape[: len(self.shape) - 1 - isinstance(index, int)]
        return Packed(self.scheme, (*lead, self.shape[-1]), parts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        parts = {k: v.to(device, non_blocking=non_blocking) for k, v in self.parts.items()}
        return Packed(self.scheme, self.shape, parts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; axes that are only expanded count once."""
        return sum(
            part.element_size() * math.prod(n for n, step in zip(part.shape, part.stride(), strict=True) if step)
            for part in self.parts.values()
        )


Entry = tuple[str, tuple[int, ...]]
"""A tensor on disk: its safetensors dtype and its shape."""


class Layout(Protocol):
    """What a safetensors format makes of a quantised weight: which tensors, and back.

    slices: what slices of weights of several tensors are quantised with, which split() completes. name, shape: a
    weight's canonical name and shape.
    """

    @property
    def slices(self) -> Scheme: ...

    def scheme_of(self, name: str) -> Scheme:
        """Of the weight, where it is quantised."""
        ...

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the format has a place for this weight quantised; the others below are for such weights only."""
        ...

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        """Name -> dtype and shape of every tensor on disk."""
        ...

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The next bytes of those tensors: piece is the weight's slice from `start`; slices come in order."""
        ...

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """Read the tensors back, checked."""
        ...


class Stored(Protocol):
    """An opened directory, as a layout sees it."""

    def __contains__(self, name: object) -> bool: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def file(self, name: str) -> Path: ...
