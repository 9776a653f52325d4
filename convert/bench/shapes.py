"""Models of a real one's shapes with random weights, made on the device: what speed and memory are measured on.

A weight's first rows (or experts) are random and quantised by its scheme; the rest repeats them, in memory of its own.
Logits of such a model are nearly uniform: no canvas is ever done, and every step starts from other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import torch

from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipe import Recipe, Rule
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hub import Located
from dgq.quant.files.hf_dir import HFDir
from dgq.quant.schemes.dense import BF16
from dgq.quant.types import Packed, Spec
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import expected_tensors
from dgq.runtime.shape.settings import GenerationConfig

SHAPES = ("26b",)
SCHEMES = {"bf16": None, "nvfp4": ("nvfp4", "nvfp4-w4a16"), "nf4": ("bnb4", "bnb4"), "q4_k_m": ("gguf", "q4_k_m")}
STD = 0.02
_PIECE = 1 << 24  # elements quantised
_AS_IT_IS = Rule(match="*", scheme="bf16")
_PLAIN = Recipe(name="bf16", format="bnb4", label="BF16", description="", max_16bit_share=1, rule=(_AS_IT_IS,))


def plan_of_shapes(shapes: str, scheme: str) -> Plan:
    """What dgq would write in a scheme of SCHEMES for a text model of these SHAPES."""
    raw = json.loads(files("dgq.recipes").joinpath(f"{shapes}.json").read_text("utf-8"))
    config = ModelConfig.from_json(raw, f"{shapes}.json")
    path = Path(shapes)
    text = {
        name: Spec(name, shape, "BF16", path, 0, 2 * torch.Size(shape).numel())
        for name, shape in expected_tensors(config).items()
    }
    generation = GenerationConfig.from_json({}, config, f"{shapes}.json")
    source = Source(Located(shapes, path), config, generation, text, {}, {}, (), HFDir(path, text))
    how = SCHEMES[scheme]
    if how is not None:
        return make_plan(source, find_recipe(*how))
    return plain_plan(source)


def plain_plan(source: Source) -> Plan:
    """Of the text model as it is."""
    tensors = (PlannedTensor(name, name, spec.shape, BF16) for name, spec in source.text.items())
    return Plan(source, _PLAIN, tuple(tensors))


class RandomWeights(Mapping[str, Packed]):
    """canonical name -> Packed on `device`, of a plan's shapes and schemes.

    zipf: routers' rows grow so that expert i is chosen about 1 / i times as often as the first, as far as scores
    around zero allow (no expert by more than 45 % of the tokens).
    """

    def __init__(self, plan: Plan, device: torch.device | str, zipf: bool = False) -> None:
        self._tensors = {str(tensor.source): tensor for tensor in plan.weights}
        self._config, self._device, self._zipf = plan.source.config, device, zipf
        self._generator = torch.Generator(device).manual_seed(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Packed:
        planned = self._tensors[name]
        scheme, shape = planned.scheme, planned.shape
        if len(shape) < 2:
            return Packed(scheme, shape, scheme.quantize(torch.ones(shape, device=self._device)))
        rows = min(shape[0], max(1, _PIECE // (planned.numel // shape[0])))
        if scheme.bits >= 16:
            rows = shape[0]
        weight = torch.empty(rows, *shape[1:], dtype=torch.bfloat16, device=self._device)
        weight.normal_(0, STD, generator=self._generator)
        if self._zipf and name.endswith("router.proj.weight"):
            weight *= zipf_spread(self._config.experts, self._config.top_k).to(weight)[:, None]
        made = Packed(scheme, (rows, *shape[1:]), scheme.quantize(weight))
        again = torch.arange(shape[0], device=self._device) % rows
        return made if rows == shape[0] else made[again]


def zipf_spread(experts: int, k: int) -> torch.Tensor:
    """What expert i's scores, normal around 0, are multiplied with to be above 1 with probability min(.45, c / i);
    these sum to k."""
    rank = torch.arange(1, experts + 1, dtype=torch.float64)
    low, high = 0.0, float(experts)
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if float((c / rank).clamp(max=0.45).sum()) < k else (low, c)
    chosen = (low / rank).clamp(max=0.45)
    spread = 1 / (2**0.5 * torch.erfinv(1 - 2 * chosen))
    return (spread / spread.mean()).float()
