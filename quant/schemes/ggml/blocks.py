"""What ggml's block formats share: a row is a sequence of equal blocks of bytes, each with scales of its own.

    weight (…, rows, in)  <->  parts[""] uint8 (…, rows, in / block * block_bytes)

A format's module describes its block by three functions, and blocks.py does the rest:

    unpack   uint8 (…, blocks, block_bytes) -> integers, scales, minimums     w = scale * integer - minimum
    encode   float32 (rows, in) and importance -> uint8                       ggml's quantiser, in torch
    grid     float32 (B, rows, in) -> Grid                                    what calibration may choose

On the CPU, weights are encoded by `ggml_quantize_chunk` of libggml-base (package libggml-python, MIT), because "the
exact bytes of llama-quantize" is a promise about that code's float arithmetic. On another device they are encoded there
by `encode` (on_device.py), which is held to the same bytes. Decoding is torch on every device; in float32 it gives
ggml's `dequantize_row_*` values bit for bit.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.schemes.ggml.on_device import encode_on_device
from dgq.quant.types import GGMLType, GPUForm, Grid

Unpacked = tuple[Tensor, Tensor, Tensor | None]
"""Blocks taken apart: integers (…, groups, weights of a group), float32 scales (…, groups, 1), and minimums of the same
shape or None: w = scale * integer - minimum. A group is the weights that share a scale."""


@cache
def _quantize_chunk() -> Callable[..., int]:
    """ggml_quantize_chunk(type, src f32*, dst, start, nrows, n_per_row, imatrix f32*|NULL) -> bytes written."""
    import libggml

    root = Path(next(iter(libggml.__path__)))
    libraries = sorted(root.glob("lib*/libggml-base.so")) + sorted(root.glob("lib*/libggml-base.dylib"))
    if not libraries:
        raise InputError(f"{root}: no libggml-base library in the libggml-python package; reinstall it")
    function = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    return function


def _c_encodes(weight: Tensor) -> bool:
    """On the CPU one core's C is faster than torch; elsewhere the weight would have to come here and go back."""
    return weight.device.type == "cpu"


def half_value(block_bytes: Tensor) -> Tensor:
    """uint8 (…, 2) -> float32 (…, 1): a little-endian half."""
    return block_bytes.contiguous().view(torch.float16).float()


@dataclass(frozen=True)
class GGMLScheme:
    """One ggml block format as a Scheme; quant/types.py says what each attribute means.

    parts[""] is uint8 (…, rows, in / block * block_bytes).
    """

    name: str
    ggml: GGMLType
    block: int
    block_bytes: int
    unpack_blocks: Callable[[Tensor], Unpacked]
    encode: Callable[[Tensor, Tensor | None], Tensor]
    grid: Callable[[Tensor], Grid]
    gpu: GPUForm
    in_mix: bool
    searched: bool = False  # ggml's own search leaves nothing to gain without data
    whole: bool = False
    max_abs: float = 65504.0  # a block's scale is a half; beyond it ggml writes infinities, or zeros without a word
    shared: frozenset[str] = frozenset()

    @property
    def bits(self) -> float:
        return 8.0 * self.block_bytes / self.block

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block * self.block_bytes

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """weight (…, in), any float dtype -> uint8 blocks on the weight's device, the bytes that llama-quantize writes.

        importance float32: (in,) weighs the columns of every row, (E, in) those of each expert of an (E, out, in)
        weight. Raises ValueError if `in` is no multiple of the block. Pure and thread-safe; C releases the GIL.
        """
        columns = weight.shape[-1]
        if columns % self.block:
            raise ValueError(f"rows of {columns} are no multiple of {self.name}'s block of {self.block}")
        bytes_shape = (*weight.shape[:-1], columns // self.block * self.block_bytes)
        out = torch.empty(bytes_shape, dtype=torch.uint8, device=weight.device)
        fill = self._encode_in_c if _c_encodes(weight) else self._encode_on_device
        if importance is None or importance.dim() == 1:
            fill(weight, out, importance)
        else:
            for expert, packed, weights in zip(weight, out, importance, strict=True):
                fill(expert, packed, weights)
        return {"": out}

    def _encode_on_device(self, weight: Tensor, out: Tensor, importance: Tensor | None) -> None:
        if weight.numel():
            rows = weight.reshape(-1, weight.shape[-1])
            out.copy_(encode_on_device(self.encode, self.block, rows, importance).view(out.shape))

    def _encode_in_c(self, weight: Tensor, out: Tensor, importance: Tensor | None) -> None:
        columns = weight.shape[-1]
        source = weight.detach().to("cpu", torch.float32).contiguous()
        weights = None if importance is None else importance.to("cpu", torch.float32).contiguous()
        if weights is not None and weights.shape != (columns,):
            raise ValueError(f"importance of shape {tuple(weights.shape)} for rows of {columns}")
        rows = source.numel() // columns
        imatrix = None if weights is None else weights.data_ptr()
        written = _quantize_chunk()(self.ggml.id, source.data_ptr(), out.data_ptr(), 0, rows, columns, imatrix)
        if written != out.numel():
            raise RuntimeError(f"ggml wrote {written} bytes of {self.name}, not {out.numel()}")

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (…, bytes of a row) -> (…, in); float32 arithmetic in ggml's order, then one cast."""
        integers, scales, minimums = self.unpack(parts)
        values = scales * integers
        if minimums is not None:
            values -= minimums
        return values.flatten(-2).to(dtype)

    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        """uint8 (…, bytes of a row) -> integers, scales and minimums, all groups of a row along one axis."""
        integers, scales, minimums = self.unpack_blocks(parts[""].unflatten(-1, (-1, self.block_bytes)))
        return integers.flatten(-3, -2), scales.flatten(-3, -2), None if minimums is None else minimums.flatten(-3, -2)
