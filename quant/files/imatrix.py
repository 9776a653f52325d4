"""Importance matrices: llama.cpp's imatrix files, one weight per input column (and expert) of a matrix.

GGUF, read and written:
    <tensor>.in_sum2   F32 (n_expert, in)   sum over tokens of x²
    <tensor>.counts    F32 (n_expert, 1)    tokens seen
The older binary one, little-endian, read only:
    int32 entries; each int32 length, name, int32 calls, int32 n, n float32: sums; then int32 chunks, int32 length, file

llama-quantize weighs column j by in_sum2[j] / count; an expert that saw no token gets weights of 1. The binary file has
one count a tensor, all experts' columns in a row. Source: llama.cpp, common/imatrix-loader.cpp and quantize.cpp.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch

from dgq.quant.errors import InputError, printable
from dgq.quant.files.gguf_file import GGUFReader

MAX_IMPORTANCE = 1e20  # mean squares; ggml multiplies them by squared weights in float32, which end at 3e38
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """weights: GGUF tensor name -> float32 (in,) or (E, in), or (E * in,) before it is fitted to a model; unseen: how
    many matrices no token went through; the rest is what a quantised file records of it."""

    file: str
    datasets: tuple[str, ...]
    chunks: int
    weights: dict[str, torch.Tensor]
    unseen: int = 0

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> Imatrix:
        """With weights in the shapes of the model's: (in,) for a matrix, (E, in) for experts. shapes: the model's
        tensors. InputError for an entry that none of them fits."""
        weights = {}
        for name, importance in self.weights.items():
            shape = shapes.get(name)
            if shape is None:
                raise InputError(f"{self.file}: has an entry for {printable(name)}, which this model does not have")
            wanted = shape if len(shape) == 1 else (*shape[:-2], shape[-1])
            if importance.numel() != math.prod(wanted) or (importance.dim() > 1 and tuple(importance.shape) != wanted):
                raise InputError(
                    f"{self.file}: {name} has importance {list(importance.shape)} for a weight of {list(shape)}"
                )
            weights[name] = importance.reshape(wanted)
        return replace(self, weights=weights)


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix file of either kind; InputError if it is none or an entry is malformed."""
    try:
        with path.open("rb") as file:
            binary = file.read(4) not in (b"GGUF", b"")
    except OSError:
        binary = False  # which the reader of GGUF says better
    datasets, chunks, entries = _binary(path) if binary else _gguf(path)
    weights, unseen = {}, 0
    for name, sums, counts in entries:
        for kind, values in ((SUMS, sums), (COUNTS, counts)):
            if not (torch.isfinite(values) & (values >= 0)).all():
                raise InputError(f"{path}: {name}{kind} holds values that are negative or not finite")
        if ((sums == 0).all(-1, keepdim=True) & (counts > 0)).any():
            raise InputError(f"{path}: {name} has tokens but an importance of 0 in every column")
        mean = torch.where(counts > 0, sums / counts.clamp(min=1e-30), 1.0)
        if (mean > MAX_IMPORTANCE).any():
            raise InputError(f"{path}: {name} has an importance of {float(mean.max()):.3g}, beyond {MAX_IMPORTANCE:g}")
        unseen += int((counts == 0).sum())
        weights[name] = mean if len(counts) > 1 else mean[0]
    if not weights:
        raise InputError(f"{path}: holds no importance entries")
    names = tuple(PurePath(dataset).name for dataset in datasets)  # llama-imatrix notes paths
    return Imatrix(str(path), names, chunks, weights, unseen)


Entries = Iterator[tuple[str, torch.Tensor, torch.Tensor]]  # name, sums (n, in), counts (n, 1)


def _gguf(path: Path) -> tuple[tuple[str, ...], int, Entries]:
    reader = GGUFReader(path)
    meta: dict[str, Any] = reader.metadata
    if meta.get("general.type") != "imatrix":
        raise InputError(
            f"{path}: general.type is {meta.get('general.type')!r}, not 'imatrix'; pass a GGUF imatrix file"
        )
    datasets, chunks = meta.get("imatrix.datasets", []), meta.get("imatrix.chunk_count", 0)
    if not (isinstance(datasets, list) and all(isinstance(one, str) for one in datasets) and isinstance(chunks, int)):
        raise InputError(f"{path}: imatrix.datasets is no list of names, or imatrix.chunk_count no number")
    return tuple(datasets), chunks, _gguf_entries(path, reader)


def _gguf_entries(path: Path, reader: GGUFReader) -> Entries:
    for name in (name for name in reader if name.endswith(COUNTS)):
        if name.removesuffix(COUNTS) + SUMS not in reader:
            raise InputError(f"{path}: {name} comes without {name.removesuffix(COUNTS)}{SUMS}")
    for name in (name.removesuffix(SUMS) for name in reader if name.endswith(SUMS)):
        if name + COUNTS not in reader:
            raise InputError(f"{path}: {name}{SUMS} comes without {name}{COUNTS}")
        if any(reader[name + kind].scheme.name != "f32" for kind in (SUMS, COUNTS)):
            raise InputError(f"{path}: {name} holds sums or counts that are not F32")
        sums = reader[name + SUMS].dequantize()
        counts = reader[name + COUNTS].dequantize().reshape(-1, 1)
        if sums.dim() > 2 or counts.numel() != (sums.shape[0] if sums.dim() == 2 else 1):
            raise InputError(f"{path}: {name} has {counts.numel()} counts for sums of shape {list(sums.shape)}")
        yield name, sums.reshape(len(counts), -1), counts


def _binary(path: Path) -> tuple[tuple[str, ...], int, Entries]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0

        def number(least: int, most: int) -> int:
            nonlocal at
            at += 4
            value = int(struct.unpack_from("<i", data, at - 4)[0]) if at <= len(data) else -1
            if not least <= value <= most:
                raise InputError(
                    f"{path}: neither a GGUF nor a whole binary imatrix (byte {at - 4}); truncated or damaged"
                )
            return value

        def text(least: int) -> str:
            nonlocal at
            length = number(least, len(data) - at - 4)
            at += length
            return data[at - length : at].decode("utf-8", "replace").rstrip("\0")

        entries = []
        for _ in range(number(1, len(data))):
            name, calls, values = text(1), number(-(1 << 31), (1 << 31) - 1), number(1, (len(data) - at - 4) // 4)
            sums = torch.frombuffer(bytearray(data[at : at + 4 * values]), dtype=torch.float32).unsqueeze(0)
            at += 4 * values
            entries.append((name, sums, torch.full((1, 1), max(calls, 1), dtype=torch.float32)))
        chunks, dataset = (number(0, 1 << 30), text(0)) if at < len(data) else (0, "")
    return (dataset,) if dataset else (), chunks, iter(entries)


def write_imatrix(
    path: Path, entries: Mapping[str, tuple[torch.Tensor, torch.Tensor]], dataset: str, chunks: int, size: int
) -> None:
    """entries: GGUF tensor name -> in_sum2 (E or 1, in), counts (E or 1,) float32. chunks: and the tokens in each, as
    llama-imatrix counts its texts. The file appears when it is whole."""
    import gguf

    partial = path.with_name(f".{path.name[:200]}.partial")
    writer = gguf.GGUFWriter(partial, "")
    writer.kv_data[0].clear()  # of no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for name, (sums, counts) in entries.items():
        lone = len(counts) == 1
        writer.add_tensor(name + SUMS, (sums[0] if lone else sums).contiguous().numpy())
        writer.add_tensor(name + COUNTS, (counts if lone else counts.unsqueeze(-1)).contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
