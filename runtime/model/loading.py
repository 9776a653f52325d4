"""Weights on their way from an artifact to the kernels: read ahead, checked, moved, repacked.

    files ── read, on threads ──> pinned memory ── copied ──> GPU ── repacked ──> tiles, products (products.py)

What was read is forgotten as soon as its product or its tiles are made, so that there are never two copies of the
weights. The experts come last, when it is known how much memory is left for them (placement.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.types import Packed
from dgq.runtime.adapters.adapter import Adapter
from dgq.runtime.kernels.repack import Tiles, tile
from dgq.runtime.model.memory import CONTEXT, GIB, SHORT, working_bytes
from dgq.runtime.model.offload import Host, Offload, Pair
from dgq.runtime.model.placement import place
from dgq.runtime.model.products import Repacked, join, plain, products_of, table
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import EMBEDDING, check_tensors, expected_tensors, layer_of

if TYPE_CHECKING:
    from dgq.runtime.kernels.dense import Gated, Linear, Table

# Weights that take at most so many bytes when decoded are decoded once instead of at every use. The 26B is far above
# this on any machine; the small models of tests and first tries are far below.
KEEP_DECODED = 1 << 28
READERS = 4  # threads, and weights that are read ahead of the one that is being repacked


@dataclass(frozen=True)
class LoadOptions:
    """How a model holds its weights and multiplies with them.

    keep_decoded: weights that take at most so many bytes when decoded are decoded once; 0 = decode at every use.
    activations: None, or "nvfp4" to round the inputs of weights that carry an input scale, as W4A4 kernels do.
    kernels: whether to repack weights for the kernels, which only bfloat16 can; None: in bfloat16 on a GPU, unless
    `activations` or an observer needs the products of the reference. vram: bytes of the GPU to use; None: all.
    adapters: LoRA adapters to apply beside the weights; active: the names of those that are applied where a request
    chooses none, all of them if None.
    """

    keep_decoded: int = KEEP_DECODED
    activations: str | None = None
    kernels: bool | None = None
    vram: int | None = None
    adapters: tuple[Adapter, ...] = ()
    active: tuple[str, ...] | None = None


DEFAULT_OPTIONS = LoadOptions()


@dataclass
class ForKernels:
    """A model's weights, repacked.

    weights: every weight by its canonical name, as the reference reads it. products: the products of products.py, by
    their full names, as the kernels read them. experts: gate_up and down of the layers whose experts are on the GPU;
    offload: those of the other layers. table: the embedding.
    """

    weights: dict[str, Packed] = field(default_factory=dict)
    experts: dict[int, Pair] = field(default_factory=dict)
    offload: Offload | None = None
    products: dict[str, Linear | Gated] = field(default_factory=dict)
    table: Tensor | Table | None = None

    def linear(self, name: str) -> Linear:
        """The product `name`, which is no gated one."""
        from dgq.runtime.kernels.dense import Linear

        product = self.products[name]
        assert isinstance(product, Linear)
        return product

    def gated(self, name: str) -> Gated:
        """The gated product `name`."""
        from dgq.runtime.kernels.dense import Gated

        product = self.products[name]
        assert isinstance(product, Gated)
        return product

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        experts = sum(tiles.nbytes for pair in self.experts.values() for tiles in pair)
        products = sum(product.nbytes for product in self.products.values() if product.packed)
        others = sum(weight.nbytes for weight in self.weights.values() if not isinstance(weight, Repacked))
        return experts + products + others + (self.offload.nbytes if self.offload else 0)


def load_for_kernels(
    config: ModelConfig,
    weights: Mapping[str, Packed],
    device: torch.device,
    source: str,
    vram: int | None,
    changed: Collection[str] = (),
) -> ForKernels:
    """Read, check and repack all weights of a model. vram: bytes of the GPU to use, all if None. changed: weights whose
    products adapters change, so that gate and up are not multiplied in one with what follows. InputError naming
    `source` for wrong shapes, for values that are not finite, or if too little memory is left for any experts."""
    if find_spec("triton") is None:
        raise InputError("bfloat16 on a GPU needs Triton: pip install triton, or use --dtype fp32")
    shapes = expected_tensors(config)
    names = sorted(shapes, key=lambda name: ".experts." in name)
    read = map(partial(_checked, shapes, source), read_ahead(weights, names, device))
    apart = halves_apart(changed)
    if device.type != "cuda":
        return for_kernels(names, read, source, decode=False, apart=apart)
    whole = torch.cuda.mem_get_info()[1]
    if vram is None:
        return for_kernels(names, read, source, decodes(config, whole), apart=apart)

    def room() -> int:
        others = torch.cuda.memory_allocated() + CONTEXT + working_bytes(config, SHORT)
        left = vram - others
        if left <= 0:  # more is needed for experts, but their size is not known yet
            raise InputError(
                f"--vram: {vram / GIB:.1f} GiB is too little; all but the routed experts takes {others / GIB:.1f}"
            )
        return left

    return for_kernels(names, read, source, decodes(config, min(vram, whole)), room, apart)


def _checked(shapes: Mapping[str, tuple[int, ...]], source: str, read: tuple[str, Packed]) -> tuple[str, Packed]:
    """A name and its weight, if that has the right shape; without its input scale, which kernels do not use."""
    name, weight = read
    check_tensors({name: weight.shape}, {name: shapes[name]}, source)
    parts = {key: part for key, part in weight.parts.items() if key != "input_scale"}
    return name, Packed(weight.scheme, weight.shape, parts)


def read_ahead(weights: Mapping[str, Packed], names: list[str], device: torch.device) -> Iterator[tuple[str, Packed]]:
    """Yield each name with its weight on the device. For a GPU, threads read the next weights meanwhile."""
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
            # The weight has no name here: it must not be held while the next one moves.
            yield name, ahead.popleft()[1].result().to(device, non_blocking=True)


def _read(weights: Mapping[str, Packed], name: str) -> Packed:
    """The weight in pinned memory, from which copies to the GPU are fast; parts that lie on a GPU stay there."""
    packed = weights[name]
    parts = {key: part if part.is_cuda else _pinned(part) for key, part in packed.parts.items()}
    return Packed(packed.scheme, packed.shape, parts)


def _pinned(part: Tensor) -> Tensor:
    if any(step == 0 for step in part.stride()):  # expanded from a few numbers: pinning would store them all
        return part
    return part.contiguous().pin_memory()


def decodes(config: ModelConfig, memory: int) -> bool:
    """Whether a GPU of `memory` bytes gets every weight but the routed experts decoded to bfloat16.

    Products of 256 tokens are faster so. That is worth the memory as long as it is a quarter of the GPU at most.
    """
    shapes = expected_tensors(config).items()
    return 2 * sum(math.prod(shape) for name, shape in shapes if ".experts." not in name) <= memory // 4


def for_kernels(
    names: Collection[str],
    read: Iterable[tuple[str, Packed]],
    source: str,
    decode: bool,
    room: Callable[[], int] | None = None,
    apart: Collection[str] = (),
) -> ForKernels:
    """Repack what is read: all of `names`, the experts last.

    decode: whether other weights than the experts are decoded, see decodes(). room: called when only the experts are
    missing, returns the bytes that they may take on the GPU; None: all experts stay there. apart: see halves_apart().
    InputError naming a weight that holds values that are not finite.
    """
    loaded = ForKernels()
    products = products_of(names)
    product_of = {name: key for key, members in products.items() for name in members}
    waiting: dict[str, Packed] = {}  # weights whose product is not complete yet
    experts: _Experts | None = None
    for name, weight in read:
        if ".experts." in name:
            experts = experts or _Experts(loaded, sum("experts.down" in one for one in names), room and room())
            experts.add(layer_of(name), tile(weight, _alternates(name, apart), f"{source}: {name}"))
        elif name == EMBEDDING:
            loaded.table, loaded.weights[name] = table(plain(weight) if decode else weight)
        elif (key := product_of.get(name)) is None:
            loaded.weights[name] = plain(weight) if len(weight.shape) > 1 else weight
        else:
            waiting[name] = plain(weight) if decode or weight.scheme is FP8 else weight
            if all(member in waiting for member in products[key]):
                members = [waiting.pop(member) for member in products[key]]
                loaded.products[key], parts = join(members, key, source, key in apart)
                loaded.weights |= dict(zip(products[key], parts, strict=True))
                del members, parts
        del weight  # before the next one takes memory
    if experts is not None and experts.hosts:
        loaded.offload = Offload(experts.hosts, loaded.weights[EMBEDDING].parts[""].device)
    return loaded


def halves_apart(changed: Collection[str]) -> frozenset[str]:
    """The gated products, and the experts' weights, whose gates and ups must come out of the product as they are: those
    of every MLP that an adapter changes. changed: canonical names of weights."""
    apart = set()
    for name in changed:
        before, _, weight = name.rpartition(".experts.")
        if before and weight.endswith("_proj"):
            apart.add(f"{before}.experts.gate_up_proj")
            continue
        for mlp in ("mlp.", "self_conditioning."):
            before, middle, _ = name.rpartition(mlp)
            if middle:
                apart.add(f"{before}{mlp}gate_up")
    return frozenset(apart)


def _alternates(name: str, apart: Collection[str]) -> bool:
    return name.endswith("gate_up_proj") and name not in apart


class _Experts:
    """Puts each layer's experts where placement.place() says: on the GPU, or in host memory."""

    def __init__(self, loaded: ForKernels, layers: int, budget: int | None) -> None:
        self._loaded, self._layers, self._budget = loaded, layers, budget
        self._gate_up: Tiles | None = None
        self._sizes: list[int] = []
        self.hosts: dict[int, Host] = {}

    def add(self, layer: int | None, tiles: Tiles) -> None:
        """Take a layer's next weight: its gate_up, then its down. Layers come in their order."""
        assert layer is not None
        if self._gate_up is None:
            self._gate_up = tiles
            return
        pair, self._gate_up = (self._gate_up, tiles), None
        self._sizes.append(sum(one.nbytes for one in pair))
        if place(self._sizes, self._layers, self._budget).stays[-1]:
            self._loaded.experts[layer] = pair
        else:
            self.hosts[layer] = Host.of(pair)
