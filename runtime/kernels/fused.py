"""What surrounds the products of a layer, in few launches: norms, routing, rotation. Attention is in
cached_attention.py, the sampler in denoising.py.

Everything reads and writes device memory only: nothing waits for the host, nothing depends on values that the host
would have to know, no memory is taken that a CUDA graph could not keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import fused_kernels
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
    out: Tensor | None = None,
) -> Tensor:
    """RMS norm of (x + plus) * scale * factor, times weight: x and plus bfloat16 (n, width), weight float32 (width,),
    scale float32 (n,). Float32 within; bfloat16 (n, width), or ordered: as repack.in_order puts it."""
    rows, width = x.shape
    out = _room(x, ordered) if out is None else out
    assert out.is_contiguous() and x.stride(1) == 1 and (plus is None or plus.stride(1) == 1)
    fused_kernels.norm[(rows,)](
        x, plus, scale, weight, out, x.stride(0), 0 if plus is None else plus.stride(0),
        0 if scale is None else scale.stride(0), width, out.shape[1], factor, eps, ORDERED=ordered,
        BLOCK=triton.next_power_of_2(out.shape[1]), num_warps=8,
    )  # fmt: skip
    return out


def _room(x: Tensor, ordered: bool) -> Tensor:
    """For x (n, width) in bfloat16, to whole tiles if ordered."""
    width = x.shape[1] + (-x.shape[1] % COLUMNS if ordered else 0)
    return torch.empty(len(x), width, dtype=torch.bfloat16, device=x.device)


@dataclass(frozen=True)
class Feed:
    """What the second half of a layer reads, bfloat16: dense and router (n, hidden); routed (n, hidden up to whole
    tiles), its columns as repack.in_order puts them."""

    dense: Tensor
    routed: Tensor
    router: Tensor


def mixed(
    x: Tensor,
    seen: Tensor,
    after: Tensor,
    dense: Tensor,
    routed: Tensor,
    router_scale: Tensor,
    eps: float,
    ordered: bool = False,
    out: Feed | None = None,
) -> Feed:
    """After attention: x += norm(seen, after), in place; then the inputs of MLP, experts and router.

    x and seen bfloat16 (n, hidden); after, dense, routed: the norms' weights, float32 (hidden,); router_scale
    (hidden,), of any float dtype. ordered: the MLP's input is to be as the experts' is.
    """
    rows, width = x.shape
    out = Feed(_room(x, ordered), _room(x, True), _room(x, False)) if out is None else out
    assert x.is_contiguous() and seen.is_contiguous()
    fused_kernels.mixed[(rows,)](
        x, seen, after, dense, routed, router_scale, out.dense, out.routed, out.router, width, out.dense.shape[1],
        out.routed.shape[1], width**-0.5, eps, ORDERED=ordered, BLOCK=triton.next_power_of_2(out.routed.shape[1]),
        num_warps=8,
    )  # fmt: skip
    return out


def fed(
    x: Tensor,
    dense: Tensor,
    routed: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    scalar: Tensor,
    following: Tensor,
    eps: float,
    ordered: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The end of a layer: x = (x + norm(norm(dense) + norm(routed))) * scalar, in place -> norm(x, following).

    x and dense bfloat16 (n, hidden); routed (n, hidden), or (n, k, hidden) to be summed over k; weights: of the norms
    of dense, routed and both, float32 (hidden,); scalar of one element; following: the weight of the next layer's
    input norm, or the model's last; ordered: see norm().
    """
    rows, width = x.shape
    out = _room(x, ordered) if out is None else out
    assert x.is_contiguous() and dense.is_contiguous() and routed.is_contiguous()
    fused_kernels.fed[(rows,)](
        x, dense, routed, *weights, scalar, following, out, width, out.shape[1], eps,
        K=routed.shape[1] if routed.dim() == 3 else 1, ORDERED=ordered, BLOCK=triton.next_power_of_2(out.shape[1]),
        num_warps=8,
    )  # fmt: skip
    return out


def route(
    scores: Tensor, scale: Tensor, k: int, chosen: Tensor | None = None, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token's k experts of highest score, int32 (n, k), and their shares, float32: softmax over these k times scale.

    scores (n, experts), what the router's product gives; scale (experts,). Of equal scores the first is taken.
    """
    tokens, experts = scores.shape
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=scores.device) if chosen is None else chosen
    share = torch.empty(tokens, k, dtype=torch.float32, device=scores.device) if share is None else share
    assert scores.is_contiguous()
    fused_kernels.route[(triton.cdiv(tokens, _TOKENS),)](
        scores, scale, chosen, share, tokens, experts, K=k, PICKS=triton.next_power_of_2(k),
        EXPERTS=triton.next_power_of_2(experts), TOKENS=_TOKENS, num_warps=_TOKENS,
    )  # fmt: skip
    return chosen, share


def rotations(
    length: Tensor, frequencies: Tensor, tokens: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (rows * tokens, head_dim / 2), of the positions length[row] + 0, 1, …; length int32 (rows,),
    frequencies as attention.rope_frequencies has them."""
    rows, half = len(length), len(frequencies)
    room = (rows * tokens, half)
    cos, sin = (torch.empty(room, device=length.device) for _ in range(2)) if out is None else out
    power = triton.next_power_of_2(half)
    fused_kernels.angles[(rows * tokens,)](length, frequencies, cos, sin, tokens, half, HALF=power, num_warps=2)
    return cos, sin


def place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[Tensor, Tensor],
    turns: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    eps: float,
    pages: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Norm and turn q and k, norm v; keys and values go into the cache -> queries (rows, heads, tokens, head_dim).

    q (rows * tokens, heads * head_dim), k and v (…, kv heads * head_dim), bfloat16; rows of any stride, v may be k.
    norms: of q and k, float32 (head_dim,); turns: of rotations(). keys and values bfloat16 (rows, kv heads, size,
    head_dim), of equal strides; token i of a row goes to slot (length + i) % size. With pages int32 (rows, n) they are
    (pages, kv heads, size, head_dim), and position p goes to place p % size of page pages[row, p // size].
    """
    rows, (_, kv_heads, size, dim) = len(length), keys.shape
    tokens, heads = len(q) // rows, q.shape[1] // dim
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and dim & (dim - 1) == 0
    assert q.stride(1) == k.stride(1) == v.stride(1) == 1
    out = torch.empty(rows, heads, tokens, dim, dtype=torch.bfloat16, device=q.device) if out is None else out
    table = 0 if pages is None else pages.stride(0)
    fused_kernels.place[(len(q), 2)](
        q, k, v, *norms, *turns, out, keys, values, pages, length, q.stride(0), k.stride(0), v.stride(0), tokens,
        heads, kv_heads, *keys.stride()[:3], table, size, eps, HALF=dim // 2, HEADS=triton.next_power_of_2(heads),
        KV_HEADS=triton.next_power_of_2(kv_heads), PAGED=pages is not None, num_warps=4,
    )  # fmt: skip
    return out


def soft_embed(probabilities: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """sample()'s probabilities (n, vocab) @ table (vocab, hidden), both bfloat16 -> (n, hidden) bfloat16, summed in
    float32. A row's scale is still to be multiplied with: norm() does."""
    return torch.mm(probabilities, table) if out is None else torch.mm(probabilities, table, out=out)
