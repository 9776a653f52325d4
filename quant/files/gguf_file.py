"""GGUF files: a header of typed key-values, a table of tensors, then their bytes, 32-byte aligned.

The writer has the gguf package make the header: all names, shapes and schemes are announced first, so that every
tensor's place is known and its bytes can follow a slice at a time; no tensor is ever whole in memory.
GGUF counts dimensions backwards (row length first); everything here is in torch's order.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dgq.quant.errors import InputError
from dgq.quant.files.places import Places
from dgq.quant.schemes.gguf_guests import Guest, guest, received
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed, Scheme

SCHEME_OF_TYPE = {scheme.ggml.name: scheme for scheme in SCHEMES.values() if scheme.ggml}
ALIGNMENT = 32  # of tensors in files we write


@dataclass(frozen=True)
class KV:
    """One metadata value with its GGUF type: "uint32", "float32", "bool", "string", or "[int32]" for an array."""

    value: Any
    type: str


class GGUFWriter:
    """Writes one GGUF file: metadata and all tensors' places first, then their bytes."""

    def __init__(
        self,
        path: Path,
        arch: str,
        metadata: Mapping[str, KV],
        plan: Mapping[str, tuple[tuple[int, ...], Scheme]],
        places: Places | None = None,
    ) -> None:
        """plan: name -> shape and scheme, in the file's order. Of a file that is there already the tensors stay.
        places: of another file, written by the same hand."""
        self.places = Places() if places is None else places
        header = _header(arch, metadata, plan)
        spans: dict[str, tuple[int, int]] = {}
        end = len(header)
        for name, (shape, scheme) in plan.items():
            spans[name] = (end, end + scheme.nbytes(shape))
            end = -(-spans[name][1] // ALIGNMENT) * ALIGNMENT
        file = self.places.open(path, header, end)
        for name, (start, stop) in spans.items():
            self.places.add(name, file, start, stop)

    def append(self, name: str, piece: Packed) -> None:
        """The next slice of a tensor along its first axis."""
        self.places.append(name, piece.parts[""])

    def close(self) -> None:
        """RuntimeError if a tensor is incomplete."""
        self.places.close()


def _header(arch: str, metadata: Mapping[str, KV], plan: Mapping[str, tuple[tuple[int, ...], Scheme]]) -> bytes:
    """Everything before the tensors' bytes, aligned, as the gguf package writes it."""
    import gguf

    types = gguf.GGUFValueType
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, arch)
        for key, kv in metadata.items():
            if kv.type.startswith("["):
                writer.add_key_value(key, kv.value, types.ARRAY, types[kv.type[1:-1].upper()])
            else:
                writer.add_key_value(key, kv.value, types[kv.type.upper()])
        for name, (shape, scheme) in plan.items():
            if scheme.ggml is None:
                raise ValueError(f"{name}: a GGUF has no type for {scheme.name}")
            raw = gguf.GGMLQuantizationType(scheme.ggml.id)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), scheme.nbytes(shape), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + b"\0" * (-len(header) % ALIGNMENT)


# GGUF's scalar types: bool 7 and the numbers, little endian
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # as gguf-split names them


def is_later_part(path: Path) -> bool:
    """Whether it is by its name a part of a file that gguf-split cut, and the first lies beside it."""
    match = _PART.fullmatch(path.name)
    return match is not None and int(match[2]) > 1 and path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf").is_file()


class _Header:
    """Reads a GGUF header value by value, and believes no length: what reaches beyond the file is a ValueError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def take(self, count: int) -> bytes:
        at = self._file.tell()
        if count > self._size - at:
            raise ValueError(f"the header announces {count} bytes at byte {at} of {self._size}")
        return self._file.read(count)

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def string(self) -> str:
        return self.take(self.number(8)).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(kind, 1)[0]
        element, count = self.number(4), self.number(8)
        if element != _STRING:
            return self.scalars(element, count)
        if 8 * count > self._size:
            raise ValueError(f"the header announces {count} strings in {self._size} bytes")
        return [self.string() for _ in range(count)]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        dtype = np.dtype(_SCALARS[kind])
        return list(np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist())

    def position(self) -> int:
        return self._file.tell()


@dataclass(frozen=True)
class _Tensor:
    """A line of the tensor table: ggml's name of the type, and the bytes in the file."""

    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int


class GGUFReader(Mapping[str, Packed]):
    """A GGUF file: `.metadata` (key -> plain Python value) and a mapping tensor name -> Packed, mapped, not loaded.

    The header is read here and not by the gguf package, which takes 24 s for a vocabulary of 262,144 and trusts every
    length; the two are compared in the tests. A file that gguf-split cut is opened by its first part, with the others
    beside it. files: all of them.
    """

    def __init__(self, path: Path, whole: bool = True) -> None:
        """whole: not as a part of one."""
        self.path = path
        self.files = [path]
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, _Tensor] = {}
        if not path.is_file():
            raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: is no file")
        try:
            with path.open("rb") as file:
                self._parse(_Header(file, path.stat().st_size), path.stat().st_size)
            data = np.memmap(path, dtype=np.uint8, mode="c")  # copy-on-write: torch wants writable memory
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: not readable as GGUF ({error}); truncated or damaged, fetch it again") from None
        self._data = dict.fromkeys(self._tensors, data)
        if whole:
            self._join()

    def _join(self) -> None:
        """Add the tensors of the other parts. InputError for a part that is missing, another's, or not the first."""
        count, number = (self.metadata.get(f"split.{key}", 0) for key in ("count", "no"))
        if type(count) is not int or type(number) is not int:
            raise InputError(f"{self.path}: split.count and split.no are no numbers; damaged, fetch it again")
        if count in (0, 1):
            return
        match = _PART.fullmatch(self.path.name)
        if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
            said = f"is part {number + 1} of {count}, whose name ends in -{number + 1:05d}-of-{count:05d}.gguf"
            raise InputError(f"{self.path}: {said}; give it its name back")
        names = [f"{match[1]}-{part + 1:05d}-of-{count:05d}.gguf" for part in range(count)]
        if number:
            raise InputError(f"{self.path}: is part {number + 1} of {count}; name the first, {names[0]}")
        for part, name in enumerate(names[1:], 1):
            other = GGUFReader(self.path.with_name(name), whole=False)
            if [other.metadata.get(f"split.{key}") for key in ("count", "no")] != [count, part]:
                raise InputError(f"{other.path}: is not part {part + 1} of {count}, as its name says; fetch it again")
            if twice := self._tensors.keys() & other.keys():
                raise InputError(f"{other.path}: tensor {min(twice)} lies in a part before it; fetch them again")
            self._tensors |= other._tensors
            self._data |= other._data
            self.files.append(other.path)
        if (told := self.metadata.get("split.tensors.count")) not in (None, len(self)):
            raise InputError(f"{self.path}: its {count} parts hold {len(self)} tensors, not {told}; fetch them again")

    def _parse(self, header: _Header, size: int) -> None:
        if header.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := header.number(4)) not in (2, 3):
            raise ValueError(f"version {version}, not 2 or 3")
        tensors, keys = header.number(8), header.number(8)
        for _ in range(keys):
            key = header.string()
            if key in self.metadata:
                raise ValueError(f"key {key} stands there twice")
            self.metadata[key] = header.value(header.number(4))
        table = [self._line(header) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-header.position() // alignment) * alignment
        for name, shape, kind, offset, nbytes in table:
            start = base + offset
            if name in self._tensors:
                raise ValueError(f"tensor {name} stands there twice")
            if offset % alignment or start + nbytes > size:
                raise ValueError(f"tensor {name} lies at bytes {start} to {start + nbytes} of {size}")
            self._tensors[name] = _Tensor(shape, kind, start, start + nbytes)

    def _line(self, header: _Header) -> tuple[str, tuple[int, ...], str, int, int]:
        import gguf

        name, dims = header.string(), header.number(4)
        if not 1 <= dims <= 4:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed([header.number(8) for _ in range(dims)]))
        kind = gguf.GGMLQuantizationType(header.number(4))  # ValueError if unknown
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} are no multiple of {kind.name}'s block of {block}")
        return name, shape, kind.name, header.number(8), math.prod(shape) // block * block_bytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def scheme(self, name: str) -> Scheme:
        """As the file holds it; a Guest is another thing once it is read. InputError if nobody can decode it."""
        kind = self._tensors[name].kind
        scheme: Scheme | None = SCHEME_OF_TYPE.get(kind) or guest(kind)
        if scheme is None:
            raise InputError(
                f"{self.path}: {name} has ggml type {kind}, which neither dgq nor gguf-py decodes; convert it anew"
            )
        return scheme

    def nbytes(self, name: str) -> int:
        return self._tensors[name].stop - self._tensors[name].start

    def __getitem__(self, name: str) -> Packed:
        scheme, tensor = self.scheme(name), self._tensors[name]
        raw = torch.from_numpy(self._data[name][tensor.start : tensor.stop])
        if isinstance(scheme, Guest):
            rows = raw.view(*tensor.shape[:-1], scheme.nbytes(tensor.shape[-1:]))
            return received(scheme, tensor.shape, rows, f"{self.path}: {name}")
        if scheme.block == 1:
            return Packed(scheme, tensor.shape, {"": raw.view(scheme.dtype).view(tensor.shape)})  # type: ignore[attr-defined]
        return Packed(scheme, tensor.shape, {"": raw.view(*tensor.shape[:-1], scheme.nbytes(tensor.shape[-1:]))})
