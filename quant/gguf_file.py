"""GGUF files: a header of typed key-values, a table of tensors, then their bytes, 32-byte aligned.

Both directions go through the gguf package. The writer streams: all names, shapes and schemes are announced first,
then each tensor's bytes follow in that order, a slice at a time, so that no tensor is ever whole in memory.
GGUF counts dimensions backwards (row length first); everything here is in torch's order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed, Scheme


@dataclass(frozen=True)
class KV:
    """One metadata value with its GGUF type: "uint32", "float32", "bool", "string", or "[int32]" for an array."""

    value: Any
    type: str


class GGUFWriter:
    """Writes one GGUF file: metadata and all tensors' plan first, then `append`, slice by slice in the plan's order."""

    def __init__(
        self, path: Path, arch: str, metadata: Mapping[str, KV], plan: Mapping[str, tuple[tuple[int, ...], Scheme]]
    ) -> None:
        import gguf

        self._writer = gguf.GGUFWriter(path, arch)
        types = gguf.GGUFValueType
        for key, kv in metadata.items():
            if kv.type.startswith("["):
                self._writer.add_key_value(key, kv.value, types.ARRAY, types[kv.type[1:-1].upper()])
            else:
                self._writer.add_key_value(key, kv.value, types[kv.type.upper()])
        for name, (shape, scheme) in plan.items():
            raw = gguf.GGMLQuantizationType[scheme.name.upper()]
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), scheme.nbytes(shape), raw)
        self._pending = {name: scheme.nbytes(shape) for name, (shape, scheme) in plan.items()}
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._file = self._writer.fout[0]
        self._align()

    def _align(self) -> None:
        self._writer.write_padding(self._file, self._file.tell())

    def append(self, name: str, piece: Packed) -> None:
        """The next slice (along the first axis) of the next tensor of the plan."""
        data = piece.parts[""].contiguous().view(torch.uint8).numpy()
        if next(iter(self._pending), None) != name or data.nbytes > self._pending[name]:
            raise ValueError(f"{name}: not the next tensor of the plan, or longer than planned")
        self._file.write(data.data)
        self._pending[name] -= data.nbytes
        if not self._pending[name]:
            del self._pending[name]
            self._align()

    def close(self) -> None:
        """Flush to disk. Closing before every planned byte was added is a ValueError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._writer.close()
        if self._pending:
            raise ValueError(
                f"{len(self._pending)} planned tensors were not written, {next(iter(self._pending))} first"
            )


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a scalar, by GGUF type
_STRING, _ARRAY = 8, 9


def _check_header(path: Path) -> None:
    """Walk the key-values before the gguf package does, which believes every length it reads: a lying one would
    have it loop for hours. ValueError if a string or an array reaches beyond the file."""
    size = path.stat().st_size
    with path.open("rb") as file:

        def number(count: int) -> int:
            data = file.read(count)
            if len(data) < count:
                raise ValueError("the header reaches beyond the end of the file")
            return int.from_bytes(data, "little")

        def skip(count: int) -> None:
            if count > size - file.tell():
                raise ValueError(f"the header announces {count} bytes at byte {file.tell()} of {size}")
            file.seek(count, os.SEEK_CUR)

        def value(kind: int) -> None:
            if kind in _SIZES:
                skip(_SIZES[kind])
            elif kind == _STRING:
                skip(number(8))
            elif kind == _ARRAY:
                element, count = number(4), number(8)
                if element in _SIZES:
                    skip(count * _SIZES[element])
                elif element == _STRING and 8 * count <= size:
                    for _ in range(count):
                        skip(number(8))
                else:
                    raise ValueError(f"an array of {count} elements of type {element}")
            else:
                raise ValueError(f"value type {kind} is unknown")

        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        number(4)
        tensors, keys = number(8), number(8)
        if 24 * tensors + 12 * keys > size:
            raise ValueError(f"{tensors} tensors and {keys} keys in {size} bytes")
        for _ in range(keys):
            skip(number(8))
            value(number(4))


class GGUFReader(Mapping[str, Packed]):
    """A GGUF file: `.metadata` (key -> plain Python value) and a mapping tensor name -> Packed, mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            if not path.is_file():
                raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: is no file")
            _check_header(path)
            reader = gguf.GGUFReader(path, "c")  # copy-on-write: torch wants writable memory
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except InputError:
            raise
        except Exception as error:  # the package raises whatever a damaged file leads it into
            raise InputError(f"{path}: not readable as GGUF ({error}); truncated or damaged, fetch it again") from None
        if len(self._tensors) != len(reader.tensors):
            raise InputError(f"{path}: names a tensor twice")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def scheme(self, name: str) -> Scheme:
        kind = self._tensors[name].tensor_type.name.lower()
        if kind not in SCHEMES:
            raise InputError(
                f"{self.path}: {name} has ggml type {kind.upper()}, which dgq does not decode yet; convert it anew"
            )
        return SCHEMES[kind]

    def __getitem__(self, name: str) -> Packed:
        scheme, shape = self.scheme(name), self.shape(name)
        raw = torch.from_numpy(np.asarray(self._tensors[name].data).view(np.uint8).reshape(-1))
        if scheme.block == 1:
            return Packed(scheme, shape, {"": raw.view(scheme.dtype).view(shape)})  # type: ignore[attr-defined]
        return Packed(scheme, shape, {"": raw.view(*shape[:-1], scheme.nbytes(shape[-1:]))})
