"""Fused expert weights whose experts, or whose halves, lie in the files as tensors of their own. The model has one
tensor for all experts of a layer; vLLM, llm-compressor and MLX have others:

    …experts.gate_up_proj (E, 2I, H)  <-  …experts.E.gate_proj.weight and …experts.E.up_proj.weight, each (I, H)
                                          …experts.E.gate_up_proj.weight, or …experts.gate_up_projs.E.weight (2I, H)
                                          …experts.gate_proj and …experts.up_proj, each (E, I, H), with .weight or not
    …experts.down_proj (E, H, I)      <-  …experts.E.down_proj.weight, or …experts.down_projs.E.weight
                                          …experts.down_proj.weight

Nothing is copied: the fused weight is a Spec whose pieces are those tensors, or parts of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dgq.quant.errors import InputError
from dgq.quant.formats.bnb_experts import WAYS
from dgq.quant.types import Spec
from dgq.runtime.shape.names import DECODER, ENCODER

_STACKS = {
    "gate_up_proj": (("{}.gate_proj", "{}.up_proj"), ("{}.gate_proj.weight", "{}.up_proj.weight"),
                     ("{}.gate_up_proj.weight",)),
    "down_proj": (("{}.down_proj.weight",),),
}  # fmt: skip
_NAME = re.compile(r"(.+\.experts)\.(?:\d+\.)?(?:gate|up|down|gate_up)_proj(?:s\.\d+)?(?:\.weight)?")
Shapes = Mapping[str, tuple[int, ...]]


def owner_of(name: str) -> str | None:
    """…experts of a tensor that may be a part of a fused expert weight; None for all other names."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def joined(specs: Mapping[str, Spec], text: Shapes) -> tuple[dict[str, Spec], list[str]]:
    """The header entries with fused expert weights where `specs` has their parts, and a notice if there are such. text:
    the shapes of the model's weights by canonical name. InputError for parts that are missing, or that do not fit."""
    fused_weights: dict[str, tuple[Spec, list[str]]] = {}
    for name, shape in text.items():
        if len(shape) == 3:
            for fused in (name, ENCODER + name.removeprefix(DECODER)):
                if fused not in specs and (join := _joined(specs, fused, shape)) is not None:
                    fused_weights[fused] = join
    if not fused_weights:
        return dict(specs), []
    used = {part for _, parts in fused_weights.values() for part in parts}
    fused, (_, parts) = next(iter(fused_weights.items()))
    line = f"{len(fused_weights)} weights of experts lie in {len(used)} tensors ({parts[0]}, …): read as {fused}, …"
    rest = {name: spec for name, spec in specs.items() if name not in used}
    return rest | {name: spec for name, (spec, _) in fused_weights.items()}, [line]


def _joined(specs: Mapping[str, Spec], fused: str, shape: tuple[int, ...]) -> tuple[Spec, list[str]] | None:
    """The fused weight and the names of its parts; None if it has none. InputError if some are missing or odd."""
    owner, _, last = fused.rpartition(".")
    for way in WAYS[last]:
        names = [name.format(owner, expert) for expert in range(shape[0]) for name in way]
        if names[0] in specs:
            pieces = _fitting(specs, names, (shape[1] // len(way), shape[2]))
            return _fused(fused, shape, pieces), names
    for way in _STACKS[last]:
        names = [name.format(owner) for name in way]
        if names[0] in specs:
            stacks = _fitting(specs, names, (shape[0], shape[1] // len(way), shape[2]))
            each = [list(_experts(stack)) for stack in stacks]
            return _fused(fused, shape, [piece for pieces in zip(*each, strict=True) for piece in pieces]), names
    return None


def _fitting(specs: Mapping[str, Spec], names: list[str], shape: tuple[int, ...]) -> list[Spec]:
    """The tensors of these names. InputError unless all are there, of one dtype and of this shape."""
    first = specs[names[0]]
    for name in names:
        if name not in specs:
            missing = f"tensor {name} is missing, but {names[0]} is there"
            raise InputError(f"{first.file.parent}: {missing}; save all {len(names)} experts' tensors of the layer")
        part = specs[name]
        if part.shape != shape:
            raise InputError(f"{part.file}: tensor {name} has shape {list(part.shape)}, the config says {list(shape)}")
        if part.dtype != first.dtype:
            what = f"{name} is {part.dtype}, but {names[0]} is {first.dtype}"
            raise InputError(f"{part.file}: {what}; save a layer's experts in one dtype")
    return [specs[name] for name in names]


def _experts(stack: Spec) -> Iterator[Spec]:
    """Yield each expert's part of a stack of matrices."""
    size = (stack.stop - stack.start) // stack.shape[0]
    for expert in range(stack.shape[0]):
        start = stack.start + expert * size
        yield replace(stack, shape=stack.shape[1:], start=start, stop=start + size)


def _fused(name: str, shape: tuple[int, ...], pieces: list[Spec]) -> Spec:
    nbytes = sum(piece.stop - piece.start for piece in pieces)
    return Spec(name, shape, pieces[0].dtype, pieces[0].file, 0, nbytes, tuple(pieces))
