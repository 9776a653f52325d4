"""A .gguf's weights under their canonical names, with the vision tower that lies beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.quant.schemes.gguf_guests import Guest, stays_packed
from dgq.quant.types import Packed
from dgq.runtime.files.mmproj import Mmproj, mmproj_name
from dgq.runtime.files.weights import MIB, Stored, Weights
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import ROPE_FREQS, VISION, check_tensors, expected_tensors, gguf_name, hf_name


class GGUFWeights(Weights):
    """A .gguf's tensors under their canonical names, checked against the config when made. mmproj: its vision tower."""

    def __init__(self, reader: GGUFReader, config: ModelConfig, mmproj: Mmproj | None = None) -> None:
        """InputError naming the tensor as the .gguf does: missing, unknown, renamed, mis-shaped, or another RoPE."""
        self.reader, self.mmproj = reader, mmproj
        self._names: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for stored_name in reader:
            if stored_name != ROPE_FREQS:
                # An unknown name stays as it is, and check_tensors() refuses it.
                name = hf_name(stored_name) or stored_name
                if name in self._names:
                    raise InputError(
                        f"{reader.path}: {stored_name} and {self._names[name]} are two names of one tensor"
                    )
                self._names[name] = stored_name
                shapes[name] = reader.shape(stored_name)
        expected = expected_tensors(config)
        check_tensors(shapes, expected, str(reader.path), shown=self.own_name)
        _check_rope(reader, config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Packed:
        return self.reader[self._names[name]]

    def everything(self) -> dict[str, Stored]:
        stored = {name: self._stored(self.reader, stored_name) for name, stored_name in self._names.items()}
        if self.mmproj is not None:
            stored |= {name: self._stored(self.mmproj.reader, mmproj_name(name)) for name in self.mmproj.shapes}
        return stored

    @staticmethod
    def _stored(reader: GGUFReader, name: str) -> Stored:
        return Stored(reader.scheme(name).name, math.prod(reader.shape(name)), reader.nbytes(name))

    def vision_tensor(self, name: str) -> Tensor:
        assert self.mmproj is not None
        return self.mmproj.tensor(name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The ggml types that have no kernels, and the memory that decoding them costs."""
        decoded = {
            name: scheme
            for name in self._names.values()
            if isinstance(scheme := self.reader.scheme(name), Guest) and not stays_packed(scheme)
        }
        if not decoded:
            return ()
        kinds = ", ".join(sorted({scheme.name.upper() for scheme in decoded.values()}))
        stored = sum(map(self.reader.nbytes, decoded)) / MIB
        taken = sum(2 * math.prod(self.reader.shape(name)) for name in decoded) / MIB
        return (
            f"{self.reader.path.name}: {len(decoded)} tensors are {kinds}, which dgq has no kernels for: decoded to "
            f"BF16 when loaded, they take {taken:,.1f} MiB of memory instead of the file's {stored:,.1f}",
        )

    def own_name(self, name: str) -> str:
        return self._names.get(name) or (mmproj_name(name) if name.startswith(VISION) else gguf_name(name) or name)

    @property
    def files(self) -> list[Path]:
        return [*self.reader.files, *([self.mmproj.reader.path] if self.mmproj else [])]


def _check_rope(reader: GGUFReader, config: ModelConfig) -> None:
    """rope_freqs.weight divides full layers' frequencies: 1 for angles that turn, 1e30 for those that stand still."""
    half = config.layers[-1].head_dim // 2
    if ROPE_FREQS not in reader:
        raise InputError(f"{reader.path}: tensor {ROPE_FREQS} is missing")
    factors = reader[ROPE_FREQS].dequantize().flatten()
    turning = int((factors == 1).sum())
    if len(factors) != half or turning != config.rope_angles or not bool((factors[turning:] >= 1e29).all()):
        raise InputError(
            f"{reader.path}: tensor {ROPE_FREQS} lets {turning} of {len(factors)} angles turn, the config says "
            f"{config.rope_angles} of {half}"
        )
