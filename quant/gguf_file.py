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


class GGUFReader(Mapping[str, Packed]):
    """A GGUF file: `.metadata` (key -> plain Python value) and a mapping tensor name -> Packed, mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            if not path.is_file():
                raise InputError(f"{path}: no such file")
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
