"""Bytes that a batch takes on a GPU beside the weights: what a session allocates, counted from shapes.

keys and values   full layers every token, sliding ones a window and a canvas
canvas            logits and their exponentials in 16 bit, once for the steps and once more while their graph is made
prompt            what a part of a prompt is in a layer: mostly the experts' answers before they are added up
"""

from __future__ import annotations

from dgq.runtime.model.slots import whole
from dgq.runtime.shape.config import ModelConfig

GIB = 1 << 30
CONTEXT = 640 << 20  # of the card: CUDA's context and kernels, a desktop
WORKSPACE = 96 << 20  # cuBLAS's, of the streams that graphs are made of
PREFILL = 2048  # prompt tokens encoded at once
SHORT = 8192  # tokens of one row that --vram leaves room for
WIDTH = 2  # bytes of an activation


def kv_bytes(config: ModelConfig, tokens: int, rows: int = 1) -> tuple[int, int]:
    """Keys and values of `rows` rows of `tokens`, canvas included: of sliding layers, of full ones."""
    ring = min(whole(tokens), whole(config.window - 1 + config.canvas))
    sliding_and_full = [0, 0]
    for layer in config.layers:
        slots = ring if layer.is_sliding else whole(tokens)
        sliding_and_full[not layer.is_sliding] += 2 * WIDTH * rows * slots * layer.kv_heads * layer.head_dim
    return sliding_and_full[0], sliding_and_full[1]


def canvas_bytes(config: ModelConfig, rows: int = 1) -> int:
    """Logits, twice, and what the sampler makes of them; the expected embedding."""
    return WIDTH * rows * config.canvas * (3 * config.vocab + 2 * config.hidden)


def layer_bytes(config: ModelConfig, tokens: int) -> int:
    """What `tokens` tokens are at the widest point of a layer: the residual and its norms, the experts' inner and
    outer products, the MLP's."""
    picks = tokens * config.top_k
    return WIDTH * (6 * tokens * config.hidden + picks * (config.hidden + config.expert_intermediate))


def widest(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """Most tokens that are in a layer at once: a part of a prompt, or all canvases."""
    return max(min(PREFILL, tokens), rows * config.canvas)


def working_bytes(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """All of it, for rows of `tokens` tokens."""
    layer = layer_bytes(config, widest(config, tokens, rows))
    return sum(kv_bytes(config, tokens, rows)) + canvas_bytes(config, rows) + layer + WORKSPACE
