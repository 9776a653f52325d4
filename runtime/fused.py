"""What surrounds the products of a denoising step, in few launches: sampler and decision, norms, rotation, attention.

Everything reads and writes device memory only: nothing waits for the host, nothing depends on values that the host
would have to know, no memory is taken that a CUDA graph could not keep. Kernels are in fused_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime import fused_kernels
from dgq.runtime.repack import COLUMNS
from dgq.runtime.settings import SamplerConfig

_SLICE = 4096  # of the vocabulary, tokens
_LEAST = 512  # the sampler's chunk
_TOKENS = 4  # routed by a program


@dataclass(frozen=True)
class Denoising:
    """The canvases of a batch, and where each is on its way; a row's numbers are its own, so rows may be out of step.

    canvas: what the next step reads; argmax: what would be committed now. took: steps made; block and step (from 1)
    count the random numbers; temperature: the next step's divisor; streak: how many steps the argmax has stood.
    Of the last step: sampled, found (argmax), entropy in nats (NaN where a logit is no number), accepted, mean entropy.
    A row that is done changes no more.
    """

    settings: Tensor  # float32 (6,)
    seed: Tensor  # int64 (1,)
    numbers: Tensor  # int64 (rows,): each row's number in the random stream
    block: Tensor  # int32 (rows,), like step, streak and took
    step: Tensor
    streak: Tensor
    took: Tensor
    done: Tensor  # int8 (rows,)
    temperature: Tensor  # float32 (rows,)
    mean: Tensor  # float32 (rows,)
    canvas: Tensor  # int64 (rows, canvas), like argmax, sampled and found
    argmax: Tensor
    sampled: Tensor
    found: Tensor
    accepted: Tensor  # bool (rows, canvas)
    entropy: Tensor  # float32 (rows, canvas)
    scale: Tensor  # float32 (rows * canvas,), what a row of sample()'s probabilities is to be multiplied with
    vocab: int
    softcap: float
    _whole: Tensor
    _largest: Tensor  # (rows * canvas, slices), like the rest
    _first: Tensor
    _mass: Tensor
    _weighted: Tensor

    @classmethod
    def new(
        cls, rows: int, canvas: int, vocab: int, softcap: float, config: SamplerConfig, device: torch.device | str
    ) -> Denoising:
        """Room for a batch; start() makes it the first one."""

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        positions = rows * canvas
        parts = positions, triton.cdiv(vocab, _slice(vocab))
        whole = room(positions, 3, dtype=torch.float32)
        state = cls(
            settings=room(6, dtype=torch.float32),
            seed=room(1),
            numbers=room(rows),
            block=room(rows, dtype=torch.int32),
            step=room(rows, dtype=torch.int32),
            streak=room(rows, dtype=torch.int32),
            took=room(rows, dtype=torch.int32),
            done=room(rows, dtype=torch.int8),
            temperature=room(rows, dtype=torch.float32),
            mean=room(rows, dtype=torch.float32),
            canvas=room(rows, canvas),
            argmax=room(rows, canvas),
            sampled=room(rows, canvas),
            found=room(rows, canvas),
            accepted=room(rows, canvas, dtype=torch.bool),
            entropy=room(rows, canvas, dtype=torch.float32),
            scale=whole[:, 0],
            vocab=vocab,
            softcap=softcap,
            _whole=whole,
            _largest=room(*parts, dtype=torch.float32),
            _first=room(*parts, dtype=torch.int32),
            _mass=room(*parts, dtype=torch.float32),
            _weighted=room(*parts, dtype=torch.float32),
        )
        state.configure(config)
        return state

    def configure(self, config: SamplerConfig) -> None:
        """Take other settings; graphs that were captured heed them."""
        values = (
            config.t_min,
            config.t_max - config.t_min,
            config.steps,
            config.entropy_bound,
            config.confidence,
            config.stability,
        )
        self.settings.copy_(torch.tensor(values, dtype=torch.float32))

    def start(self, seed: int, numbers: Sequence[int]) -> None:
        """Another random stream: see rng.CounterRandom. begin() makes the canvases."""
        self.seed.fill_((seed & (1 << 64) - 1) - ((seed >> 63 & 1) << 64))  # the same 64 bits, with a sign
        self.numbers.copy_(torch.tensor(numbers))


def _slice(vocab: int) -> int:
    power: int = triton.next_power_of_2(vocab)
    return min(_SLICE, max(_LEAST, power))


def begin(state: Denoising, block: Tensor) -> None:
    """New canvases of noise: block int32 (rows,), each row's number of the block, from 0."""
    rows, canvas = state.canvas.shape
    state.block.copy_(block)
    fused_kernels.begin[(rows,)](
        state.settings, state.seed, state.step, state.block, state.numbers, state.temperature, state.done,
        state.streak, state.took, state.canvas, canvas, state.vocab, C=triton.next_power_of_2(canvas),
    )  # fmt: skip


def sample(state: Denoising, logits: Tensor, probabilities: Tensor | None = None) -> None:
    """What a step's logits say: fills state's entropy, found, sampled and scale.

    logits (rows, canvas, vocab), bfloat16 or float32, as the head's product gives them: neither capped nor divided by
    the temperature. probabilities bfloat16 (rows * canvas, vocab), contiguous, gets the next step's self-conditioning:
    each row times its scale is the softmax of the capped logits over the temperature.
    """
    rows, canvas = state.canvas.shape
    vocab, softcap = state.vocab, state.softcap
    flat = logits.view(rows * canvas, vocab)
    width = _slice(vocab)
    count, positions = triton.cdiv(vocab, width), rows * canvas
    largest, first, mass, weighted = state._largest, state._first, state._mass, state._weighted
    assert flat.stride(1) == 1 and (probabilities is None or probabilities.is_contiguous())
    fused_kernels.slices[(positions, count)](
        flat, state.temperature, state.done, largest, first, mass, weighted, probabilities, flat.stride(0), canvas,
        vocab, softcap, SLICE=width, WRITE=probabilities is not None, EVEN=vocab % width == 0, num_warps=4,
    )  # fmt: skip
    fused_kernels.pick[(positions,)](
        flat, state.temperature, state.done, state.seed, state.step, state.block, state.numbers, largest, first, mass,
        weighted, state.entropy, state.found, state.sampled, state._whole, flat.stride(0), canvas, vocab, count,
        softcap, SLICE=width, COUNT=triton.next_power_of_2(count), CHUNKS=width // _LEAST, num_warps=4,
    )  # fmt: skip
    if probabilities is not None:
        fused_kernels.rewrite[(positions, min(count, 4))](
            flat, state.temperature, state.done, state._whole, probabilities, flat.stride(0), canvas, vocab, softcap,
            count, SLICE=width, num_warps=4,
        )  # fmt: skip


def decide(state: Denoising) -> None:
    """After sample(): accept by the entropy bound, scramble the rest, stop or go on; sampler.py is the reference."""
    rows, canvas = state.canvas.shape
    fused_kernels.decide[(rows,)](
        state.settings, state.seed, state.step, state.block, state.numbers, state.temperature, state.done,
        state.streak, state.took, state.canvas, state.argmax, state.accepted, state.mean, state.entropy, state.found,
        state.sampled, canvas, state.vocab, C=triton.next_power_of_2(canvas), PART=32,
    )  # fmt: skip


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


@dataclass(frozen=True)
class Blocks:
    """How attend() cuts its work: queries and keys of a program, warps, stages of loads; apart: whether keys that all
    queries see are gone through without masks; pieces: of the values' columns, a program each."""

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = True
    pieces: int = 1


def blocks_for(dim: int, device: torch.device) -> Blocks:
    """As measured on Hopper; where shared memory is smaller, what fits there."""
    room = 227 << 10
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        room = getattr(properties, "shared_memory_per_block_optin", room)  # not in torch's annotations
    if dim > 256:
        return Blocks(64, 32, 4, 3, True, 2) if room >= 210 << 10 else Blocks(32, 16, 8, 2, False)
    if dim > 128:
        return Blocks(64, 64, 4, 3) if room >= 224 << 10 else Blocks(64, 32, 4, 2)
    return Blocks(64, 64, 4, 2)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    window: int | None = None,
    causal: bool = False,
    start: Tensor | None = None,
    pages: Tensor | None = None,
    ordered: bool = False,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
    splits: int | None = None,
) -> Tensor:
    """softmax(q k^T) v, unscaled: place()'s queries over the tokens in the cache -> bfloat16 (rows, tokens, heads *
    head_dim).

    A row's queries see the length[row] tokens that are there and all of the queries' own ones; causal: only those up
    to themselves. window: only the last window - 1 of the length[row], or, causal, of those before the query. start
    int32 (rows,): no token before that. keys, values, pages: as place() has them; size is a multiple of 64, and at
    least window - 1 + tokens, or whatever length + tokens will be. ordered: a token's columns as repack.in_order puts
    them.
    """
    rows, heads, tokens, dim = q.shape
    _, kv_heads, size, _ = keys.shape
    group = heads // kv_heads
    cut = blocks_for(dim, q.device) if blocks is None else blocks
    assert q.is_contiguous() and keys.stride() == values.stride() and size % cut.keys == 0
    assert not ordered or heads * dim % COLUMNS == 0
    row_blocks, heads_and_pieces = triton.cdiv(group * tokens, cut.queries), kv_heads * cut.pieces
    splits = _splits(row_blocks * heads_and_pieces * rows, q.device) if splits is None else splits
    out = torch.empty(rows, tokens, heads * dim, dtype=torch.bfloat16, device=q.device) if out is None else out
    parts, weights = out, None
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        weights = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    table = 0 if pages is None else pages.stride(0)
    fused_kernels.attend[(row_blocks, heads_and_pieces, rows * splits)](
        q, keys, values, pages, length, start, parts, weights, tokens, group, *keys.stride()[:3], table, size,
        1 << 30 if window is None else window, splits, D=dim, WIDTH=dim // cut.pieces, BLOCK_M=cut.queries,
        BLOCK_N=cut.keys, SPLIT=splits > 1, CAUSAL=causal, PAGED=pages is not None, ORDERED=ordered, APART=cut.apart,
        STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    if weights is not None:
        fused_kernels.join[(rows * tokens,)](
            parts, weights, out, tokens, heads, rows * heads * tokens, splits, D=dim,
            HEADS=triton.next_power_of_2(heads), ORDERED=ordered, num_warps=8,
        )  # fmt: skip
    return out


def _splits(programs: int, device: torch.device) -> int:
    """As many parts of the keys as make one wave of programs."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(8, processors // programs))


def soft_embed(probabilities: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """sample()'s probabilities (n, vocab) @ table (vocab, hidden), both bfloat16 -> (n, hidden) bfloat16, summed in
    float32. A row's scale is still to be multiplied with: norm() does."""
    return torch.mm(probabilities, table) if out is None else torch.mm(probabilities, table, out=out)
