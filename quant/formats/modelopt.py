"""NVFP4 in modelopt's layout, which vLLM opens: one set of small tensors for each projection of each expert, and for
other Linears where they are quantised (those are read here, and written in dgq's own layout alone, own_layout.py).

    …layers.L.experts.E.gate_proj.   weight          U8       [out, in/2]
                                     weight_scale    F8_E4M3  [out, in/16]
                                     weight_scale_2  F32      []       the same for gate and up: vLLM keeps only gate's
                                     input_scale     F32      []       W4A4 only: activation amax / (6 * 448), or more

Everything else stays as it is in the checkpoint. config.json gains `quantization_config`, and hf_quant_config.json
says the same in modelopt's older words. Source: nvidia-modelopt 0.47, export_hf_checkpoint, which these equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dgq.quant.formats.nvfp4_modules import NVFP4Modules, Suffixes, split_modules
from dgq.quant.schemes.nvfp4 import BLOCK
from dgq.quant.types import Packed

HF_QUANT_CONFIG = "hf_quant_config.json"
W4A4, W4A16 = "NVFP4", "W4A16_NVFP4"


@dataclass(frozen=True)
class Modelopt(NVFP4Modules):
    """The layout."""

    suffixes = Suffixes("weight", "weight_scale", "weight_scale_2", "input_scale")

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        for base, module in split_modules(name, shape, piece, start):
            yield base + "weight", module.parts[""]
            yield base + "weight_scale", module.parts["weight_scale"]
            yield base + "weight_scale_2", module.parts["weight_scale_2"][0, 0]
            if self.activations and bool(module.parts["input_scale"][0, 0].isfinite()):
                yield base + "input_scale", module.parts["input_scale"][0, 0]


def quantization_config(layers: int, vision: bool, activations: bool, version: str) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = {"input_activations": dict(numbers)} if activations else {}
    return {
        "config_groups": {"group_0": group | {"weights": numbers, "targets": ["Linear"]}},
        "ignore": ignored(layers, vision),
        "quant_algo": W4A4 if activations else W4A16,
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if activations else {}),
        "producer": {"name": "dgq", "version": version},
        "quant_method": "modelopt",
    }


def hf_quant_config(layers: int, vision: bool, activations: bool, version: str) -> dict[str, Any]:
    """The content of hf_quant_config.json."""
    return {
        "producer": {"name": "dgq", "version": version},
        "quantization": {
            "quant_algo": W4A4 if activations else W4A16,
            "kv_cache_quant_algo": "FP8" if activations else None,
            "group_size": BLOCK,
            "exclude_modules": ignored(layers, vision),
        },
    }


def ignored(layers: int, vision: bool) -> list[str]:
    """Patterns of the modules that stay in 16 bit: all but the routed experts, in both stacks, sorted."""
    stacks = ("model.decoder.", "model.encoder.language_model.")
    patterns = ["lm_head", "model.decoder.self_conditioning*"]
    patterns += ["model.encoder.embed_vision*", "model.encoder.vision_tower*"] if vision else []
    patterns += [
        f"{stack}layers.{layer}.{part}*"
        for stack in stacks
        for layer in range(layers)
        for part in ("mlp", "router", "self_attn")
    ]
    return sorted(patterns)
