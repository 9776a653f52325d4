"""A DiffusionGemma small enough to write in a millisecond: two layers, four experts, rows of 64 (every scheme falls
back), random weights, tinyA's tokenizer. For tests of files and errors, not of values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def micro_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "tinyA" / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 160,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
    }
    config["canvas_length"] = 16
    del config["vision_config"]
    return config


def micro_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    from dgq.runtime.shape.config import ModelConfig
    from dgq.runtime.shape.names import expected_tensors

    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(ModelConfig.from_json(config, "config.json"))
    return {
        name: (torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)).bfloat16()
        for name, shape in shapes.items()
    }


def write_micro(
    path: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None, shards: int = 2
) -> Path:
    """A checkpoint directory: `shards` files with an index, or one file if shards is 0."""
    path.mkdir(parents=True)
    config = config or micro_config()
    tensors = tensors if tensors is not None else micro_tensors(config)
    (path / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(GOLDEN / "tinyA" / name, path / name)
    if not shards:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def two_steps(weights: Any, config: Any) -> torch.Tensor:
    """Logits of a canvas behind 40 tokens, without and with self-conditioning, weights decoded at every use."""
    from dgq.runtime.model.loading import LoadOptions
    from dgq.runtime.model.model import Model

    model, generator = Model(config, weights, options=LoadOptions(keep_decoded=0)), torch.Generator().manual_seed(3)
    cache = model.new_cache(1)
    model.encode(torch.randint(12, config.vocab, (1, 40), generator=generator), cache)
    canvas = torch.randint(0, config.vocab, (1, config.canvas), generator=generator)
    first = model.decode(canvas, cache)
    return torch.cat((first, model.decode(canvas, cache, first)))
