"""RoPE, the masks of encoder and decoder, and the attention product.

One row of the sequence while a canvas is denoised (window 4; P padding, t tokens, c canvas):

    positions         0 1 2 3 4 5 6 | 7 8 9        positions count the padding
    tokens            P P t t t t t | c c c
    encoder, full         x x x x x                token 6 sees itself and every token before it
    encoder, sliding          x x x x              token 6 sees the last `window` of these
    decoder, full         x x x x x | x x x        every canvas token sees all tokens
    decoder, sliding            x x x | x x x        every canvas token sees the last window-1 cached ones and canvas
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dgq.runtime.shape.config import LayerConfig, ModelConfig
from dgq.runtime.shape.pictured import Pictures

# cuDNN's kernel is left out: it makes a plan for every new length, which takes a third of a second.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rope_frequencies(config: ModelConfig, layer: LayerConfig) -> Tensor:
    """(head_dim / 2,) float32: radians a position. Full layers turn only their first angles ("proportional" RoPE):
    the exponent still counts over the whole head, and the others stay at zero."""
    half = layer.head_dim // 2
    exponents = torch.arange(0, layer.head_dim, 2, dtype=torch.float32) / layer.head_dim
    if layer.is_sliding:
        return 1.0 / config.rope_theta_sliding**exponents
    frequencies = 1.0 / config.rope_theta**exponents
    frequencies[config.rope_angles : half] = 0.0
    return frequencies


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (rows or 1, tokens, 1, head_dim) in `dtype`, for positions (rows or 1, tokens)."""
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (rows, tokens, heads, head_dim) by its position; dimension i pairs with i + head_dim/2."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def encoder_mask(
    length: int,
    new: int,
    held: int,
    window: int | None,
    real: Tensor | None,
    device: torch.device,
    images: Pictures | None = None,
) -> Tensor:
    """Which key each newly encoded token sees, bool (rows or 1, 1, new, held + new).

    `length` tokens are cached, of which this layer holds the last `held`; window None = full attention. real
    (rows, length + new) is False on padding, None = there is none. A padding query sees itself, so that its row is
    a number (nobody reads it); every key it could spoil is masked for the others. images: among the new tokens.
    """
    query = torch.arange(length, length + new, device=device).unsqueeze(1)
    key = torch.arange(length - held, length + new, device=device).unsqueeze(0)
    after = key - query if images is None else key - query - images.ahead[..., None]  # (rows, new, keys) with images
    seen = after <= 0
    if window is not None:
        past = query - key < window
        seen = seen & (past if images is None else past | (query - key <= images.behind[..., None]))
    if real is not None:
        seen = seen & real[:, None, length - held :] | (key == query)
    return seen[:, None] if seen.dim() == 3 else seen[None, None]


def decoder_mask(length: int, canvas: int, held: int, real: Tensor | None) -> Tensor | None:
    """Which key the canvas sees, bool (rows, 1, 1, held + canvas); None = everything, as without padding."""
    if real is None:
        return None
    return functional.pad(real[:, length - held : length], (0, canvas), value=True)[:, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, starts: Sequence[int] | None = None) -> Tensor:
    """softmax(q k^T) v, unscaled (q and k are normed). q (rows, tokens, heads, d), k and v (rows, kv heads, keys, d),
    mask bool broadcasting to (rows, 1, tokens, keys). Returns (rows, tokens, heads * d).

    A group of query heads shares one key head: the group is folded into the query tokens, so that keys are never
    repeated and no kernel has to know about groups (with head_dim 512 the grouped path is four times slower).

    starts: each row's first key. Such rows are taken one by one, without the keys before: a kernel would add up the
    same numbers in another order if it had to step over masked ones.
    """
    if starts is not None:
        alone = (
            attend(q[r : r + 1], k[r : r + 1, :, s:], v[r : r + 1, :, s:], None if mask is None else mask[..., s:])
            for r, s in enumerate(starts)
        )
        return torch.cat(tuple(alone))
    rows, tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    folded = q.transpose(1, 2).reshape(rows, k.shape[1], group * tokens, dim)
    if mask is not None:
        mask = mask.expand(-1, -1, tokens, -1).repeat(1, 1, group, 1)
    with sdpa_kernel(_KERNELS) if q.is_cuda else nullcontext():
        out = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=1.0)
    return out.reshape(rows, heads, tokens, dim).transpose(1, 2).reshape(rows, tokens, heads * dim)
