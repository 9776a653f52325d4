"""ggml's block formats: Q4_K, Q5_0, Q6_K, Q8_0. Encoded by ggml's own C code on the CPU, decoded here in torch.

Encoding calls `ggml_quantize_chunk` of libggml-base (package libggml-python, MIT), because "the exact bytes of
llama-quantize" is a promise about that code's float arithmetic. Weights on another device are encoded there, by
ggml_encode.py: the same arithmetic in torch, held to the same bytes. Decoding is torch on any device; in float32 it
gives ggml's `dequantize_row_*` values bit for bit.

Layouts (ggml-common.h), little endian, one block after the other along a row:

    Q8_0   32 weights, 34 bytes   d:f16 | qs:i8[32]                                   w = d * q
    Q5_0   32 weights, 22 bytes   d:f16 | qh:u8[4] | qs:u8[16]                        w = d * (q - 16)
             q[j] = low nibble of qs[j] + bit j of qh, q[j+16] = high nibble + bit j+16
    Q4_K  256 weights, 144 bytes  d:f16 | dmin:f16 | scales:u8[12] | qs:u8[128]       w = (d*sc) * q - (dmin*m)
             8 sub-blocks of 32 with a 6-bit scale sc and minimum m each, packed into 12 bytes:
             sub-blocks 0-3  sc = s[j] & 63                        m = s[j+4] & 63
             sub-blocks 4-7  sc = s[j+4] & 15 | s[j-4] >> 6 << 4   m = s[j+4] >> 4 | s[j] >> 6 << 4
             qs[32g + l]: low nibble is weight 64g + l, high nibble weight 64g + 32 + l
    Q6_K  256 weights, 210 bytes  ql:u8[128] | qh:u8[64] | scales:i8[16] | d:f16      w = (d*sc) * (q - 32)
             per half (128 weights) and l < 32:  weight l + 32k takes its low 4 bits from nibble k//2 of
             ql[l + 32*(k%2)] and its high 2 bits from bits 2k of qh[l]; one scale per 16 weights
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes import ggml_encode


@cache
def _quantize_chunk() -> Callable[..., int]:
    """ggml_quantize_chunk(type, src f32*, dst, start, nrows, n_per_row, imatrix f32*|NULL) -> bytes written."""
    import libggml

    root = Path(next(iter(libggml.__path__)))
    found = sorted(root.glob("lib*/libggml-base.so")) + sorted(root.glob("lib*/libggml-base.dylib"))
    if not found:
        raise InputError(f"{root}: no libggml-base library in the libggml-python package; reinstall it")
    function = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    return function


def _c_encodes(weight: torch.Tensor) -> bool:
    """On the CPU one core's C is faster than torch; elsewhere the weight would have to come here and go back."""
    return weight.device.type == "cpu"


def _f16(block_bytes: torch.Tensor) -> torch.Tensor:
    """uint8 (…, 2) -> float32 (…, 1): a little-endian half."""
    return block_bytes.contiguous().view(torch.float16).float()


Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Blocks taken apart: integers (…, groups, weights of a group), float32 scales (…, groups, 1), and minimums likewise or
None: w = scale * integer - minimum."""


def _unpack_q8_0(b: torch.Tensor) -> Unpacked:
    return b[..., None, 2:].view(torch.int8), _f16(b[..., None, :2]), None


def _unpack_q5_0(b: torch.Tensor) -> Unpacked:
    qh, qs = b[..., None, 2:6], b[..., None, 6:]
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device)
    high = ((qh.unsqueeze(-1) >> shifts) & 1).flatten(-2) << 4  # bit j of the 32-bit word, as 0 or 16
    q = torch.cat((qs & 15, qs >> 4), -1) | high
    return q.to(torch.int8) - 16, _f16(b[..., None, :2]), None


def _unpack_q4_k(b: torch.Tensor) -> Unpacked:
    s = b[..., 4:16]
    low, mid, high = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), -1)
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), -1)
    qs = b[..., 16:].unflatten(-1, (4, 1, 32))
    q = torch.cat((qs & 15, qs >> 4), -2).flatten(-3, -2)  # (…, 8, 32)
    return q, (_f16(b[..., 0:2]) * scale).unsqueeze(-1), (_f16(b[..., 2:4]) * minimum).unsqueeze(-1)


def _unpack_q6_k(b: torch.Tensor) -> Unpacked:
    ql = b[..., :128].unflatten(-1, (2, 2, 32))  # half, k % 2, l
    qh = b[..., 128:192].unflatten(-1, (2, 1, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).unsqueeze(-1)
    high = ((qh >> shifts) & 3) << 4  # half, k, l
    q = (torch.cat((ql & 15, ql >> 4), -2) | high).to(torch.int8) - 32
    scale = _f16(b[..., 208:210]) * b[..., 192:208].view(torch.int8)
    return q.flatten(-3).unflatten(-1, (16, 16)), scale.unsqueeze(-1), None


@dataclass(frozen=True)
class GGMLScheme:
    """One ggml block format. parts[""] is uint8 (…, rows, in // block * block_bytes)."""

    name: str
    type_id: int  # enum ggml_type
    block: int
    block_bytes: int
    take_apart: Callable[[torch.Tensor], Unpacked]  # uint8 (…, block_bytes)
    max_abs: float = 65504.0  # a block's scale is a half; beyond it ggml writes infinities, or zeros without a word
    shared: frozenset[str] = frozenset()

    @property
    def bits(self) -> float:
        return 8.0 * self.block_bytes / self.block

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block * self.block_bytes

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """weight (…, in), any float dtype -> uint8 blocks, the bytes llama-quantize writes.

        importance float32: (in,) weighs the columns of every row, (E, in) those of each expert of an (E, out, in)
        weight. Raises ValueError if `in` is no multiple of the block. Pure and thread-safe; releases the GIL. The bytes
        lie on the weight's device.
        """
        columns = weight.shape[-1]
        if columns % self.block:
            raise ValueError(f"rows of {columns} are no multiple of {self.name}'s block of {self.block}")
        bytes_shape = (*weight.shape[:-1], columns // self.block * self.block_bytes)
        out = torch.empty(bytes_shape, dtype=torch.uint8, device=weight.device)
        fill = self._encode if _c_encodes(weight) else self._encode_there
        if importance is None or importance.dim() == 1:
            fill(weight, out, importance)
        else:
            for expert, packed, weights in zip(weight, out, importance, strict=True):
                fill(expert, packed, weights)
        return {"": out}

    def _encode_there(self, weight: torch.Tensor, out: torch.Tensor, importance: torch.Tensor | None) -> None:
        if weight.numel():
            rows = weight.reshape(-1, weight.shape[-1])
            out.copy_(ggml_encode.encode(self.name, rows, importance).view(out.shape))

    def _encode(self, weight: torch.Tensor, out: torch.Tensor, importance: torch.Tensor | None) -> None:
        columns = weight.shape[-1]
        source = weight.detach().to("cpu", torch.float32).contiguous()
        weights = None if importance is None else importance.to("cpu", torch.float32).contiguous()
        if weights is not None and weights.shape != (columns,):
            raise ValueError(f"importance of shape {tuple(weights.shape)} for rows of {columns}")
        rows = source.numel() // columns
        imatrix = None if weights is None else weights.data_ptr()
        written = _quantize_chunk()(self.type_id, source.data_ptr(), out.data_ptr(), 0, rows, columns, imatrix)
        if written != out.numel():
            raise RuntimeError(f"ggml wrote {written} bytes of {self.name}, not {out.numel()}")

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 (…, bytes of a row) -> (…, in); float32 arithmetic in ggml's order, then one cast."""
        integers, scales, minimums = self.unpack(parts)
        values = scales * integers
        if minimums is not None:
            values -= minimums
        return values.flatten(-2).to(dtype)

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> Unpacked:
        """uint8 (…, bytes of a row) -> integers, scales and minimums, all groups of a row along one axis."""
        integers, scales, minimums = self.take_apart(parts[""].unflatten(-1, (-1, self.block_bytes)))
        return integers.flatten(-3, -2), scales.flatten(-3, -2), None if minimums is None else minimums.flatten(-3, -2)


Q4_K = GGMLScheme("q4_k", 12, 256, 144, _unpack_q4_k)
Q5_0 = GGMLScheme("q5_0", 6, 32, 22, _unpack_q5_0)
Q6_K = GGMLScheme("q6_k", 14, 256, 210, _unpack_q6_k)
Q8_0 = GGMLScheme("q8_0", 8, 32, 34, _unpack_q8_0)
