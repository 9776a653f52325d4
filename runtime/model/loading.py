"""Weights on their way from an artifact to where they are used: read ahead, checked, moved, repacked for the kernels.

    files ── read, on threads ──> pinned memory ── copied ──> GPU ── repacked, a group at a time ──> tiles, products

A group is what the kernels multiply together: q, k and v; gate and up. What was read is forgotten when its group is
repacked, so there are never two copies of the weights. The reference's functions (Model.encode and decode) read
repacked ones through Repacked, which decodes them at every use.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgq.quant.schemes.dense import BF16
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles, natural_order, tile
from dgq.runtime.model.layers import DECODE_BUDGET
from dgq.runtime.model.offload import Host, Offload, Pair
from dgq.runtime.model.placement import place
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, expected_tensors

if TYPE_CHECKING:
    from dgq.runtime.kernels.dense import Gated, Linear, Table

READERS = 4  # threads, and weights ahead of the one that is being repacked

# Products below "layers.N." or "self_conditioning.", and their weights.
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
    """A weight that has no parts of its own any more: read() makes it again, bfloat16."""

    read: Callable[[], Tensor] = field(default=lambda: torch.empty(0), kw_only=True)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.read().to(dtype)


@dataclass
class ForKernels:
    """weights: by canonical name, as the reference reads them; products: by prefix of the layer, as the kernels do;
    experts: of the layers whose experts are on the GPU, gate_up and down; offload: the others; table: the embedding."""

    weights: dict[str, Packed] = field(default_factory=dict)
    experts: dict[int, Pair] = field(default_factory=dict)
    offload: Offload | None = None
    products: dict[str, Linear | Gated] = field(default_factory=dict)
    table: Tensor | Table | None = None

    def linear(self, name: str) -> Linear:
        from dgq.runtime.kernels.dense import Linear

        found = self.products[name]
        assert isinstance(found, Linear)
        return found

    def gated(self, name: str) -> Gated:
        from dgq.runtime.kernels.dense import Gated

        found = self.products[name]
        assert isinstance(found, Gated)
        return found

    @property
    def nbytes(self) -> int:
        """On the GPU."""
        experts = sum(tiles.nbytes for pair in self.experts.values() for tiles in pair)
        products = sum(product.nbytes for product in self.products.values() if product.packed)
        own = sum(weight.nbytes for weight in self.weights.values() if not isinstance(weight, Repacked))
        return experts + products + own + (self.offload.nbytes if self.offload else 0)


def read_ahead(weights: Mapping[str, Packed], names: list[str], device: torch.device) -> Iterator[tuple[str, Packed]]:
    """Each name and its weight on the device; for a GPU, read by threads meanwhile."""
    if device.type != "cuda":
        for name in names:
            yield name, weights[name].to(device)
        return
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[tuple[str, Future[Packed]]] = deque()
        rest = iter(names)
        for name in names:
            while len(ahead) < READERS and (following := next(rest, None)) is not None:
                ahead.append((following, pool.submit(_read, weights, following)))
            assert ahead[0][0] == name
            yield name, ahead.popleft()[1].result().to(device, non_blocking=True)  # not held here while the next moves


def _read(weights: Mapping[str, Packed], name: str) -> Packed:
    """In pinned memory, from which copies are fast; a weight on a GPU stays there."""
    packed = weights[name]
    parts = {key: part if part.is_cuda else _pinned(part) for key, part in packed.parts.items()}
    return Packed(packed.scheme, packed.shape, parts)


def _pinned(part: Tensor) -> Tensor:
    if any(step == 0 for step in part.stride()):  # expanded: a number a row
        return part
    return part.contiguous().pin_memory()


def decodes(config: ModelConfig, memory: int) -> bool:
    """Whether every weight but the routed experts is decoded to bfloat16 when it is loaded, where a GPU has so many
    bytes: at 256 tokens their products are faster so, and it is worth memory as long as that is a quarter at most."""
    shapes = expected_tensors(config).items()
    return 2 * sum(math.prod(shape) for name, shape in shapes if ".experts." not in name) <= memory // 4


def for_kernels(
    names: Collection[str],
    read: Iterable[tuple[str, Packed]],
    source: str,
    decode: bool,
    room: Callable[[], int] | None = None,
) -> ForKernels:
    """Repack what is read: all of `names`, the experts last. decode: see decodes(). room: asked when only the experts
    are missing, how many bytes they may take; None: all. InputError naming a weight that holds values that are not
    finite."""
    loaded = ForKernels()
    products = _products(names)
    product_of = {name: key for key, members in products.items() for name in members}
    waiting: dict[str, Packed] = {}
    experts: _Experts | None = None
    for name, weight in read:
        if ".experts." in name:
            experts = experts or _Experts(loaded, sum("experts.down" in one for one in names), room and room())
            experts.add(tile(weight, name.endswith("gate_up_proj"), f"{source}: {name}"))
        elif name == EMBEDDING:
            loaded.table, loaded.weights[name] = _table(_plain(weight) if decode else weight)
        elif (key := product_of.get(name)) is None:
            loaded.weights[name] = _plain(weight) if len(weight.shape) > 1 else weight
        else:
            waiting[name] = _plain(weight) if decode or weight.scheme is FP8 else weight
            if all(member in waiting for member in products[key]):
                loaded.products[key], back = _product([waiting.pop(member) for member in products[key]], key, source)
                loaded.weights |= dict(zip(products[key], back, strict=True))
        del weight  # before the next one takes memory
    if experts is not None and experts.hosts:
        loaded.offload = Offload(experts.hosts, loaded.weights[EMBEDDING].parts[""].device)
    return loaded


class _Experts:
    """Puts each layer's experts where placement.place() says: on the GPU, or in host memory."""

    def __init__(self, loaded: ForKernels, layers: int, budget: int | None) -> None:
        self._loaded, self._layers, self._budget = loaded, layers, budget
        self._gate_up: Tiles | None = None
        self._sizes: list[int] = []
        self.hosts: dict[int, Host] = {}

    def add(self, tiles: Tiles) -> None:
        """Take the next weight: gate_up and then down of layer 0, then those of layer 1, and so on."""
        if self._gate_up is None:
            self._gate_up = tiles
            return
        pair, self._gate_up = (self._gate_up, tiles), None
        layer = len(self._sizes)
        self._sizes.append(sum(one.nbytes for one in pair))
        if place(self._sizes, self._layers, self._budget).stays[layer]:
            self._loaded.experts[layer] = pair
        else:
            self.hosts[layer] = Host.of(pair)


def _products(names: Collection[str]) -> dict[str, list[str]]:
    """Product -> the weights that it has; a full layer's qkv has no v."""
    found: dict[str, list[str]] = {}
    for name in names:
        for product, members in PRODUCTS.items():
            own = next((member for member in members if name == DECODER + member or name.endswith("." + member)), None)
            if own is not None and (own.startswith("self_c") or not name.startswith(DECODER + "self_c")):
                found.setdefault(name.removesuffix(own) + product, []).append(name)
    return found


def _product(weights: list[Packed], key: str, source: str) -> tuple[Linear | Gated, list[Packed]]:
    """The product, and its weights as the reference reads them."""
    from dgq.runtime.kernels import dense

    said = f"{source}: {key}"
    if len({weight.scheme.bits < 16 for weight in weights}) > 1:  # which the kernels have no product for
        weights = [_plain(weight) for weight in weights]
    if key.endswith("gate_up"):
        gate, up = weights
        both = dense.pack_gated(gate, up, said)
        if isinstance(both.both, Tiles):
            sides = (partial(_side, both.both, number) for number in (0, 1))
            return both, [Repacked(w.scheme, w.shape, {}, read=side) for w, side in zip(weights, sides, strict=True)]
        return both, _back(both.both, weights)
    product = dense.pack(weights, said)
    return product, _back(product, weights)


def _back(product: Linear, weights: list[Packed]) -> list[Packed]:
    parts, first = list(product.parts), 0
    found: list[Packed] = []
    for weight in weights:
        part, last = parts[0], first + weight.shape[0]
        if isinstance(part, Tiles):
            own = partial(_rows, part, first, last)
            found.append(Repacked(weight.scheme, weight.shape, {}, read=own))
            height = part.shape[1]
        else:
            found.append(Packed(BF16, weight.shape, {"": part[first:last]}))
            height = part.shape[0]
        first = last
        if first == height:
            parts.pop(0)
            first = 0
    return found


def _rows(tiles: Tiles, first: int, last: int) -> Tensor:
    from dgq.runtime.kernels import dense

    return natural_order(dense.decoded(tiles), tiles.shape[2])[first:last]


def _side(tiles: Tiles, number: int) -> Tensor:
    """The gate (0) or the up (1)."""
    from dgq.runtime.kernels import dense

    both = natural_order(dense.decoded(tiles, gated=True), tiles.shape[2]).chunk(2)[number]
    return natural_order(both.t().contiguous(), tiles.shape[1] // 2).t()


def _table(weight: Packed) -> tuple[Tensor | Table, Packed]:
    from dgq.runtime.kernels.dense import Table

    if weight.scheme.gpu.embedding:
        return Table.of(weight), weight
    plain = _plain(weight)
    return plain.parts[""], plain


def _plain(weight: Packed) -> Packed:
    """In bfloat16, decoded a piece at a time."""
    if weight.scheme is BF16:
        return weight
    plain = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.parts[""].device)
    step = max(1, DECODE_BUDGET // weight.shape[-1])
    for first in range(0, weight.shape[0], step):
        plain[first : first + step] = weight[first : first + step].dequantize(torch.bfloat16)
    return Packed(BF16, weight.shape, {"": plain})
