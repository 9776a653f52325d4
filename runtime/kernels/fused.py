"""What surrounds the products of a layer, in few launches: norms, routing, RoPE. Attention is in cached_attention.py,
the sampler in denoising.py.

    norm       before a stack of layers, and after the last      place      q, k, v -> normed, rotated, into the cache
    mixed      after attention, before MLP, experts and router   route      the router's scores -> experts and shares
    fed        after MLP and experts, before the next layer      rotations  positions -> cos and sin

Everything reads and writes device memory only. Nothing waits for the host, nothing depends on values that the host
would have to know, and no memory is allocated that a CUDA graph could not keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import fused_kernels
from dgq.runtime.kernels.cached_attention import KeyValues as KeyValues
from dgq.runtime.kernels.cached_attention import Mask as Mask
from dgq.runtime.kernels.cached_attention import attend as attend
from dgq.runtime.kernels.denoising import Denoising as Denoising
from dgq.runtime.kernels.denoising import begin as begin
from dgq.runtime.kernels.denoising import decide as decide
from dgq.runtime.kernels.denoising import sample as sample
from dgq.runtime.kernels.repack import COLUMNS

_TOKENS = 4  # routed by a program


def norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    plus: Tensor | None = None,
    scale: Tensor | None = None,
    factor: float = 1.0,
    ordered: bool = False,
) -> Tensor:
    """RMS norm of (x + plus) * scale * factor, times weight, computed in float32 -> bfloat16 (n, width).

    x, plus: bfloat16 (n, width); weight: float32 (width,); scale: float32 (n,). ordered: the columns of the result are
    in the order of repack.in_order(), up to whole tiles.
    """
    rows, width = x.shape
    out = _room(x, ordered)
    assert x.stride(1) == 1 and (plus is None or plus.stride(1) == 1)
    fused_kernels.norm[(rows,)](
        x, plus, scale, weight, out, x.stride(0), 0 if plus is None else plus.stride(0),
        0 if scale is None else scale.stride(0), width, out.shape[1], factor, eps, ORDERED=ordered,
        BLOCK=triton.next_power_of_2(out.shape[1]), num_warps=8,
    )  # fmt: skip
    return out


def _room(x: Tensor, ordered: bool) -> Tensor:
    """Memory for a result as wide as x (n, width), in bfloat16; up to whole tiles if ordered."""
    width = x.shape[1] + (-x.shape[1] % COLUMNS if ordered else 0)
    return torch.empty(len(x), width, dtype=torch.bfloat16, device=x.device)


@dataclass(frozen=True)
class Feed:
    """What the second half of a layer reads, all bfloat16: the inputs of the dense MLP and of the router, (n, hidden),
    and of the routed experts, (n, hidden up to whole tiles) in the order of repack.in_order()."""

    dense: Tensor
    routed: Tensor
    router: Tensor


def mixed(
    x: Tensor,
    seen: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    router_scale: Tensor,
    eps: float,
    ordered: bool = False,
) -> Feed:
    """The middle of a layer: x += norm(seen), in place; then the normed inputs of MLP, experts and router.

    x, seen: bfloat16 (n, hidden), seen being attention's result. weights: of the norms after attention, before the MLP
    and before the experts, float32 (hidden,). router_scale: (hidden,), of any float dtype. ordered: the columns of the
    MLP's input are ordered as the experts' input is.
    """
    rows, width = x.shape
    out = Feed(_room(x, ordered), _room(x, True), _room(x, False))
    assert x.is_contiguous() and seen.is_contiguous()
    fused_kernels.mixed[(rows,)](
        x, seen, *weights, router_scale, out.dense, out.routed, out.router, width, out.dense.shape[1],
        out.routed.shape[1], width**-0.5, eps, ORDERED=ordered, BLOCK=triton.next_power_of_2(out.routed.shape[1]),
        num_warps=8,
    )  # fmt: skip
    return out


def fed(
    x: Tensor,
    dense: Tensor,
    routed: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    scalar: Tensor,
    eps: float,
    ordered: bool = False,
) -> Tensor:
    """The end of a layer: x = (x + norm(norm(dense) + norm(routed))) * scalar, in place -> the next layer's norm of x.

    x, dense: bfloat16 (n, hidden); routed: (n, hidden), or (n, k, hidden) to be summed over k. weights: of the norms of
    dense, of routed, of both, and of what follows (the next layer's input norm, or the model's last norm), float32
    (hidden,). scalar: the layer's, one element. ordered: see norm().
    """
    rows, width = x.shape
    out = _room(x, ordered)
    assert x.is_contiguous() and dense.is_contiguous() and routed.is_contiguous()
    fused_kernels.fed[(rows,)](
        x, dense, routed, *weights[:3], scalar, weights[3], out, width, out.shape[1], eps,
        K=routed.shape[1] if routed.dim() == 3 else 1, ORDERED=ordered, BLOCK=triton.next_power_of_2(out.shape[1]),
        num_warps=8,
    )  # fmt: skip
    return out


def route(scores: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each token's k experts of highest score, int32 (n, k), and their shares, float32 (n, k).

    scores: (n, experts), the router's product; of equal scores the first is taken. A share is the softmax over the k
    scores, times the expert's scale; scale: (experts,).
    """
    tokens, experts = scores.shape
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    share = torch.empty(tokens, k, dtype=torch.float32, device=scores.device)
    assert scores.is_contiguous()
    fused_kernels.route[(triton.cdiv(tokens, _TOKENS),)](
        scores, scale, chosen, share, tokens, experts, K=k, PICKS=triton.next_power_of_2(k),
        EXPERTS=triton.next_power_of_2(experts), TOKENS=_TOKENS, num_warps=_TOKENS,
    )  # fmt: skip
    return chosen, share


def rotations(lengths: Tensor, frequencies: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """RoPE's cos and sin, float32 (rows * tokens, head_dim / 2), at the positions lengths[row] + 0, 1, ….

    lengths: int32 (rows,); frequencies: those of attention.rope_frequencies().
    """
    rows, half = len(lengths), len(frequencies)
    cos, sin = (torch.empty(rows * tokens, half, device=lengths.device) for _ in range(2))
    power = triton.next_power_of_2(half)
    fused_kernels.angles[(rows * tokens,)](lengths, frequencies, cos, sin, tokens, half, HALF=power, num_warps=2)
    return cos, sin


def place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[Tensor, Tensor],
    rotation: tuple[Tensor, Tensor],
    cache: KeyValues,
    eps: float,
) -> Tensor:
    """Norm and rotate q and k, norm v, put keys and values into the cache -> queries (rows, heads, tokens, head_dim).

    q: bfloat16 (rows * tokens, heads * head_dim); k, v: bfloat16 (rows * tokens, kv heads * head_dim); rows may have
    any stride, and v may be k. norms: the weights of q's and k's, float32 (head_dim,). rotation: what rotations()
    returned. Token i of a row goes to position lengths[row] + i of the cache.
    """
    keys, values, pages = cache.keys, cache.values, cache.pages
    rows, (_, kv_heads, size, dim) = len(cache.lengths), keys.shape
    tokens, heads = len(q) // rows, q.shape[1] // dim
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and dim & (dim - 1) == 0
    assert q.stride(1) == k.stride(1) == v.stride(1) == 1
    out = torch.empty(rows, heads, tokens, dim, dtype=torch.bfloat16, device=q.device)
    table = 0 if pages is None else pages.stride(0)
    fused_kernels.place[(len(q), 2)](
        q, k, v, *norms, *rotation, out, keys, values, pages, cache.lengths, q.stride(0), k.stride(0), v.stride(0),
        tokens, heads, kv_heads, *keys.stride()[:3], table, size, eps, HALF=dim // 2,
        HEADS=triton.next_power_of_2(heads), KV_HEADS=triton.next_power_of_2(kv_heads), PAGED=pages is not None,
        num_warps=4,
    )  # fmt: skip
    return out


def soft_embed(probabilities: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """The expected embedding: probabilities (n, vocab) of sample() @ table (vocab, hidden), both bfloat16 -> bfloat16
    (n, hidden), summed in float32. Each row must still be multiplied with its scale, which norm() does."""
    return torch.mm(probabilities, table) if out is None else torch.mm(probabilities, table, out=out)
