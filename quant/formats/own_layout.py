"""dgq's own safetensors layout: any matrix of the text model in NVFP4 or in 8 bits. No other program opens it.

    …layers.L.experts.gate_up_proj (E, 2I, H)  NVFP4  ->  modelopt's tensors, an expert at a time (modelopt.py)
    …layers.L.mlp.up_proj.weight   (I, H)      NVFP4  ->  modelopt's tensors of a Linear, but for weight_scale_2: each
                                                          matrix has its own; modelopt gives q, k, v one, and gate, up
    …embed_tokens.weight           (V, H)      Q8_0   ->  the same name, U8 [V, H/32 * 34]: ggml's blocks, row by row

    config.json  "quantization_config": {"quant_method": "dgq", "version": 1, "opens_in": …, "q8_0": [names of weights]}

8 bits are Q8_0's because rows of its blocks are looked up, multiplied and added without decoding the table, by kernels
that GGUF files have already; and a scale for 32 weights loses less than one a row. A quant_method that nobody else
knows is on purpose: under modelopt's a loader would take what it knows and leave the rest random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dgq.quant.errors import InputError
from dgq.quant.formats.modelopt import Modelopt
from dgq.quant.schemes.ggml.q8_0 import Q8_0
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import Entry, Packed, Scheme, Stored

METHOD, VERSION = "dgq", 1
ONLY_DGQ = "dgq only: vLLM, SGLang, transformers and llama.cpp have no loader for this layout"
_NVFP4 = Modelopt(activations=False)


@dataclass(frozen=True)
class OwnLayout:
    """The layout. q8_0: names of the weights in 8 bits; what else is quantised is NVFP4."""

    q8_0: frozenset[str]

    @property
    def slices(self) -> Scheme:
        return NVFP4

    def scheme_of(self, name: str) -> Scheme:
        return Q8_0 if name in self.q8_0 else NVFP4

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        return (name in self.q8_0 and len(shape) > 1) or _NVFP4.holds(name, shape)

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        if name in self.q8_0:
            return {name: ("U8", (*shape[:-1], shape[-1] // Q8_0.block * Q8_0.block_bytes))}
        return _NVFP4.entries(name, shape)

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        if name in self.q8_0:
            yield name, piece.parts[""]
        else:
            yield from _NVFP4.split(name, shape, piece, start)

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight. InputError for scales no quantiser writes."""
        return _eight_bits(name, shape, stored) if name in self.q8_0 else _NVFP4.join(name, shape, stored)


def _eight_bits(name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
    blocks = stored.tensor(name)
    scales = blocks.view(-1, Q8_0.block_bytes)[:, :2].contiguous().view(torch.float16)
    if not bool(scales.isfinite().all()):
        row = int((~scales.isfinite()).nonzero()[0, 0]) // (shape[-1] // Q8_0.block)
        raise InputError(f"{stored.file(name)}: {name} holds a scale that is no number in row {row}; damaged")
    return Packed(Q8_0, shape, {"": blocks})


def quantization_config(layout: OwnLayout, version: str) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "opens_in": ONLY_DGQ,
        "q8_0": sorted(layout.q8_0),
        "producer": {"name": "dgq", "version": version},
    }


def layout_of(config: Mapping[str, Any], source: str) -> OwnLayout:
    """Of such a quantization_config. InputError naming `source` for one that dgq does not write."""
    if config.get("version") != VERSION:
        was = repr(config.get("version"))[:40]
        raise InputError(f"{source}: dgq's layout in version {was}; this dgq reads {VERSION}, take a newer one")
    names = config.get("q8_0")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source}: quantization_config has no q8_0, a list of weights' names; fetch the file again")
    return OwnLayout(frozenset(names))
