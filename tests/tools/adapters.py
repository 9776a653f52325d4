"""Adapters as peft saves them, made by hand: random factors for modules of a model, of one side or of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, ENCODER, expected_tensors

LINEARS = (".self_attn.", ".mlp.", ".router.", "self_conditioning.")
RANK, SCALE = 3, 2.0


def write_adapter(
    path: Path,
    config: ModelConfig,
    seed: int,
    modules: Sequence[str] = LINEARS,
    sides: Sequence[str] = (DECODER, ENCODER),
    name: Callable[[str], str] = str,
) -> Path:
    """Factors for every matrix whose name holds one of `modules`, and for each expert alone if ".experts." is one of
    them. name: changes what stands before ".lora_A.weight"."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def add(module: str, out: int, width: int) -> None:
        for side in sides if "self_conditioning" not in module else sides[:1]:
            whole = name("base_model.model." + module.replace(DECODER, side))
            tensors[whole + ".lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.1
            tensors[whole + ".lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.1

    for weight, shape in expected_tensors(config).items():
        if not any(one in weight for one in modules):
            continue
        if weight.endswith("_proj.weight") or weight.endswith("router.proj.weight"):
            add(weight.removesuffix(".weight"), *shape)
        elif len(shape) == 3:
            before, _, kind = weight.rpartition(".")
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",):
                    add(f"{before}.{expert}.{part}", shape[1] // (2 if kind == "gate_up_proj" else 1), shape[2])
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path
