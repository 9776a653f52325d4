"""Packed weights as modules of transformers' DiffusionGemma, which multiply, move and save what lies on disk.

    PackedLinear            in nn.Linear's place                     one Holder
    PackedExperts           in DiffusionGemmaTextExperts' place      two: gate_up_proj, down_proj
      Holder                a weight's parts, as uint8 parameters that never train: to() moves them and casts nothing,
                            the encoder's and the decoder's are the same objects
        state_dict()        the tensors of the directory, under their names there; nothing on the encoder's side

The products are those of layers.py: decode a piece, multiply, forget it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgq.quant.errors import InputError
from dgq.quant.formats.bnb import STATE, BitsAndBytes
from dgq.quant.formats.modelopt import Modelopt
from dgq.quant.schemes.nf4 import QUANT_MAP
from dgq.quant.types import Layout, Packed, Scheme
from dgq.runtime.model import layers


@dataclass(frozen=True)
class Origin:
    """Where a weight came from. name, shape: canonical; state: bitsandbytes' text of it, uint8, as it lies on disk;
    layout: None for a plain weight."""

    layout: Layout | None
    name: str
    shape: tuple[int, ...]
    state: Tensor | None = None

    def stored(self, weight: Packed) -> dict[str, Tensor]:
        """The directory's tensors. InputError for layouts that dgq reads and does not write."""
        if self.layout is None:
            return {self.name: weight.parts[""]}
        if isinstance(self.layout, Modelopt):
            tensors = dict(self.layout.split(self.name, self.shape, weight, 0))
        elif isinstance(self.layout, BitsAndBytes) and self.state is not None:
            parts = {
                self.name: weight.parts[""],
                f"{self.name}.quant_map": QUANT_MAP.clone(),
                self.name + STATE: self.state,
            }
            parts |= {f"{self.name}.{suffix}": part for suffix, part in weight.parts.items() if suffix}
            shapes = {entry: shape for entry, (_, shape) in self.layout.entries(self.name, self.shape).items()}
            shapes[self.name + STATE] = tuple(self.state.shape)
            tensors = {entry: parts[entry].reshape(shape) for entry, shape in shapes.items()}
        else:
            raise InputError(f"{self.name}: this layout is read only; dgq convert writes those that are saved")
        # an expert's scalars are one number in memory, and safetensors takes no tensor twice
        return {name: part.clone() if part.numel() == 1 else part for name, part in tensors.items()}


class Holder(nn.Module):
    """One packed weight. saves: whether state_dict() writes it."""

    def __init__(self, origin: Origin, weight: Packed, saves: bool) -> None:
        super().__init__()
        self.origin, self.saves = origin, saves
        self.scheme: Scheme = weight.scheme
        self._parts: list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]] = []
        for number, (suffix, part) in enumerate(weight.parts.items()):
            compact = part[tuple(slice(1) if not step else slice(None) for step in part.stride())]
            raw = compact.contiguous().clone().view(-1).view(torch.uint8)
            self.register_parameter(f"part_{number}", nn.Parameter(raw, requires_grad=False))
            self._parts.append((suffix, part.dtype, tuple(compact.shape), tuple(part.shape)))

    def shared(self) -> Holder:
        """The same parameters again, which are not saved twice."""
        twin = Holder.__new__(Holder)
        nn.Module.__init__(twin)
        twin.origin, twin.saves, twin.scheme, twin._parts = self.origin, False, self.scheme, self._parts
        for name, parameter in self._parameters.items():
            twin.register_parameter(name, parameter)
        return twin

    def packed(self) -> Packed:
        """The weight; its parts are views of the parameters."""
        parts = {
            suffix: raw.detach().view(dtype).view(compact).expand(shape)
            for (suffix, dtype, compact, shape), raw in zip(self._parts, self.parameters(), strict=True)
        }
        return Packed(self.scheme, self.origin.shape, parts)

    def weight(self) -> Packed:
        """Without an input scale: activations are not rounded, as in dgq's own runtime unless it is asked to."""
        weight = self.packed()
        return Packed(weight.scheme, weight.shape, {k: v for k, v in weight.parts.items() if k != "input_scale"})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.saves:
            destination.update(self.origin.stored(self.packed()))


class PackedLinear(nn.Module):
    """x (…, in) -> (…, out), in x's dtype."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.held: Holder | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.held is not None
        return layers.linear(x, self.held.weight())


class PackedExperts(nn.Module):
    """hidden (tokens, hidden), chosen (tokens, k) expert numbers, share (tokens, k) -> (tokens, hidden)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up: Holder | None = None
        self.down: Holder | None = None

    def forward(self, hidden: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        assert self.gate_up is not None and self.down is not None
        return layers.experts(hidden, chosen, share.float(), self.gate_up.weight(), self.down.weight())


class NoTower(nn.Module):
    """In the vision tower's place, of a directory without one. source: in the error that an image gets."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def forward(self, *_: Any, **__: Any) -> None:
        raise InputError(f"{self._source}: has no vision tower, which images need")
