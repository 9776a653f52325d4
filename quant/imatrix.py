"""Importance matrices: llama.cpp's GGUF imatrix files, one weight per input column (and expert) of a matrix.

    <tensor>.in_sum2   F32 (n_expert, in)   sum over tokens of x²
    <tensor>.counts    F32 (n_expert, 1)    tokens seen

llama-quantize weighs column j by in_sum2[j] / count; an expert that saw no token gets weights of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgq.quant.errors import InputError
from dgq.quant.gguf_file import GGUFReader

MAX_IMPORTANCE = 1e20  # mean squares; ggml multiplies them by squared weights in float32, which end at 3e38


@dataclass(frozen=True)
class Imatrix:
    """weights: GGUF tensor name -> float32 (in,) or (E, in); the rest is what a quantised file records of it."""

    file: str
    datasets: tuple[str, ...]
    chunks: int
    weights: dict[str, torch.Tensor]


def read_imatrix(path: Path) -> Imatrix:
    """Read a GGUF imatrix file; InputError if it is none or an entry is malformed."""
    reader = GGUFReader(path)
    meta: dict[str, Any] = reader.metadata
    if meta.get("general.type") != "imatrix":
        raise InputError(
            f"{path}: general.type is {meta.get('general.type')!r}, not 'imatrix'; pass a GGUF imatrix file"
        )
    weights = {}
    for name in (n.removesuffix(".in_sum2") for n in reader if n.endswith(".in_sum2")):
        sums = reader[f"{name}.in_sum2"].dequantize()
        if f"{name}.counts" not in reader:
            raise InputError(f"{path}: {name}.in_sum2 comes without {name}.counts")
        counts = reader[f"{name}.counts"].dequantize().reshape(-1, 1)
        if sums.dim() > 2 or counts.numel() != (sums.shape[0] if sums.dim() == 2 else 1):
            raise InputError(f"{path}: {name} has {counts.numel()} counts for sums of shape {list(sums.shape)}")
        for kind, values in (("in_sum2", sums), ("counts", counts)):
            if not (torch.isfinite(values) & (values >= 0)).all():
                raise InputError(f"{path}: {name}.{kind} holds values that are negative or not finite")
        sums = sums.reshape(len(counts), -1)
        if ((sums == 0).all(-1, keepdim=True) & (counts > 0)).any():
            raise InputError(f"{path}: {name} has tokens but an importance of 0 in every column")
        mean = torch.where(counts > 0, sums / counts.clamp(min=1e-30), 1.0)
        if (mean > MAX_IMPORTANCE).any():
            raise InputError(f"{path}: {name} has an importance of {float(mean.max()):.3g}, beyond {MAX_IMPORTANCE:g}")
        weights[name] = mean if len(counts) > 1 else mean[0]
    if not weights:
        raise InputError(f"{path}: holds no importance entries")
    datasets, chunks = meta.get("imatrix.datasets", []), meta.get("imatrix.chunk_count", 0)
    if not (isinstance(datasets, list) and all(isinstance(one, str) for one in datasets) and isinstance(chunks, int)):
        raise InputError(f"{path}: imatrix.datasets is no list of names, or imatrix.chunk_count no number")
    return Imatrix(str(path), tuple(datasets), chunks, weights)
