"""Packed weights that share their input, joined into one product for the kernels; the reference reads them from there.

    q ─┐                                              ┌─ q    Repacked: the rows are decoded from the product's tiles
    k ─┼─ pack ─> one product, a launch for each  ─── ┼─ k    whenever the reference asks for them
    v ─┘          scheme among them                   └─ v
    gate ─┬─ pack_gated ─> one product whose rows alternate, or both weights side by side
    up ───┘

The packed weights are forgotten once their product is made, so that there are never two copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgq.quant.schemes.dense import BF16
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles, natural_order
from dgq.runtime.model.layers import DECODE_BUDGET
from dgq.runtime.shape.names import DECODER

if TYPE_CHECKING:
    from dgq.runtime.kernels.dense import Gated, Linear, Table


# The name of each product below "layers.N." or "self_conditioning.", and the weights that it multiplies with.
PRODUCTS = {
    "self_attn.qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "self_attn.o": ("self_attn.o_proj.weight",),
    "mlp.gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down": ("mlp.down_proj.weight",),
    "self_conditioning.gate_up": ("self_conditioning.gate_proj.weight", "self_conditioning.up_proj.weight"),
    "self_conditioning.down": ("self_conditioning.down_proj.weight",),
}


@dataclass(frozen=True)
class Repacked(Packed):
    """A weight whose parts went into a product. read() decodes it from there, to bfloat16."""

    read: Callable[[], Tensor] = field(default=lambda: torch.empty(0), kw_only=True)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.read().to(dtype)


def products_of(names: Collection[str]) -> dict[str, list[str]]:
    """The full name of each product -> the weights that it joins. The qkv of a full layer has no v."""
    products: dict[str, list[str]] = {}
    for name in names:
        for product, members in PRODUCTS.items():
            ends = (member for member in members if name == DECODER + member or name.endswith("." + member))
            suffix = next(ends, None)
            if suffix is not None and (suffix.startswith("self_c") or not name.startswith(DECODER + "self_c")):
                products.setdefault(name.removesuffix(suffix) + product, []).append(name)
    return products


def join(weights: list[Packed], key: str, source: str, apart: bool = False) -> tuple[Linear | Gated, list[Packed]]:
    """The product named `key` of these weights, and the weights as the reference reads them from now on. apart: whether
    gate and up stay side by side, so that something can be added to each. InputError naming source and product for
    values that are not finite."""
    from dgq.runtime.kernels import dense

    where = f"{source}: {key}"
    if len({weight.scheme.bits < 16 for weight in weights}) > 1:  # a product is packed, or not, as a whole
        weights = [plain(weight) for weight in weights]
    if key.endswith("gate_up"):
        gate, up = weights
        both = dense.Gated(dense.pack(weights, where), gate.shape[0]) if apart else dense.pack_gated(gate, up, where)
        if isinstance(both.both, Tiles):
            sides = (partial(_side, both.both, number) for number in (0, 1))
            return both, [Repacked(w.scheme, w.shape, {}, read=side) for w, side in zip(weights, sides, strict=True)]
        return both, _parts_of(both.both, weights)
    product = dense.pack(weights, where)
    return product, _parts_of(product, weights)


def _parts_of(product: Linear, weights: list[Packed]) -> list[Packed]:
    """The weights that a product joins, read from it: views of a plain part, Repacked of tiles."""
    parts, first = list(product.parts), 0
    read: list[Packed] = []
    for weight in weights:
        part, last = parts[0], first + weight.shape[0]
        if isinstance(part, Tiles):
            read.append(Repacked(weight.scheme, weight.shape, {}, read=partial(_rows, part, first, last)))
            height = part.shape[1]
        else:
            read.append(Packed(BF16, weight.shape, {"": part[first:last]}))
            height = part.shape[0]
        first = last
        if first == height:
            parts.pop(0)
            first = 0
    return read


def _rows(tiles: Tiles, first: int, last: int) -> Tensor:
    """Rows `first` to `last` of a product, decoded: bfloat16 (rows, columns)."""
    from dgq.runtime.kernels import dense

    return natural_order(dense.decoded(tiles), tiles.shape[2])[first:last]


def _side(tiles: Tiles, number: int) -> Tensor:
    """The gate (0) or the up (1) of a gated product, decoded: bfloat16 (inner, columns)."""
    from dgq.runtime.kernels import dense

    both = natural_order(dense.decoded(tiles, gated=True), tiles.shape[2]).chunk(2)[number]
    return natural_order(both.t().contiguous(), tiles.shape[1] // 2).t()


def table(weight: Packed) -> tuple[Tensor | Table, Packed]:
    """The embedding as the kernels read it, and as the reference does."""
    from dgq.runtime.kernels.dense import Table

    if weight.scheme.gpu.embedding:
        return Table.of(weight), weight
    decoded = plain(weight)
    return decoded.parts[""], decoded


def plain(weight: Packed) -> Packed:
    """The weight in bfloat16, decoded a piece at a time, so that no float32 copy of the whole is made."""
    if weight.scheme is BF16:
        return weight
    values = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.parts[""].device)
    step = max(1, DECODE_BUDGET // weight.shape[-1])
    for first in range(0, weight.shape[0], step):
        values[first : first + step] = weight[first : first + step].dequantize(torch.bfloat16)
    return Packed(BF16, weight.shape, {"": values})
