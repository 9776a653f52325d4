"""A second model shape, without the luck of `tiny`: random weights by a seed, made where it is wanted.

What is exact in `tiny` and tinyA hides mistakes that the 26B would show. Here

    hidden 352             its root, 18.76, is no bfloat16; eleven is a factor, as of 2,816
    dense 264, experts 88  an eighth of 2,112 and of 704: no multiple of 32, so K-quants and NF4 meet odd rows
    24 experts, top 3      neither is a power of two
    vocabulary 66,048      ids do not fit 16 bits
    heads                  full layers have heads twice as wide, and half as many of keys
    window                 16, shorter than the canvas of 32, or 48, longer than it
    scales                 per_expert_scale and layer_scalar are away from 1, and encoder's differ from the decoder's
    softcap 8              logits reach it

The tokenizer is tinyA's, whose ids are the first of the vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from micro import GOLDEN, TOKENIZER
from safetensors.torch import save_file

VOCAB, HIDDEN, CANVAS = 66_048, 352, 32
WINDOWS = (16, 48)


def second_config(window: int = WINDOWS[0], layers: int = 3, vocab: int = VOCAB) -> dict[str, Any]:
    """config.json's content, Google's style. vocab: a smaller one is for kernels under Triton's interpreter."""
    config: dict[str, Any] = json.loads((GOLDEN / "tinyA" / "config.json").read_text())
    kinds = ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(layers)]
    text = config["text_config"]
    text.pop("per_layer_config", None)
    text |= {
        "hidden_size": HIDDEN, "intermediate_size": 264, "moe_intermediate_size": 88, "num_experts": 24,
        "top_k_experts": 3, "num_hidden_layers": layers, "layer_types": kinds, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": 1,
        "vocab_size": vocab, "sliding_window": window, "final_logit_softcapping": 8.0,
        "max_position_embeddings": 262_144,
    }  # fmt: skip
    config["canvas_length"] = CANVAS
    return config


def second_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical name -> weight in BF16. Sharp attention flips experts, so q and k norms are damped, and the norms after
    a layer's two halves; scales are drawn around values that no bfloat16 product keeps."""
    from dgq.runtime.shape.config import ModelConfig
    from dgq.runtime.shape.names import expected_tensors

    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(ModelConfig.from_json(config, "config.json"))
    return {name: _drawn(name, shape, generator).bfloat16() for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "embed_tokens" in name:
        return 0.25 * noise
    if name.endswith("layer_scalar"):
        return 0.7 + 0.2 * noise.sigmoid()
    if name.endswith("per_expert_scale"):
        return 1.3 + 0.3 * noise
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.35 + 0.02 * noise
    if "post_" in name and len(shape) == 1:
        return 0.3 + 0.02 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / shape[-1] ** 0.5


def write_second(path: Path, window: int = WINDOWS[0], layers: int = 3, seed: int = 0) -> Path:
    """A checkpoint directory of the text model, one file, with tinyA's tokenizer."""
    path.mkdir(parents=True)
    config = second_config(window, layers)
    del config["vision_config"]
    (path / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(GOLDEN / "tinyA" / name, path / name)
    save_file(second_tensors(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path
