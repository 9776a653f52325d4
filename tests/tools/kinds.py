"""A checkpoint whose experts are every kind of block a quantiser may meet, one kind an expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from micro import GOLDEN, micro_config, micro_tensors, write_micro

from dgq.runtime.shape.vision import expected_vision

KINDS = ("normal", "heavy-tailed", "constant", "zero", "tiny", "subnormal", "huge", "outliers", "zero blocks", "ties")


def block(kind: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, columns) bfloat16."""
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "heavy-tailed":
        normal /= torch.rand(rows, columns, generator=generator).clamp(min=1e-3)
    elif kind == "constant":
        normal = torch.full_like(normal, -0.37)
    elif kind == "zero":
        normal = torch.zeros_like(normal)
    elif kind in ("tiny", "subnormal", "huge"):
        normal *= {"tiny": 1e-30, "subnormal": 1e-39, "huge": 1e36}[kind]
    elif kind == "outliers":
        normal[:, ::61] *= 3000
    elif kind == "zero blocks":
        normal.view(rows, -1, 16)[:, ::3] = 0
        normal[::5] = 0
    elif kind == "ties":  # halves between codes, times a power of two, with the block's 6 in place
        normal = (normal * 8).round() / 4
        normal[:, ::16] = 6
    return normal.bfloat16()


def write_kinds(path: Path, kinds: Sequence[str] = KINDS, seed: int = 3) -> Path:
    """A micro checkpoint (hidden 128, experts 64 wide, so that every scheme fits) with these experts."""
    config = micro_config()
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": len(kinds),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = micro_tensors(config, seed)
    config["vision_config"] = json.loads((GOLDEN / "tinyA" / "config.json").read_text())["vision_config"]
    for name, shape in expected_vision(config, 128, "config.json").items():
        tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    for name, weight in tensors.items():
        if ".experts." in name:
            tensors[name] = torch.stack([block(kind, *weight.shape[1:], generator) for kind in kinds])
    return write_micro(path, config, tensors)
