"""What a conversion would write, decided from headers alone: every tensor's name, shape, scheme and bytes.

    Source (headers) + Recipe  ->  Plan  ->  shown by `dgq plan`, carried out by `dgq convert`

A planned tensor is one weight. In a .gguf it is one tensor under another name; in a safetensors directory it keeps
its name, and a quantised one becomes several tensors, as the format's layout says. The GGUF order is llama-quantize's:
tensors outside the layers alphabetically, then layer by layer alphabetically; then those of the mmproj file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dgq.convert.plans.format import Format
from dgq.convert.plans.formats import Directory
from dgq.convert.plans.recipe import Recipe
from dgq.convert.plans.tensors import PlannedTensor, tally
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.types import Layout, Packed, Scheme

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Everything about an artifact but its bytes."""

    source: Source
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]

    @property
    def format(self) -> Format:
        return self.recipe.writes

    @property
    def nbytes(self) -> int:
        """Tensor data; the file adds a header of names, metadata and tokenizer."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def weights(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.source is not None]

    @property
    def params(self) -> int:
        return sum(tensor.numel for tensor in self.weights)

    @property
    def files(self) -> tuple[str, ...]:
        """Of a GGUF: the text model's file, and its vision tower's if it has one; () for a directory."""
        return self.format.file_names(self.source.where.name, self.recipe.label, bool(self.mmproj))

    @property
    def quantized_params(self) -> int:
        return sum(tensor.numel for tensor in self.weights if tensor.scheme.bits < 16)

    @property
    def quantized_share(self) -> float:
        """Share of the artifact's parameters stored in fewer than 16 bits."""
        return self.quantized_params / self.params

    @cached_property
    def layout(self) -> Layout | None:
        """How a directory stores quantised weights; None for a GGUF, where each is one tensor."""
        if not isinstance(self.format, Directory):
            return None
        schemes = {tensor.name: tensor.scheme for tensor in self.tensors}
        return self.format.layout(schemes, self.recipe.activations is not None)

    def slice_scheme(self, tensor: PlannedTensor) -> Scheme:
        """What slices of a weight are quantised with: split() completes what belongs to the whole of it."""
        return self.layout.slices if self.layout and len(tensor.entries) > 1 else tensor.scheme

    def split(self, tensor: PlannedTensor, piece: Packed, start: int) -> Iterator[tuple[str, Tensor]]:
        """The next bytes of the tensors that a weight becomes: piece is its slice from `start`, in order."""
        if self.layout and len(tensor.entries) > 1:
            yield from self.layout.split(tensor.name, tensor.shape, piece, start)
        else:
            yield tensor.name, piece.parts[""]

    @property
    def stored(self) -> int:
        """Tensors in the artifact's files."""
        return sum(max(1, len(tensor.entries)) for tensor in self.tensors)

    @property
    def text(self) -> list[PlannedTensor]:
        """All but the vision part: of a GGUF, the text model's file."""
        return [tensor for tensor in self.tensors if not tensor.vision]

    @property
    def mmproj(self) -> list[PlannedTensor]:
        """Of a GGUF, the vision tower's file; [] if there is none."""
        return [tensor for tensor in self.tensors if tensor.vision] if self.format.one_file else []

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know: of the source, and of what the artifact makes of it."""
        kept = {tensor.name: tensor.source for tensor in self.weights if tensor.scheme.name == "bf16"}
        rounded = [name for name, source in kept.items() if source and self.source.dtype(source) != "BF16"]
        only = [f"{self.recipe.label} opens in {self.format.opens_in}"] if self.format.opens_in else []
        lines = [*only, *self.source.notices]
        if rounded:
            lines.append(f"{len(rounded)} of them are stored as BF16, rounded ({rounded[0]}, …)")
        lines += self.format.notices(self.source)
        return tuple(lines)

    def by_scheme(self) -> dict[str, dict[str, int]]:
        """scheme -> tensors, params, bytes; largest first."""
        return tally((tensor.scheme.name, tensor.numel, tensor.nbytes) for tensor in self.tensors)

    def by_part(self) -> dict[str, dict[str, int]]:
        return tally((tensor.part, tensor.numel, tensor.nbytes) for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.where.asked,
            "revision": self.source.where.revision,
            "recipe": self.recipe.name,
            "format": self.recipe.format,
            "opens_in": self.format.opens_in,
            "bytes": self.nbytes,
            "mib": round(self.nbytes / MIB, 1),
            "params": self.params,
            "quantized_share": round(self.quantized_share, 6),
            "bits_per_weight": round(8 * self.nbytes / self.params, 4),
            "stored_tensors": self.stored,
            "by_scheme": self.by_scheme(),
            "by_part": self.by_part(),
            "notices": list(self.notices),
            "tensors": {
                t.name: {
                    "shape": list(t.shape),
                    "scheme": t.scheme.name,
                    "bytes": t.nbytes,
                    "stored": max(1, len(t.entries)),
                }
                for t in self.tensors
            },
        }


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Assign every tensor its scheme. InputError if the recipe does not fit the model or leaves too much in 16 bit."""
    config = source.config
    if config.experts in recipe.refuse_experts:
        raise InputError(
            f"{source.path}: recipe {recipe.name} does not cover models with exactly {config.experts} experts; take"
            " another"
        )
    names = recipe.writes.names(source)
    schemes = recipe.assign({name: shape for name, (_, shape) in names.items()}, len(config.layers), config.experts)
    tensors = recipe.writes.planned(recipe.name, source, schemes, recipe.activations is not None)
    recipe.writes.check(recipe.name, tensors)
    plan = Plan(source, recipe, tensors)
    asked = [t for t in plan.weights if not (t.vision and plan.format.one_file)]  # no recipe decides on a tower apart
    wide = [t for t in asked if t.scheme.bits >= 16]
    if (share := sum(t.numel for t in wide) / sum(t.numel for t in asked)) > recipe.max_16bit_share:
        worst = max(wide, key=lambda t: t.numel)
        raise InputError(
            f"{source.path}: recipe {recipe.name} would leave {share:.1%} of the parameters in"
            f" 16 bits or more ({worst.name} the largest), and allows {recipe.max_16bit_share:.1%}"
        )
    return plan
