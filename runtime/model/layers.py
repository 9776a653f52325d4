"""Products with packed weights: a piece is decoded, multiplied and forgotten.

Weights stay packed in memory. DECODE_BUDGET bounds what is decoded at any moment, whatever the model is:

    linear       the whole matrix (the largest dense one of the 26B has 23 M elements)
    embed        only the rows asked for
    head         the table in row chunks:      logits[:, a:b] = x @ E[a:b]^T
    soft_embed   the table in row chunks:      sum over chunks of p[:, a:b] @ E[a:b]
    experts      a few experts at a time, tokens sorted so that each expert's are contiguous

                 picks (token, expert)   0→2 0→5 1→2 1→7        sorted by expert   0→2 1→2 | 0→5 | 1→7
                                                                one product each   W2        W5    W7

All functions compute in the dtype of their activations and decode weights to it. They run on the activations' device,
where the weights must be too. They are slow and exact: faster kernels are tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dgq.quant.schemes.nvfp4 import round_activations
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles

# Elements decoded at once: 268 MB in float32, 16 experts of the 26B. Large enough that a small model is one piece.
DECODE_BUDGET = 1 << 26

# With fewer rows than this MKL takes another path, which rounds differently. With at least so many, and on one thread,
# a row's result does not depend on the other rows.
STEADY_ROWS = 4

# A function that is called with every product: the weight's name, its input (…, in) and its output (…, out); for an
# expert also its number, and which tokens the rows belong to, int64 (rows,). It returns what takes the output's place.
Observer = Callable[[str, Tensor, Tensor, int | None, Tensor | None], Tensor]


_PLAIN = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}  # the scheme that holds a dtype as it is


def decoded(weight: Packed, dtype: torch.dtype) -> Packed:
    """The weight decoded once and for all to `dtype`; its input scale, if it has one, stays with it."""
    scale = {key: part for key, part in weight.parts.items() if key == "input_scale"}
    return Packed(SCHEMES[_PLAIN[dtype]], weight.shape, {"": weight.dequantize(dtype)} | scale)


class _DecodedTwice(torch.autograd.Function):
    """x @ weight^T whose backward pass decodes the weight again; autograd would keep a whole layer decoded instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight.dequantize(gradient.dtype), None


def linear(x: Tensor, weight: Packed, observe: Observer | None = None, name: str = "") -> Tensor:
    """x (…, in) @ weight (out, in)^T -> (…, out)."""
    y = _multiplied(rounded(x, weight), weight)
    return y if observe is None else observe(name, x, y, None, None)


def _multiplied(x: Tensor, weight: Packed) -> Tensor:
    if _goes_back(x):
        found: Tensor = _DecodedTwice.apply(x, weight)  # type: ignore[no-untyped-call]
        return found
    return functional.linear(x, weight.dequantize(x.dtype))


def _goes_back(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def rounded(x: Tensor, weight: Packed) -> Tensor:
    """The input x (…, in) of a product with weight (out, in): rounded to NVFP4 if the weight carries an input scale."""
    scale = weight.parts.get("input_scale")
    return x if scale is None or bool(scale[0, 0].isinf()) else round_activations(x, scale[:1])


def gated_mlp(x: Tensor, weights: tuple[Packed, Packed, Packed], observe: Observer | None = None) -> Tensor:
    """down(gelu(gate x) * up x): x (…, hidden) -> (…, hidden). weights: of gate, up and down."""
    gate, up, down = weights
    inner = _gelu(linear(x, gate, observe, "gate_proj.weight")) * linear(x, up, observe, "up_proj.weight")
    return linear(inner, down, observe, "down_proj.weight")


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def embed(ids: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """Rows of the table (vocab, hidden), times sqrt(hidden): ids (…) -> (…, hidden) in `dtype`."""
    hidden = table.shape[-1]
    rows = table[ids.flatten()].dequantize(dtype).view(*ids.shape, hidden)
    return rows * embedding_scale(hidden, dtype)


def embedding_scale(hidden: int, dtype: torch.dtype) -> float:
    """sqrt(hidden), rounded to the activations' dtype, as transformers rounds it: 53.0 in bfloat16 for the width 2,816,
    whose root is 53.066. Every path of the runtime takes it from here."""
    return float(torch.tensor(hidden**0.5, dtype=dtype))


def head(x: Tensor, table: Packed, softcap: float) -> Tensor:
    """Logits of the tied head: x (…, hidden) -> softcap * tanh(x @ table^T / softcap), (…, vocab) float32."""
    vocab = table.shape[0]
    logits = torch.empty(*x.shape[:-1], vocab, dtype=torch.float32, device=x.device)
    for rows, piece in _row_chunks(table, x.dtype):
        logits[..., rows] = functional.linear(x, piece).float()
    return logits.div_(softcap).tanh_().mul_(softcap)


def head_gradient(x: Tensor, table: Packed, softcap: float, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """The gradient of -log p(y) at x (…, hidden), where p is the softmax of head(x) and y is drawn from p; and the norm
    (…, 1) of the gradient at the products with the table, before the cap."""
    gradient = head(x, table, softcap)
    slope = 1 - (gradient / softcap).square_()
    gradient = gradient.softmax(-1)
    y = torch.multinomial(gradient.flatten(0, -2), 1, generator=drawn).view(*x.shape[:-1], 1)
    gradient = gradient.scatter_add_(-1, y, -torch.ones_like(gradient[..., :1])).mul_(slope)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for rows, piece in _row_chunks(table, x.dtype):
        total += (gradient[..., rows].to(x.dtype) @ piece).float()
    return total.to(x.dtype), gradient.norm(dim=-1, keepdim=True)


def soft_embed(logits: Tensor, table: Packed, dtype: torch.dtype) -> Tensor:
    """The expected embedding under softmax(logits): (…, vocab) -> (…, hidden) in `dtype`, times sqrt(hidden)."""
    probabilities = logits.softmax(-1, dtype=torch.float32).to(dtype)
    hidden = table.shape[-1]
    total = torch.zeros(*logits.shape[:-1], hidden, dtype=torch.float32, device=logits.device)
    for rows, piece in _row_chunks(table, dtype):
        total += probabilities[..., rows] @ piece
    total = total.to(dtype)
    return total * embedding_scale(hidden, dtype)


def _row_chunks(table: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, DECODE_BUDGET // table.shape[-1])
    for start in range(0, table.shape[0], step):
        rows = slice(start, min(start + step, table.shape[0]))
        yield rows, table[rows].dequantize(dtype)


def experts(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    gate_up: Packed | Tiles,
    down: Packed | Tiles,
    observe: Observer | None = None,
    least: int = 1,
) -> Tensor:
    """The routed experts' sum: x (tokens, hidden), chosen (tokens, k) expert numbers, share (tokens, k) float32.

    gate_up (E, 2 * inner, hidden) has the gate's rows first; down (E, hidden, inner). Returns (tokens, hidden) in
    x's dtype. A token's k experts are summed in float32 by rising expert number, and an expert's tokens are ordered
    as transformers orders them: by rank in `chosen`, then by token. This gives transformers' exact bits in float32 on a
    CPU. Other bits would sooner or later flip a near-tie in a later router, and the generated tokens would differ.
    least: the number of rows that each product is padded to; with STEADY_ROWS a token's bits do not depend on the other
    tokens either.

    Weights that repack.tile() prepared go through moe.experts() instead, which is fast and promises no bits.
    """
    if isinstance(gate_up, Tiles) or isinstance(down, Tiles):
        from dgq.runtime.kernels import moe  # needs Triton

        assert isinstance(gate_up, Tiles) and isinstance(down, Tiles) and observe is None
        return moe.experts(x, chosen, share, gate_up, down)
    tokens, k = chosen.shape
    picks = chosen.t().flatten()
    order = picks.argsort(stable=True)
    counts = torch.bincount(picks, minlength=gate_up.shape[0]).tolist()
    whose = order % tokens
    rows = x[whose]
    # split() has one gradient for all parts; a slice for each part would make a gradient as large as `rows`.
    parts, seen = rows.split(counts), whose.split(counts)
    results: list[Tensor] = []
    per_expert = gate_up.shape[1] * gate_up.shape[2] + down.shape[1] * down.shape[2]
    group = max(1, DECODE_BUDGET // per_expert)
    for first in range(0, len(counts), group):
        hit = counts[first : first + group]
        if not any(hit):
            continue
        some = gate_up[first : first + group], down[first : first + group]
        w_in, w_out = some if _goes_back(rows) else [weight.dequantize(x.dtype) for weight in some]
        for i, count in enumerate(hit):
            if count:
                expert = first + i
                both = _product(rounded(parts[expert], gate_up[expert]), w_in[i], least)
                if observe is not None:
                    both = observe("gate_up_proj", parts[expert], both, expert, seen[expert])
                gate, up = both.chunk(2, dim=-1)
                inner = _gelu(gate) * up
                out = _product(rounded(inner, down[expert]), w_out[i], least)
                if observe is not None:
                    out = observe("down_proj", inner, out, expert, seen[expert])
                results.append(out)
    unsorted = torch.empty_like(rows)
    unsorted[order] = torch.cat(results) if results else rows
    return _summed(unsorted.view(k, tokens, -1), chosen, share).to(x.dtype)


def _summed(outputs: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
    """Each token's outputs (k, tokens, hidden) times its shares, added up by rising expert number: float32."""
    weighted = outputs.float() * share.t().unsqueeze(-1)
    rising = chosen.argsort(dim=-1).t().unsqueeze(-1).expand_as(weighted)
    total = torch.zeros_like(weighted[0])
    for part in weighted.gather(0, rising):
        total += part
    return total


def _product(x: Tensor, weight: Tensor | Packed, least: int) -> Tensor:
    if isinstance(weight, Packed):
        return _multiplied(x, weight)
    missing = least - len(x)
    if missing <= 0:
        return functional.linear(x, weight)
    return functional.linear(functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 (the weight is w, not 1 + w), back in x's dtype."""
    full = x.float()
    full = full * (full.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)
    return (full if weight is None else full * weight).to(x.dtype)
