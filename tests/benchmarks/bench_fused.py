"""What a step's parts beside the weights' products cost at the shapes of the 26B, beside torch's own operations.

    python tests/benchmarks/bench_fused.py [--context 1024] [--rows 1] [--schemes q4_k …] [--runs 20]

Hidden 2816, canvas 256, vocabulary 262,144; random inputs. A CUDA graph holds a few calls, each on its own inputs;
figures are medians over its replays, a call, in microseconds. Needs a GPU. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.kernels import cached_attention, denoising, dense, fused
from dgq.runtime.model import sampler
from dgq.runtime.model.layers import rms_norm
from dgq.runtime.shape.settings import SamplerConfig

HIDDEN, INNER, CANVAS, VOCAB, HEADS, WINDOW, EPS = 2816, 2112, 256, 262144, 16, 1024, 1e-6
CALLS = 8
Call = Callable[[], object]
Parts = dict[str, tuple[list[Call], list[Call]]]  # ours, torch's


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def microseconds(calls: list[Call], runs: int) -> float:
    """The median of a call, of a graph of all of them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times[2:]) * 1e3


def stock_sampler(logits: torch.Tensor) -> torch.Tensor:
    """As transformers does it, the next step's softmax included."""
    capped = 30 * torch.tanh(logits.float() / 30) / 0.6
    shares = capped.softmax(-1)
    torch.multinomial(shares.flatten(0, 1), 1)
    entropy = -(capped.log_softmax(-1) * shares).sum(-1)
    sampler.accept(entropy, 0.1)
    capped.argmax(-1)
    return capped.bfloat16().softmax(-1, dtype=torch.float32).bfloat16()


def sampling(rows: int) -> Parts:
    state = denoising.Denoising.new(rows, CANVAS, VOCAB, 30.0, SamplerConfig(), "cuda")
    state.start(1, range(rows))
    denoising.begin(state, torch.zeros(rows, dtype=torch.int32, device="cuda"))
    logits = [normal(rows, CANVAS, VOCAB) * 3 for _ in range(2)]
    probabilities = torch.empty(rows * CANVAS, VOCAB, dtype=torch.bfloat16, device="cuda")
    table, x = normal(VOCAB, HIDDEN), normal(rows * CANVAS, HIDDEN)
    denoising.sample(state, logits[0], probabilities)
    stock = [partial(stock_sampler, one) for one in logits[: 2 if rows < 4 else 1]]
    out = torch.empty(rows * CANVAS, VOCAB, dtype=torch.bfloat16, device="cuda")
    soft = torch.empty(rows * CANVAS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    return {
        "sample": ([partial(denoising.sample, state, one) for one in logits], []),
        "sample, probabilities": ([partial(denoising.sample, state, one, probabilities) for one in logits], stock),
        "decide": ([partial(denoising.decide, state)] * CALLS, []),
        "head": ([], [partial(torch.mm, x, table.T, out=out)]),
        "soft embedding": ([partial(fused.soft_embed, probabilities, table, soft)], []),
    }


def layer(rows: int) -> Parts:
    n = rows * CANVAS
    w = torch.randn(5, HIDDEN, device="cuda")
    xs = [normal(n, HIDDEN) for _ in range(CALLS)]
    other, parts, scalar = normal(n, HIDDEN), normal(n, 8, HIDDEN), normal(1)
    out = normal(n, HIDDEN)
    scores, scale = normal(n, 128), normal(128)

    def route() -> torch.Tensor:
        share, chosen = scores.softmax(-1, dtype=torch.float32).topk(8, dim=-1)
        return share / share.sum(-1, keepdim=True) * scale[chosen]

    def mixed(x: torch.Tensor) -> list[torch.Tensor]:
        x = x + rms_norm(other, w[0], EPS)
        return [rms_norm(x, w[1], EPS), rms_norm(x, w[2], EPS), rms_norm(x, None, EPS) * out * HIDDEN**-0.5]

    def fed(x: torch.Tensor) -> torch.Tensor:
        both = rms_norm(other, w[0], EPS) + rms_norm(parts.sum(1), w[1], EPS)
        return rms_norm((x + rms_norm(both, w[2], EPS)) * scalar, w[3], EPS)

    mix = partial(fused.mixed, seen=other, weights=(w[0], w[1], w[2]), router_scale=w[3], eps=EPS)
    end = partial(fused.fed, dense=other, weights=(w[0], w[1], w[2], w[3]), scalar=scalar, eps=EPS)
    return {
        "norm": (
            [partial(fused.norm, x, w[0], EPS) for x in xs],
            [partial(rms_norm, x, w[0], EPS) for x in xs],
        ),
        "mixed": ([partial(mix, x) for x in xs], [partial(mixed, x) for x in xs]),
        "fed, one part": ([partial(end, x, routed=other) for x in xs], []),
        "fed, eight parts": ([partial(end, x, routed=parts) for x in xs], [partial(fed, x) for x in xs]),
        "route": ([partial(fused.route, scores, scale, 8)] * CALLS, [route] * CALLS),
    }


def folded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q.view(len(q), k.shape[1], -1, q.shape[3]), k, v, scale=1.0)


def attention(rows: int, context: int) -> Parts:
    parts: Parts = {}
    length = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    for name, kv, dim, window in (("sliding", 8, 256, WINDOW), ("full", 2, 512, None)):
        held = context if window is None else min(context, window - 1)
        size = -(-(held + CANVAS) // 64) * 64
        turns = fused.rotations(length, torch.rand(dim // 2, device="cuda"), CANVAS)
        norms = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
        product = normal(rows * CANVAS, (HEADS + 2 * kv) * dim)
        q, k, v = product.split((HEADS * dim, kv * dim, kv * dim), -1)
        caches = [normal(2, rows, kv, size, dim) for _ in range(CALLS)]
        queries = [normal(rows, HEADS, CANVAS, dim) * dim**-0.5 for _ in range(CALLS)]
        places = [partial(fused.place, q, k, v, norms, turns, fused.KeyValues(*c, length), EPS) for c in caches]
        ours = [
            partial(cached_attention.attend, q, fused.KeyValues(*c, length), fused.Mask(window))
            for q, c in zip(queries, caches, strict=True)
        ]
        seen = held + CANVAS
        torchs = [
            partial(folded_sdpa, q, c[0][:, :, :seen], c[1][:, :, :seen]) for q, c in zip(queries, caches, strict=True)
        ]
        parts |= {f"place, {name}": (places, []), f"attend, {name}": (ours, torchs)}
        parts |= {f"rotations, {name}": ([partial(fused.rotations, length, norms[0][: dim // 2], CANVAS)] * CALLS, [])}
    return parts


def packed(scheme: str, rows: int, columns: int) -> Packed:
    weight = normal(rows, columns) * 0.02
    return Packed(SCHEMES[scheme], (rows, columns), SCHEMES[scheme].quantize(weight))


def copies(weight: Any) -> list[Any]:
    """In memory of their own, so that one call does not find another's in the cache."""
    return [weight, *(deepcopy(weight) for _ in range(CALLS - 1))]


def products(rows: int, schemes: Sequence[str]) -> Parts:
    """A sliding layer's dense products, packed, beside BF16 by cuBLAS; and the weights decoded, without a product."""
    parts: Parts = {}
    x = {columns: normal(rows * CANVAS, columns) for columns in (HIDDEN, HEADS * 256, INNER)}
    shapes = {"qkv": ((4096, 2048, 2048), HIDDEN), "o": ((HIDDEN,), HEADS * 256)}
    for name, (outs, columns) in shapes.items():
        plain = [normal(sum(outs), columns) for _ in range(CALLS)]
        parts[f"{name}, bf16"] = [], [partial(linear, x[columns], one) for one in plain]
        for scheme in schemes:
            weights = copies(dense.pack([packed(scheme, out, columns) for out in outs]))
            parts[f"{name}, {scheme}"] = [partial(dense.linear, x[columns], one, True) for one in weights], []
            parts[f"{name}, {scheme} decoded"] = [partial(dense.decoded, one.parts[0]) for one in weights], []
    both, down = ([normal(*shape) for _ in range(CALLS)] for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
    mlps = [partial(plain_mlp, x[HIDDEN], *pair) for pair in zip(both, down, strict=True)]
    parts["MLP, bf16"] = [], mlps
    for scheme in schemes:
        narrow = "q5_0" if scheme == "q4_k" else scheme
        gate_up = dense.pack_gated(*[packed(scheme, INNER, HIDDEN)] * 2)
        pairs = copies((gate_up, dense.pack([packed(narrow, HIDDEN, INNER)])))
        parts[f"MLP, {scheme}"] = [partial(dense.gated_mlp, x[HIDDEN], *pair, True) for pair in pairs], []
    return parts


def plain_mlp(x: torch.Tensor, both: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return linear(dense.gated(linear(x, both)), down)


def tables(rows: int) -> Parts:
    few = packed("q6_k", VOCAB // 64, HIDDEN)
    table = dense.Table.of(Packed(few.scheme, (VOCAB, HIDDEN), {"": few.parts[""].repeat(64, 1)}))
    x = normal(rows * CANVAS, HIDDEN)
    ids, shares = torch.randint(VOCAB, (rows * CANVAS,), device="cuda"), normal(rows * CANVAS, VOCAB)
    logits = torch.empty_like(shares)
    return {
        "rows of a Q6_K table": ([partial(table.rows, ids)] * CALLS, []),
        "head by pieces": ([partial(table.head, x, logits)], []),
        "soft embedding by pieces": ([partial(table.soft_embed, shares)], []),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--schemes", nargs="*", default=["q4_k", "nf4", "q8_0", "nvfp4"])
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {options.rows} rows, {options.context} tokens cached; microseconds")
    print(f"{'':26}{'ours':>10}{'torch':>10}{'ratio':>8}")
    figures: dict[str, dict[str, float | None]] = {}
    groups = (partial(attention, context=options.context), layer, sampling, tables)
    for group in (*groups, partial(products, schemes=options.schemes)):
        for name, sides in group(options.rows).items():
            ours, torchs = (microseconds(list(calls), options.runs) if calls else None for calls in sides)
            figures[name] = {"ours": ours, "torch": torchs}
            ratio = f"{torchs / ours:8.2f}" if ours and torchs else ""
            shown = (f"{value:10.1f}" if value else f"{'':10}" for value in (ours, torchs))
            print(f"{name:26}{''.join(shown)}{ratio}", flush=True)
        torch.cuda.empty_cache()
    print(json.dumps({"device": device, "rows": options.rows, "context": options.context, **figures}))


if __name__ == "__main__":
    main()
