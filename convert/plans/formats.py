"""The formats that dgq writes. Everything that depends on the format is asked of one of these objects.

    --to    layout    class            files                                      opened by
    gguf              GGUF             name-LABEL.gguf, mmproj-name-BF16.gguf     llama.cpp
    nvfp4             Modelopt         a directory of safetensors                 vLLM
    nvfp4   dgq       OwnNVFP4         the same                                   dgq alone
    bnb4              BitsAndBytes4    the same                                   transformers with dgq.runtime.hf

A recipe names the format and the layout; `format_of` finds the object. A new format is a class here with a row in
FORMATS, and a layout in quant/formats if it is a directory of safetensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from dgq.convert.plans import mmproj
from dgq.convert.plans.format import Format, Names
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.quant.files.hf_dir import HFDir
from dgq.quant.formats import bnb, modelopt, own_layout
from dgq.quant.schemes.ggml.q8_0 import Q8_0
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Layout, Packed, Scheme
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import EMBEDDING, ROPE_FREQS, gguf_name, layer_of


class GGUF(Format):
    """llama.cpp's format, in the layout of its pull request #24423 (runtime/shape/names.py has the names)."""

    name = title = "gguf"
    hub_library, hub_tags = "gguf", ("gguf", "llama.cpp")
    limit = "Text only in llama.cpp."
    default_recipe = "q4_k_m"
    schemes = frozenset(scheme.name for scheme in SCHEMES.values() if scheme.ggml)
    plain = "f32"
    router = "*.ffn_gate_inp.weight"
    ram_element = 24  # as read, in float32 for ggml, encoded, waiting to be written
    one_file = True
    takes_imatrix = True

    def file_type(self, scheme: Scheme) -> int:
        assert scheme.ggml is not None and scheme.ggml.file_type is not None, f"{scheme.name}: no file type"
        return scheme.ggml.file_type

    def artifact_name(self, canonical: str) -> str:
        return gguf_name(canonical) or canonical

    def file_names(self, name: str, label: str, tower: bool) -> tuple[str, ...]:
        return (f"{name}-{label}.gguf", *([f"mmproj-{name}-BF16.gguf"] if tower else []))

    def names(self, source: Source) -> Names:
        """In llama-quantize's order: those outside of the layers first, then by layer, each alphabetically."""
        named: dict[str, tuple[str | None, tuple[int, ...]]] = {ROPE_FREQS: (None, (rope_freqs_length(source.config),))}
        named |= {name: (hf, spec.shape) for hf, spec in source.text.items() if (name := gguf_name(hf)) is not None}
        order = sorted(named, key=lambda name: (-1 if (layer := layer_of(name)) is None else layer, name))
        return {name: named[name] for name in order}

    def planned(
        self, recipe: str, source: Source, schemes: Mapping[str, Scheme], activations: bool
    ) -> tuple[PlannedTensor, ...]:
        text = (PlannedTensor(name, *each, schemes[name]) for name, each in self.names(source).items())
        return (*text, *(PlannedTensor(name, *each) for name, each in mmproj.planned(source).items()))

    def reader(self, path: Path) -> Callable[[str], Tensor]:
        files: ChainMap[str, Packed] = ChainMap()
        files.maps = [GGUFReader(file) for file in sorted(path.glob("*.gguf"))]  # type: ignore[misc]
        return lambda name: files[name].parts[""]


class Directory(Format):
    """A directory of safetensors with a config.json: names stay, and a quantised weight becomes several tensors."""

    plain = "bf16"
    router = "*.router.*"
    ram_element = 8  # as read, encoded, waiting to be written
    hub_library = "dgq"

    @abstractmethod
    def layout(self, schemes: Mapping[str, Scheme], activations: bool) -> Layout:
        """How quantised weights lie in the files. schemes: of the weights, by name."""

    @abstractmethod
    def quantization_config(
        self, source: Source, tensors: Collection[PlannedTensor], activations: bool, version: str
    ) -> dict[str, Any]:
        """What config.json says of it."""

    def other_configs(self, source: Source, activations: bool, version: str) -> dict[str, dict[str, Any]]:
        """File name -> content of further JSON files."""
        return {}

    def places(self, name: str) -> bool:
        """Whether a text weight may be quantised that the layout can hold."""
        return True

    def names(self, source: Source) -> Names:
        return {name: (name, spec.shape) for name, spec in (source.text | source.vision).items()}

    def planned(
        self, recipe: str, source: Source, schemes: Mapping[str, Scheme], activations: bool
    ) -> tuple[PlannedTensor, ...]:
        layout = self.layout(schemes, activations)
        tensors = []
        for name, (_, shape) in self.names(source).items():
            quantised = schemes[name].bits < 16
            held = name in source.text and layout.holds(name, shape) and layout.scheme_of(name) is schemes[name]
            if quantised and not (held and self.places(name)):
                what = f"{name} {list(shape)} as {schemes[name].name}{self.elsewhere()}"
                raise InputError(f"recipe {recipe}: {self.name} has no place for {what}")
            entries = layout.entries(name, shape) if quantised else {name: ("BF16", shape)}
            tensors.append(PlannedTensor(name, name, shape, schemes[name], entries))
        return tuple(tensors)

    def elsewhere(self) -> str:
        """Where there is a place for what this format has none for; the end of an error."""
        return ""

    def check(self, recipe: str, tensors: Collection[PlannedTensor]) -> None:
        if all(tensor.scheme.bits >= 16 for tensor in tensors):
            raise InputError(f"recipe {recipe}: quantises nothing; its {self.name} directory would open nowhere")

    def reader(self, path: Path) -> Callable[[str], Tensor]:
        return HFDir(path).tensor


class Modelopt(Directory):
    """NVFP4 experts in modelopt's layout, with or without input scales; everything else BF16."""

    name = title = "nvfp4"
    hub_tags = ("nvfp4", "modelopt")
    limit = (
        "Without the line import dgq.runtime.hf transformers has no loader for this layout: it gives the experts RANDOM"
        " weights with a warning. Do not."
    )
    default_recipe = "nvfp4"
    schemes = frozenset({"bf16", NVFP4.name})
    has_input_scales = True
    in_mix = False  # all experts or nothing

    def layout(self, schemes: Mapping[str, Scheme], activations: bool) -> Layout:
        return modelopt.Modelopt(activations)

    def places(self, name: str) -> bool:
        return ".experts." in name

    def elsewhere(self) -> str:
        return '; layout = "dgq" has for matrices of the text model, and opens in dgq only'

    def check(self, recipe: str, tensors: Collection[PlannedTensor]) -> None:
        for tensor in tensors:
            if ".experts." in tensor.name and tensor.scheme.bits >= 16:
                what = f"leaves {tensor.name} in 16 bit; the layout's configs promise all experts"
                raise InputError(f"recipe {recipe}: {what}")
        super().check(recipe, tensors)

    def notices(self, source: Source) -> list[str]:
        if not (unsaid := source.unsaid):
            return []
        return [
            f"not said by the source: {', '.join(unsaid)}; dgq takes the released model's, vLLM does not start; add"
            " them to the source first"
        ]

    def quantization_config(
        self, source: Source, tensors: Collection[PlannedTensor], activations: bool, version: str
    ) -> dict[str, Any]:
        return modelopt.quantization_config(len(source.config.layers), bool(source.vision), activations, version)

    def other_configs(self, source: Source, activations: bool, version: str) -> dict[str, dict[str, Any]]:
        config = modelopt.hf_quant_config(len(source.config.layers), bool(source.vision), activations, version)
        return {modelopt.HF_QUANT_CONFIG: config}


class OwnNVFP4(Directory):
    """Any matrix of the text model in NVFP4 or Q8_0, in dgq's own layout."""

    name = "nvfp4"
    variant: ClassVar[Literal["dgq"] | None] = "dgq"
    title = "nvfp4 in dgq's own layout"
    hub_tags = Modelopt.hub_tags
    limit = f"It opens in {own_layout.ONLY_DGQ}."
    default_recipe = "nvfp4-all"
    schemes = frozenset({"bf16", NVFP4.name, Q8_0.name})
    opens_in = own_layout.ONLY_DGQ

    def layout(self, schemes: Mapping[str, Scheme], activations: bool) -> own_layout.OwnLayout:
        return own_layout.OwnLayout(frozenset(name for name, scheme in schemes.items() if scheme is Q8_0))

    def quantization_config(
        self, source: Source, tensors: Collection[PlannedTensor], activations: bool, version: str
    ) -> dict[str, Any]:
        schemes = {tensor.name: tensor.scheme for tensor in tensors}
        return own_layout.quantization_config(self.layout(schemes, activations), version)


class BitsAndBytes4(Directory):
    """bitsandbytes' NF4, experts included, with or without double quantisation."""

    name = title = "bnb4"
    hub_tags = ("bitsandbytes", "nf4")
    limit = (
        "Without the line import dgq.runtime.hf transformers raises on the packed experts, for which it has no place;"
        " vLLM has none either."
    )
    default_recipe = "bnb4"
    schemes = frozenset({"bf16", NF4.name, NF4_DQ.name})

    def refusal(self, named: Collection[str]) -> str | None:
        if {NF4.name, NF4_DQ.name} <= set(named):
            return "an artifact is either nf4 or nf4_dq throughout: its config.json says which, once"
        return None

    def layout(self, schemes: Mapping[str, Scheme], activations: bool) -> Layout:
        return bnb.BitsAndBytes(double=any(scheme is NF4_DQ for scheme in schemes.values()))

    def quantization_config(
        self, source: Source, tensors: Collection[PlannedTensor], activations: bool, version: str
    ) -> dict[str, Any]:
        matrices = [tensor for tensor in tensors if tensor.name in source.text and len(tensor.shape) == 2]
        kept = [t.name for t in matrices if t.scheme.bits >= 16 and t.name != EMBEDDING]
        quantised = [t.name for t in matrices if t.scheme.bits < 16]
        patterns = bnb.skip_patterns(*([name.removesuffix(".weight") for name in each] for each in (kept, quantised)))
        return bnb.quantization_config(patterns, double=any(tensor.scheme is NF4_DQ for tensor in tensors))


FORMATS: tuple[Format, ...] = (GGUF(), Modelopt(), OwnNVFP4(), BitsAndBytes4())


def format_of(name: str, variant: str | None = None) -> Format | None:
    """The format of a recipe's `format` and `layout`; None if there is none."""
    return next((each for each in FORMATS if (each.name, each.variant) == (name, variant)), None)


def written_format(document: Mapping[str, Any]) -> Format:
    """The format of an artifact, by its dgq.json. An artifact from before dgq.json held the recipe's rules has no
    layout of dgq's own."""
    rules = document.get("recipe_rules") or {}
    found = format_of(document["format"], rules.get("layout"))
    assert found is not None, document["format"]
    return found


def mixed_format(name: str) -> Format:
    """The format that `dgq mix --to name` makes recipes for."""
    return next(each for each in FORMATS if each.name == name and each.in_mix)


def rope_freqs_length(config: ModelConfig) -> int:
    """One factor per RoPE angle of a full layer's head."""
    return next(layer.head_dim for layer in config.layers if not layer.is_sliding) // 2
