"""ggml's quantisers on a GPU: pieces of a weight, and thousands of small operations recorded as one CUDA graph.

On the CPU ggml's own C does the work; this is for weights that lie on another device. Each format's module has its
quantiser in torch, whose bytes are those of `ggml_quantize_chunk`; search.py says how that is done.

    weight (rows, in) -> pieces of whole rows -> x (positions of a sub-block, sub-blocks)
                                                   | scale, min, levels by search (search.py)
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
from torch import Tensor

Encoder = Callable[[Tensor, Tensor | None], Tensor]
"""x (rows, in) float32 and importance (in,) float32 or None -> the blocks' bytes, uint8, in any shape."""

# Weights worked on at once, in some twelve float32 temporaries of that size: they should stay in a cache.
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 22}


def encode_on_device(encode: Encoder, block: int, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """weight (rows >= 1, in) of any float dtype, finite -> uint8 (rows, bytes of a row) on its device.

    importance (in,) float32 weighs the columns. `in` is a multiple of `block`. No step waits for the device.
    """
    rows, columns = weight.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance of shape {tuple(importance.shape)} for rows of {columns}")
    columns_weight = None if importance is None else importance.to(weight.device, torch.float32)
    if importance is None:  # then rows do not matter, and all pieces but the last have one shape
        weight = weight.reshape(-1, 256 if columns % 256 == 0 else block)
    step = max(1, _PIECE.get(weight.device.type, 1 << 20) // weight.shape[1])
    pieces = []
    for start in range(0, len(weight), step):
        piece = weight[start : start + step].detach().float().contiguous()
        if weight.is_cuda and importance is None and len(piece) == step:
            pieces.append(_graph(encode, piece.shape, piece.device).encode(piece))
        else:
            pieces.append(encode(piece, columns_weight).view(-1))
    return torch.cat(pieces).view(rows, -1)


class _Graph:
    """An encoder recorded for pieces of one shape: thousands of small operations on the GPU, launched as one."""

    def __init__(self, encode: Encoder, shape: torch.Size, device: torch.device) -> None:
        self._lock = Lock()
        self._x = torch.zeros(shape, device=device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            encode(self._x, None)  # once outside, for what is made at first use
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._bytes = encode(self._x, None)

    def encode(self, piece: Tensor) -> Tensor:
        """Flat bytes. One thread at a time: all pieces go through the same memory."""
        with self._lock:
            self._x.copy_(piece)
            self._graph.replay()
            encoded = self._bytes.flatten().clone()
            torch.cuda.current_stream().synchronize()
        return encoded


_making = Lock()
_graphs: dict[tuple[Encoder, torch.Size, torch.device], _Graph] = {}


def _graph(encode: Encoder, shape: torch.Size, device: torch.device) -> _Graph:
    with _making:
        key = (encode, shape, device)
        if key not in _graphs:
            _graphs[key] = _Graph(encode, shape, device)
        return _graphs[key]


def positions(x: Tensor, block: int) -> Tensor:
    """(rows, in) -> (block, blocks), contiguous: the layout that search.py works on."""
    return x.reshape(-1, block).t().contiguous()


def half(value: Tensor) -> Tensor:
    """float32 (blocks,) -> float16 (blocks, 1), rounded to even; NaN is x86's, whose bits CUDA does not give."""
    nan = torch.full((1,), -512, dtype=torch.int16, device=value.device).view(torch.float16)
    return torch.where(value.isnan(), nan, value.half()).unsqueeze(-1)


def low_bytes(value: Tensor) -> Tensor:
    """Whole numbers of any dtype -> their low bytes."""
    return (value.to(torch.int32) & 255).to(torch.uint8)


def join(*parts: Tensor) -> Tensor:
    """The parts' bytes, one after the other along the last axis."""
    return torch.cat([part if part.dtype == torch.uint8 else part.view(torch.uint8) for part in parts], -1)
