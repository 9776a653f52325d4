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

No format takes such rows: NVFP4's blocks are 16 weights, NF4's 64 and ggml's 32 or 256, and all recipes refuse them.
For converters, PACKED is the same with rows that blocks fit as they fit the released ones: hidden 768, whose root is no
bfloat16 either, takes K-quants, and dense 320 and experts 64 take their fallbacks.

The tokenizer is tinyA's, whose ids are the first of the vocabulary; with a vision tower (tiny's settings, random
weights) it is tiny's.
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
ODD, PACKED = (HIDDEN, 264, 88), (768, 320, 64)  # widths: hidden, dense, expert
TINY = Path(__file__).parents[2] / "recipes" / "tiny"


def second_config(
    window: int = WINDOWS[0], layers: int = 3, vocab: int = VOCAB, widths: tuple[int, int, int] = ODD
) -> dict[str, Any]:
    """config.json's content, Google's style. vocab: a smaller one is for kernels under Triton's interpreter, and for
    tests in which the table is not the subject."""
    config: dict[str, Any] = json.loads((GOLDEN / "tinyA" / "config.json").read_text())
    kinds = ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(layers)]
    text = config["text_config"]
    text.pop("per_layer_config", None)
    text |= {
        "hidden_size": widths[0], "intermediate_size": widths[1], "moe_intermediate_size": widths[2], "num_experts": 24,
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


def write_second(
    path: Path, window: int = WINDOWS[0], layers: int = 3, seed: int = 0, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint directory of the text model, one file, with tinyA's tokenizer. config: another one than
    second_config(window, layers); the vision tower is left out."""
    path.mkdir(parents=True)
    config = second_config(window, layers) if config is None else config
    config.pop("vision_config", None)
    (path / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(GOLDEN / "tinyA" / name, path / name)
    save_file(second_tensors(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_seeing(path: Path, window: int = WINDOWS[0]) -> Path:
    """The same with a vision tower of tiny's settings, and tiny's tokenizer, whose ids are those of its images."""
    from dgq.runtime.shape.vision import expected_vision

    path.mkdir(parents=True)
    config, tiny = second_config(window, vocab=2048), json.loads((TINY / "config.json").read_text())
    config |= {key: tiny[key] for key in ("vision_config", "boi_token_id", "eoi_token_id", "image_token_id")}
    (path / "config.json").write_text(json.dumps(config))
    for name in (*TOKENIZER, "processor_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, path / name)
    generator = torch.Generator().manual_seed(1)
    shapes = expected_vision(config, HIDDEN, "config.json")
    tower = {name: _drawn(name, shape, generator).bfloat16() for name, shape in shapes.items()}
    save_file(second_tensors(config) | tower, path / "model.safetensors", metadata={"format": "pt"})
    return path


def in_transformers(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """transformers' model of a checkpoint directory. One without vision_config would get a random tower of the released
    size, whose making takes longer than all else; it gets one of tiny's size."""
    from transformers import AutoConfig, DiffusionGemmaForBlockDiffusion

    config = AutoConfig.from_pretrained(path)
    if "vision_config" not in json.loads((path / "config.json").read_text()):
        config.vision_config = AutoConfig.from_pretrained(TINY).vision_config
    return DiffusionGemmaForBlockDiffusion.from_pretrained(path, config=config, dtype=dtype, **settings).eval()
