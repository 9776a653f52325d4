"""ggml's quantisers of Q4_K, Q5_0, Q6_K and Q8_0 in torch: the bytes of `ggml_quantize_chunk`, on any device.

On the CPU ggml's own C does the work (ggml.py draws the layouts); this is for weights that lie on a GPU. That the bytes
are the same is the whole point; ggml_search.py says how it is done.

    weight (rows, in) -> pieces of whole rows -> x (positions of a sub-block, sub-blocks)
                                                   | scale, min, levels by search (ggml_search.py)
                                                   | Q4_K, Q6_K: the scales of a block quantised in their turn,
                                                   |             the levels rounded anew with what became of them
                                                   v
                                                 bytes (rows, bytes of a row)

A sub-block whose quantised scale comes out 0 keeps the levels of the search, decodable or not: those are the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch

from dgq.quant.schemes.ggml_search import (
    GROUP_MAX_EPS,
    make_qkx_quants,
    make_qp_quants,
    make_qx_quants,
    nearest_int,
    numbers,
    signed_max,
    square_root,
    sum_positions,
)

# Weights worked on at once, in some twelve float32 temporaries of that size: they should stay in a cache.
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 22}


def encode(name: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """weight (rows >= 1, in) of any float dtype, finite -> uint8 (rows, bytes of a row) on its device.

    importance (in,) float32 weighs the columns. `in` is a multiple of the block. No step waits for the device.
    """
    rows, columns = weight.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of shape {tuple(importance.shape)} for rows of {columns}")
    columns_weight = None if importance is None else importance.to(weight.device, torch.float32)
    if importance is None:  # then rows do not matter, and all pieces but the last have one shape
        weight = weight.reshape(-1, 256 if columns % 256 == 0 else 32)
    step = max(1, _PIECE.get(weight.device.type, 1 << 20) // weight.shape[1])
    pieces = []
    for start in range(0, len(weight), step):
        piece = weight[start : start + step].detach().float().contiguous()
        if weight.is_cuda and importance is None and len(piece) == step:
            pieces.append(_graph(name, piece.shape, piece.device).encode(piece))
        else:
            pieces.append(_ENCODERS[name](piece, columns_weight).view(-1))
    return torch.cat(pieces).view(rows, -1)


class _Graph:
    """An encoder recorded for pieces of one shape: thousands of small operations on the GPU, launched as one."""

    def __init__(self, name: str, shape: torch.Size, device: torch.device) -> None:
        self._lock = Lock()
        self._x = torch.zeros(shape, device=device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            _ENCODERS[name](self._x, None)  # once outside, for what is made at first use
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._bytes = _ENCODERS[name](self._x, None)

    def encode(self, piece: torch.Tensor) -> torch.Tensor:
        """Flat bytes. One thread at a time: all pieces go through the same memory."""
        with self._lock:
            self._x.copy_(piece)
            self._graph.replay()
            found = self._bytes.flatten().clone()
            torch.cuda.current_stream().synchronize()
        return found


_making = Lock()
_graphs: dict[tuple[str, torch.Size, torch.device], _Graph] = {}


def _graph(name: str, shape: torch.Size, device: torch.device) -> _Graph:
    with _making:
        key = (name, shape, device)
        if key not in _graphs:
            _graphs[key] = _Graph(name, shape, device)
        return _graphs[key]


def _positions(x: torch.Tensor, block: int) -> torch.Tensor:
    """(rows, in) -> (block, blocks), contiguous."""
    return x.reshape(-1, block).t().contiguous()


def _half(value: torch.Tensor) -> torch.Tensor:
    """float32 (blocks,) -> float16 (blocks, 1), rounded to even; NaN is x86's, whose bits CUDA does not give."""
    nan = torch.full((1,), -512, dtype=torch.int16, device=value.device).view(torch.float16)
    return torch.where(value.isnan(), nan, value.half()).unsqueeze(-1)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """Whole numbers of any dtype -> their low bytes."""
    return (value.to(torch.int32) & 255).to(torch.uint8)


def _join(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part if part.dtype == torch.uint8 else part.view(torch.uint8) for part in parts], -1)


def _q8_0(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    blocks = x.view(-1, 32)
    one, most = numbers([1.0, 127.0], x)
    d = blocks.abs().amax(1) / most
    scaled = blocks * torch.where(d != 0, one / d, 0.0).unsqueeze(1)
    scaled = scaled.nan_to_num_(0.0, 0.0, 0.0)  # d so small that 1/d overflows: C's cast gives low bytes of 0
    whole = scaled.trunc()
    rounded = whole + ((scaled - whole) * 2).trunc()  # roundf: halves go away from zero
    return _join(_half(d), _bytes(rounded))


def _q5_0(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    if importance is None:
        one = numbers([1.0], x)
        _, extreme = signed_max(_positions(x, 32))
        d = extreme / -16
        scaled = x.view(-1, 32) * torch.where(d != 0, one / d, 0.0).unsqueeze(1) + 16.5
        level = scaled.nan_to_num_(0.0, 0.0, 0.0).clamp_(max=31.0)  # as in Q8_0
    else:
        count = numbers([x.shape[1]], x)
        squares = x * x
        sigma2 = sum_positions(squares, 1) / count  # of the whole row
        weight = importance * square_root(sigma2.unsqueeze(1) + squares)
        d, level = make_qx_quants(16, _positions(x, 32), _positions(weight, 32))
        level = level.t()
    return pack_q5_0(_half(d), level.to(torch.int32))


def pack_q5_0(d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """d float16 (blocks, 1), q int32 (blocks, 32) in 0 … 31 -> uint8 (blocks, 22)."""
    bits = (q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.int32, device=q.device)
    return _join(d, _bytes(bits.sum(-1)), _bytes(q[:, :16] & 15 | (q[:, 16:] & 15) << 4))


def _q6_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    columns = _positions(x, 16)
    weight = columns * columns if importance is None else _positions(importance.expand_as(x), 16)
    scales, level = make_qx_quants(32, columns, weight)
    magnitude, extreme = signed_max(_positions(scales, 16))
    one, full = numbers([1.0, -128.0], x)
    iscale = full / extreme
    d = _half(one / iscale)
    quantised = nearest_int(iscale.unsqueeze(1) * scales.view(-1, 16)).clamp(max=127)
    scale = (d.float() * quantised).view(-1)
    level = torch.where(scale != 0, nearest_int(columns / scale).clamp_(-32, 31) + 32, level.to(torch.int32))
    packed = pack_q6_k(d, quantised, level.t().reshape(-1, 256))
    return torch.where(magnitude.unsqueeze(1) < GROUP_MAX_EPS, 0, packed)


def pack_q6_k(d: torch.Tensor, scales: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """d float16 (blocks, 1), scales int32 (blocks, 16), q int32 (blocks, 256) in 0 … 63 -> uint8 (blocks, 210)."""
    q = q.view(-1, 2, 4, 32)  # half, k, l
    low, high = q & 15, q >> 4
    ql = (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1)
    qh = (high << torch.arange(0, 8, 2, dtype=torch.int32, device=q.device).unsqueeze(1)).sum(2).flatten(1)
    return _join(_bytes(ql), _bytes(qh), _bytes(scales), d)


def _q4_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    columns = _positions(x, 32)
    if importance is None:
        weight = columns.abs().add_(square_root(sum_positions(columns * columns) / 32))
        scales, mins, level = make_qkx_quants(15, columns, weight, -1.0, 0.1, 20)
        d, ls = _fractions_of_largest(scales.view(-1, 8))
        dmin, lm = _fractions_of_largest(mins.view(-1, 8))
    else:
        squares = x * x
        sigma2 = 2 * sum_positions(_positions(squares, 256)) / 256
        importance = importance.expand_as(x).reshape(-1, 256)
        weight = _positions(importance * square_root(sigma2.unsqueeze(1) + squares.view(-1, 256)), 32)
        scales, mins, level = make_qkx_quants(15, columns, weight, -0.9, 0.05, 36)
        both = torch.cat((_positions(scales, 8), _positions(mins, 8)), 1)
        d_dmin, ls_lm = make_qp_quants(63, both, _positions(sum_positions(weight), 8).repeat(1, 2))
        (d, dmin), (ls, lm) = d_dmin.chunk(2), ls_lm.t().chunk(2)
    low, mid, high = _six_bits(ls, lm)
    d16, dmin16 = _half(d), _half(dmin)
    sc = torch.cat((low & 63, high & 15 | low >> 6 << 4), 1)
    m = torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), 1)
    scale, minimum = (d16.float() * sc).view(-1), (dmin16.float() * m).view(-1)
    rounded = nearest_int((columns + minimum) / scale).clamp_(0, 15)
    q = torch.where(scale != 0, rounded, level.to(torch.int32)).t().reshape(-1, 256)
    return pack_q4_k(d16, dmin16, ls, lm, q)


def pack_q4_k(
    d: torch.Tensor, dmin: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """d, dmin float16 (blocks, 1); scales, mins int32 (blocks, 8) of 6 bits; q int32 (blocks, 256) in 0 … 15 -> uint8
    (blocks, 144)."""
    q = q.view(-1, 4, 2, 32)
    qs = (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)
    return _join(d, dmin, *map(_bytes, _six_bits(scales, mins)), _bytes(qs))


def _six_bits(ls: torch.Tensor, lm: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The twelve bytes of scales and mins (blocks, 8), in three times four; the low four of scales are whole bytes
    first, so that a wrapped 255 spoils their neighbours as in C."""
    packed = (ls[:, :4] | ls[:, 4:] >> 4 << 6, lm[:, :4] | lm[:, 4:] >> 4 << 6, ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4)
    return tuple(part & 255 for part in packed)


def _fractions_of_largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, 8) -> d = largest / 63 (blocks,) and each value as 0 … 63 of them; all 0 where none is positive."""
    most = numbers([63.0], values)
    largest = values.amax(1).clamp(min=0.0) + 0.0  # no -0
    inverse = torch.where(largest > 0, most / largest, 0.0)
    return largest / most, (nearest_int(inverse.unsqueeze(1) * values) & 255).clamp(max=63)


_ENCODERS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "q4_k": _q4_k,
    "q5_0": _q5_0,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
}
