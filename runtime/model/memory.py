"""The bytes that a batch takes on a GPU beside the weights: what a session allocates, counted from shapes.

keys and values   every token in full layers; a window and a canvas in sliding ones
canvas            logits and their exponentials in 16 bit, once for the steps and again while a graph is captured
prompt            a piece of a prompt inside a layer: mostly the experts' outputs before they are summed
"""

from __future__ import annotations

from dgq.runtime.model.slots import whole
from dgq.runtime.shape.config import ModelConfig

GIB = 1 << 30
CONTEXT = 640 << 20  # bytes of the card for CUDA's context and kernels, and for a desktop
WORKSPACE = 96 << 20  # bytes of cuBLAS's workspaces, one for each stream of a graph
PREFILL = 2048  # prompt tokens encoded at once
SHORT = 8192  # tokens of one row for which --vram leaves room
WIDTH = 2  # bytes of an activation


def kv_bytes(config: ModelConfig, tokens: int, rows: int = 1) -> tuple[int, int]:
    """Bytes of keys and values of `rows` rows of `tokens` tokens each, canvas included: in sliding layers, in full
    ones."""
    ring = min(whole(tokens), whole(config.window - 1 + config.canvas))
    sliding_and_full = [0, 0]
    for layer in config.layers:
        slots = ring if layer.is_sliding else whole(tokens)
        sliding_and_full[not layer.is_sliding] += 2 * WIDTH * rows * slots * layer.kv_heads * layer.head_dim
    return sliding_and_full[0], sliding_and_full[1]


def canvas_bytes(config: ModelConfig, rows: int = 1) -> int:
    """Bytes of the logits, which exist twice, of the sampler's probabilities and of the expected embedding."""
    return WIDTH * rows * config.canvas * (3 * config.vocab + 2 * config.hidden)


def layer_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of `tokens` tokens at the widest point of a layer: the residual and its norms, the inner and outer products
    of the experts, those of the MLP."""
    picks = tokens * config.top_k
    return WIDTH * (6 * tokens * config.hidden + picks * (config.hidden + config.expert_intermediate))


def widest(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """The most tokens that are in a layer at once: those of a piece of a prompt, or of all canvases."""
    return max(min(PREFILL, tokens), rows * config.canvas)


def working_bytes(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """Bytes of all of this for `rows` rows of `tokens` tokens each."""
    layer = layer_bytes(config, widest(config, tokens, rows))
    return sum(kv_bytes(config, tokens, rows)) + canvas_bytes(config, rows) + layer + WORKSPACE
