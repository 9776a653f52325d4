"""What a conversion would write, decided from headers alone: every tensor's name, shape, scheme and bytes.

    Source (headers) + Recipe  ->  Plan  ->  shown by `dgq plan`, carried out by `dgq convert`

A planned tensor is one weight. In a .gguf it is one tensor under another name; in a safetensors directory it keeps
its name, and a quantised one becomes several tensors, as the format's layout says. The GGUF order is llama-quantize's:
tensors outside the layers alphabetically, then layer by layer alphabetically; then those of the mmproj file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dgq.convert.plans import mmproj
from dgq.convert.plans.recipe import Recipe
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.files.hf_writer import entry_bytes
from dgq.quant.formats.bnb import BitsAndBytes
from dgq.quant.formats.modelopt import Modelopt
from dgq.quant.formats.own_layout import ONLY_DGQ, OwnLayout
from dgq.quant.schemes.ggml import Q8_0
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import Entry, Layout, Scheme
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import ROPE_FREQS, VISION, gguf_name, layer_of, part_of

MIB = 1 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """One weight of the artifact. source: its canonical name; None for what dgq generates (rope_freqs.weight).
    entries: the tensors it becomes in a safetensors directory; empty for a .gguf, where it is one."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    scheme: Scheme
    entries: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(map(entry_bytes, self.entries.values())) if self.entries else self.scheme.nbytes(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether its rows share a scale, so that they are quantised together."""
        return self.scheme is NVFP4 and len(self.shape) == 2

    @property
    def vision(self) -> bool:
        """Whether it is the vision part's; in a GGUF, the mmproj file's."""
        return self.source is not None and self.source.startswith(VISION)

    @property
    def part(self) -> str:
        """Which part of the model the tensor belongs to, for tables."""
        return "vision" if self.vision else part_of(self.name)


@dataclass(frozen=True)
class Plan:
    """Everything about an artifact but its bytes."""

    source: Source
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]

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
        """Of a GGUF: the text model's file, and its vision tower's if it has one."""
        name = self.source.where.name
        return (f"{name}-{self.recipe.label}.gguf", *([f"mmproj-{name}-BF16.gguf"] if self.mmproj else []))

    @property
    def quantized_params(self) -> int:
        return sum(tensor.numel for tensor in self.weights if tensor.scheme.bits < 16)

    @property
    def quantized_share(self) -> float:
        """Share of the artifact's parameters stored in fewer than 16 bits."""
        return self.quantized_params / self.params

    @cached_property
    def layout(self) -> Layout:
        """How the recipe's format stores quantised weights; for safetensors formats."""
        return layout_of(self.recipe, {tensor.name: tensor.scheme for tensor in self.tensors})

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
        return [tensor for tensor in self.tensors if tensor.vision] if self.recipe.format == "gguf" else []

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know: of the source, and of what the artifact makes of it."""
        kept = {tensor.name: tensor.source for tensor in self.weights if tensor.scheme.name == "bf16"}
        rounded = [name for name, source in kept.items() if source and self.source.dtype(source) != "BF16"]
        only = [f"{self.recipe.label} opens in {ONLY_DGQ}"] if self.recipe.layout else []
        lines = [*only, *self.source.notices]
        if rounded:
            lines.append(f"{len(rounded)} of them are stored as BF16, rounded ({rounded[0]}, …)")
        if self.recipe.format == "nvfp4" and not only and (unsaid := self.source.unsaid):
            lines.append(
                f"not said by the source: {', '.join(unsaid)}; dgq takes the released model's, vLLM does not start; add"
                " them to the source first"
            )
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
            "opens_in": ONLY_DGQ if self.recipe.layout else None,
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


def tally(rows: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """(group, elements, bytes) of each tensor -> group -> its tensors, params and bytes; most bytes first."""
    tensors, params, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for group, numel, size in rows:
        tensors[group] += 1
        params[group] += numel
        nbytes[group] += size
    return {g: {"tensors": tensors[g], "params": params[g], "bytes": n} for g, n in nbytes.most_common()}


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Assign every tensor its scheme. InputError if the recipe does not fit the model or leaves too much in 16 bit."""
    config = source.config
    if config.experts in recipe.refuse_experts:
        raise InputError(
            f"{source.path}: recipe {recipe.name} does not cover models with exactly {config.experts} experts"
            " (llama-quantize treats them as Mixtral)"
        )
    tensors = _gguf_tensors(source, recipe) if recipe.format == "gguf" else _directory_tensors(source, recipe)
    if (
        recipe.format == "nvfp4"
        and recipe.layout is None
        and (plain := [t.name for t in tensors if ".experts." in t.name and t.scheme.bits >= 16])
    ):
        raise InputError(f"recipe {recipe.name}: leaves {plain[0]} in 16 bit; the layout's configs promise all experts")
    plan = Plan(source, recipe, tensors)
    if recipe.format != "gguf" and not plan.quantized_params:
        raise InputError(f"recipe {recipe.name}: quantises nothing; its {recipe.format} directory would open nowhere")
    asked = [t for t in plan.weights if not (t.vision and recipe.format == "gguf")]  # no recipe decides mmproj's
    wide = [t for t in asked if t.scheme.bits >= 16]
    if (share := sum(t.numel for t in wide) / sum(t.numel for t in asked)) > recipe.max_16bit_share:
        worst = max(wide, key=lambda t: t.numel)
        raise InputError(
            f"{source.path}: recipe {recipe.name} would leave {share:.1%} of the parameters in"
            f" 16 bits or more ({worst.name} the largest), and allows {recipe.max_16bit_share:.1%}"
        )
    return plan


def _gguf_tensors(source: Source, recipe: Recipe) -> tuple[PlannedTensor, ...]:
    config = source.config
    sources: dict[str, str | None] = {name: hf for hf in source.text if (name := gguf_name(hf)) is not None}
    shapes = {name: source.text[hf].shape for name, hf in sources.items() if hf is not None}
    sources[ROPE_FREQS] = None
    shapes[ROPE_FREQS] = (rope_freqs_length(config),)
    ordered = sorted(sources, key=lambda name: (-1 if (layer := layer_of(name)) is None else layer, name))
    schemes = recipe.assign({name: shapes[name] for name in ordered}, len(config.layers))
    text = (PlannedTensor(name, sources[name], shapes[name], schemes[name]) for name in ordered)
    return (*text, *(PlannedTensor(name, *one) for name, one in mmproj.planned(source).items()))


def _directory_tensors(source: Source, recipe: Recipe) -> tuple[PlannedTensor, ...]:
    shapes = {name: spec.shape for name, spec in (source.text | source.vision).items()}
    schemes = recipe.assign(shapes, len(source.config.layers))
    layout = layout_of(recipe, schemes)
    tensors = []
    for name, shape in shapes.items():
        quantised = schemes[name].bits < 16
        held = name in source.text and layout.holds(name, shape) and layout.scheme_of(name) is schemes[name]
        if quantised and not (held and (recipe.layout or recipe.format != "nvfp4" or ".experts." in name)):
            as_what = f"{name} {list(shape)} as {schemes[name].name}"
            raise InputError(f"recipe {recipe.name}: {recipe.format} has no place for {as_what}{_elsewhere(recipe)}")
        entries = layout.entries(name, shape) if quantised else {name: ("BF16", shape)}
        tensors.append(PlannedTensor(name, name, shape, schemes[name], entries))
    return tuple(tensors)


def _elsewhere(recipe: Recipe) -> str:
    if recipe.format == "nvfp4" and recipe.layout is None:
        return '; layout = "dgq" has for matrices of the text model, and opens in dgq only'
    return ""


def layout_of(recipe: Recipe, schemes: Mapping[str, Scheme]) -> Layout:
    """schemes: of the weights, by name."""
    if recipe.layout == "dgq":
        return OwnLayout(frozenset(name for name, scheme in schemes.items() if scheme is Q8_0))
    if recipe.format == "nvfp4":
        return Modelopt(activations=recipe.activations is not None)
    return BitsAndBytes(double="nf4_dq" in recipe.schemes)


def rope_freqs_length(config: ModelConfig) -> int:
    """One factor per RoPE angle of a full layer's head."""
    return next(layer.head_dim for layer in config.layers if not layer.is_sliding) // 2
