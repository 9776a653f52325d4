"""A directory of safetensors files, read as headers first and bytes later.

    model.safetensors                                one file, or
    model.safetensors.index.json + shards            {"weight_map": {tensor name: file name}}

    a file:  u64 header length | JSON {name: {dtype, shape, data_offsets}} | payload

Opening reads and checks the headers only: lengths against the file's size, offsets against each other and against
shape × dtype, the index against what the shards really hold. Whatever is wrong is an InputError naming file and
tensor. Bytes are mapped, not loaded: `HFDir[name]` is a view until somebody computes with it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch

from dgq.quant.errors import InputError
from dgq.quant.files.positions import read_at
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed, Spec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE, _READERS = 1 << 26, 4  # bytes read by one of so many threads
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_JSON = 40_000_000  # bytes; twice the index of 184,320 expert tensors. Lists in a list take 21 times as much memory
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}
FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}  # safetensors dtype -> scheme


LFS_POINTER = b"version https://git-lfs"
BOM = b"\xef\xbb\xbf"  # that some editors put in front of UTF-8


def refuse_pointer(path: Path, start: bytes) -> None:
    """InputError if a file that begins so is git-LFS's pointer to it."""
    if start.startswith(LFS_POINTER[:8]) and LFS_POINTER.startswith(start[: len(LFS_POINTER)]):
        raise InputError(f"{path}: is git-LFS's pointer to the file, not the file; run `git lfs pull` in its folder")


def read_whole(path: Path, most: int) -> bytes:
    """A file's bytes. OSError if it is no file (a pipe waits, a device never ends), ValueError if longer than most."""
    size = path.stat().st_size
    if not path.is_file():
        raise OSError("is no plain file")
    if size > most:
        raise ValueError(f"{size} bytes, expected {most} at most")
    with path.open("rb") as file:
        return file.read(size)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if it is missing, unreadable or no object."""
    try:
        raw = read_whole(path, MAX_JSON)
        refuse_pointer(path, raw)
        data = json.loads(raw)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); fetch the file again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, not a JSON object")
    return data


@dataclass(frozen=True)
class Elsewhere:
    """Files that are not in the directory. sizes: name -> bytes; start: the first bytes of one, with its header."""

    sizes: Mapping[str, int]
    start: Callable[[str], bytes]


def read_header(path: Path, elsewhere: Elsewhere | None = None) -> dict[str, Spec]:
    """Every tensor a safetensors file announces, in file order of their bytes."""
    try:
        if elsewhere is None:
            size = path.stat().st_size
            if not path.is_file():
                raise OSError("is no plain file")
            with path.open("rb") as file:
                start = file.read(8)
                start += file.read(_header_length(path, start, size))
        else:
            size, start = elsewhere.sizes[path.name], elsewhere.start(path.name)
        length = _header_length(path, start, size)
        header = json.loads(start[8 : 8 + length])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the download is incomplete") from None
    except KeyError:
        raise InputError(f"{path.name}: is in the index, and not among the Hub's files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable safetensors header ({error}); fetch the file again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: unreadable safetensors header (not a JSON object); fetch the file again")
    header.pop("__metadata__", None)
    base = 8 + length
    specs = sorted((_spec(path, name, entry, base) for name, entry in header.items()), key=lambda s: (s.start, s.stop))
    end = base
    for spec in specs:
        if spec.start != end:
            raise InputError(
                f"{path}: {spec.name} starts at byte {spec.start}, not {end} where the tensor before it ends"
            )
        end = spec.stop
    if end != size:
        raise InputError(f"{path}: {size} bytes, but its header announces {end}; truncated or damaged, fetch it again")
    return {spec.name: spec for spec in specs}


def _header_length(path: Path, start: bytes, size: int) -> int:
    refuse_pointer(path, start)
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise InputError(
            f"{path}: header length {length} does not fit a file of {size} bytes; truncated, or not safetensors"
        )
    return length


def _spec(path: Path, name: str, entry: Any, base: int) -> Spec:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        natural = all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        natural = False
    if not natural:
        raise InputError(f"{path}: {name} has a malformed header entry {str(entry)[:80]}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path}: {name} has dtype {str(dtype)[:20]!r}, which dgq does not know")
    spec = Spec(name, shape, dtype, path, base + start, base + stop)
    nbytes = spec.numel * DTYPES[dtype].itemsize
    if nbytes != stop - start:
        raise InputError(f"{path}: {name} {dtype} {list(shape)} takes {nbytes} bytes, not {stop - start}")
    return spec


def read_index(
    path: Path, spare: Callable[[str], bool] | None = None, elsewhere: Elsewhere | None = None
) -> dict[str, Spec]:
    """All tensors of a directory: by its index if it has one, else of its single file. spare: whether the index may
    list a name that no file holds, as it does for tied weights; none, unless given. elsewhere: the files of weights."""
    index = path / INDEX
    single = (path / SINGLE).is_file() if elsewhere is None else SINGLE in elsewhere.sizes
    if index.is_file() and single:
        raise InputError(f"{path}: holds both {SINGLE} and {INDEX}; one of them is stale, remove it")
    if not index.is_file():
        if not single:
            raise InputError(f"{path}: holds neither {SINGLE} nor {INDEX}; is this a checkpoint directory?")
        return read_header(path / SINGLE, elsewhere)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; fetch the file again")
    shards: dict[str, dict[str, Spec]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {name} lies in {str(file)[:80]!r}, which is no file name inside the directory")
        if file not in shards:
            shards[file] = read_header(path / file, elsewhere)
        if name not in shards[file] and not (spare and spare(name)):
            raise InputError(f"{index}: says {name} is in {file}, but that file does not hold it")
    for file, specs in shards.items():
        for name in specs:
            if weight_map.get(name) != file:
                raise InputError(
                    f"{path / file}: holds {name}, which {INDEX} does not place there; remove it or fix the index"
                )
    return {name: spec for specs in shards.values() for name, spec in specs.items()}


class HFDir(Mapping[str, Packed]):
    """A safetensors directory as a mapping name -> Packed, mapped into memory and read on use.

    specs: every tensor's header entry. Float tensors only: others raise InputError when they are asked for.
    """

    def __init__(self, path: Path, specs: dict[str, Spec] | None = None) -> None:
        """specs: header entries that were read elsewhere, of files that are not in `path` (a plan of a remote one)."""
        self.path = path
        self._readers: dict[Path, BinaryIO] = {}
        self._lock = Lock()
        self.specs = read_index(path) if specs is None else specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @cached_property
    def _files(self) -> dict[Path, np.memmap[Any, np.dtype[np.uint8]]]:
        return {}

    def __getitem__(self, name: str) -> Packed:
        spec = self.specs[name]
        if spec.dtype not in FLOATS:
            raise InputError(f"{spec.file}: {name} has dtype {spec.dtype}; expected BF16, F16 or F32")
        return Packed(SCHEMES[FLOATS[spec.dtype]], spec.shape, {"": self.tensor(name)})

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor, as it lies on disk: a view of the mapped file (a copy where the file does not align it)."""
        spec = self.specs[name]
        dtype = DTYPES[spec.dtype]
        if not spec.numel:
            return torch.empty(spec.shape, dtype=dtype)
        if spec.file not in self._files:
            self._files[spec.file] = np.memmap(spec.file, dtype=np.uint8, mode="c")
        raw = torch.from_numpy(self._files[spec.file][spec.start : spec.stop])
        if spec.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(spec.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a float tensor along its first axis, read into memory of their own (a scalar counts as one row).

        What is mapped counts as resident for as long as it is mapped; a conversion that reads stays small. InputError
        if the file ends early. Thread-safe.
        """
        spec = self.specs[name]
        shape = spec.shape or (1,)
        row = (spec.stop - spec.start) // shape[0]
        raw = torch.empty((stop - start) * row, dtype=torch.uint8)
        at = spec.start + start * row
        pieces = range(0, len(raw), _PIECE)
        if len(pieces) > 1:  # memory that is new is slow to touch: by several threads, less so
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda first: self._fill(spec, name, raw[first : first + _PIECE], at + first), pieces))
        else:
            self._fill(spec, name, raw, at)
        return raw.view(DTYPES[spec.dtype]).view(stop - start, *shape[1:])

    def row(self, name: str, *at: int) -> torch.Tensor:
        """One row (in,) of a matrix, or of one of a stack of them: row(name, expert, row)."""
        spec = self.specs[name]
        size = (spec.stop - spec.start) // math.prod(spec.shape[:-1])
        number = functools.reduce(lambda number, axis: number * spec.shape[axis] + at[axis], range(len(at)), 0)
        raw = torch.empty(size, dtype=torch.uint8)
        self._fill(spec, name, raw, spec.start + number * size)
        return raw.view(DTYPES[spec.dtype])

    def _fill(self, spec: Spec, name: str, raw: torch.Tensor, at: int) -> None:
        view = raw.numpy().data
        while view:
            count = read_at(self._reader(spec.file), view, at)
            if not count:
                raise InputError(f"{spec.file}: ends at byte {at}, inside {name}; it changed while it was read")
            view, at = view[count:], at + count

    def _reader(self, file: Path) -> BinaryIO:
        with self._lock:
            if file not in self._readers:
                self._readers[file] = file.open("rb", buffering=0)
            return self._readers[file]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.specs[name].file
