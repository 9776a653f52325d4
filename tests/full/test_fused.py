"""Kernels around a step's products against float64 and the CPU's path; on a GPU if there is one, else interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgq.runtime.kernels.repack import in_order
from dgq.runtime.model import sampler
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.shape.settings import SamplerConfig

denoising = pytest.importorskip("dgq.runtime.kernels.denoising", reason="needs Triton", exc_type=ImportError)
fused = pytest.importorskip("dgq.runtime.kernels.fused", reason="needs Triton", exc_type=ImportError)
cached_attention = pytest.importorskip(
    "dgq.runtime.kernels.cached_attention", reason="needs Triton", exc_type=ImportError
)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton.runtime.)?interpreter"),  # numpy's, of infinities
]
LIMIT = 4e-3
SOFTCAP = 30.0
SEED = 12345678901234


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def state_of(rows: int, canvas: int, vocab: int, config: SamplerConfig, numbers: list[int], seed: int = SEED):
    """After begin() of block 4, what a step must write poisoned."""
    state = denoising.Denoising.new(rows, canvas, vocab, SOFTCAP, config, DEVICE)
    for part in (state.entropy, state.mean, state.scale, state.temperature):
        part.fill_(torch.nan)
    for part in (state.argmax, state.newest, state.sampled, state.canvas, state.streak, state.took, state.done):
        part.fill_(99)
    state.start(seed, numbers)
    denoising.begin(state, torch.full((rows,), 4, dtype=torch.int32, device=DEVICE))
    return state


def processed(logits: Tensor, temperature: Tensor) -> Tensor:
    return SOFTCAP * torch.tanh(logits.double() / SOFTCAP) / temperature.double().view(-1, 1, 1)


def counted(state, vocab: int) -> CounterRandom:
    return CounterRandom(SEED, state.numbers.tolist(), state.canvas.shape[1], vocab, torch.device(DEVICE))


SHAPES = [(1, 5, 512), (2, 2, 1300), (1, 2, 8192), (1, 2, 20001)] + ([(3, 256, 262144)] if CUDA else [])


@pytest.mark.parametrize("seed", [0, 7, -3, SEED, (1 << 64) - 5])
def test_noise_is_the_cpus(seed: int) -> None:
    state = state_of(3, 37, 262144, SamplerConfig(), [0, 5, (1 << 32) - 1], seed)
    random = CounterRandom(seed, state.numbers.tolist(), 37, 262144, torch.device(DEVICE))
    assert torch.equal(state.canvas, random.canvas(torch.arange(3, device=DEVICE), 4))
    assert state.step.tolist() == [1] * 3 and not state.done.any() and not state.streak.any() and not state.took.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample(shape: tuple[int, int, int], spread: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows, canvas, vocab = shape
    state = state_of(rows, canvas, vocab, SamplerConfig(), list(range(rows)))
    logits = (torch.randn(shape) * spread).to(dtype).to(DEVICE)
    logits[0, 0, vocab // 3 :: 7] = logits[0, 0].max()  # equals: the first is taken
    probabilities = torch.full((rows * canvas, vocab), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    denoising.sample(state, logits, probabilities)
    exact = processed(logits, state.temperature)
    shares = exact.softmax(-1)
    entropy = -(exact.log_softmax(-1) * shares).sum(-1)
    assert torch.allclose(state.entropy.double(), entropy, rtol=2e-5, atol=2e-6)
    assert torch.equal(state.newest, logits.argmax(-1) if spread < 40 else exact.float().argmax(-1))
    assert error(probabilities.double() * state.scale.double()[:, None], shares.flatten(0, 1)) <= LIMIT
    assert torch.isfinite(state.scale).all()
    u = (counted(state, vocab).words(torch.arange(rows, device=DEVICE), 4, 1)[0].double() + 0.5) * 2.0**-32
    upto = shares.cumsum(-1)
    at = state.sampled.unsqueeze(-1)
    assert (shares.gather(-1, at) > 0).all()
    above, below = upto.gather(-1, at).squeeze(-1), (upto - shares).gather(-1, at).squeeze(-1)
    assert ((u < above + 1e-5) & (u > below - 1e-5)).all()
    assert float((torch.searchsorted(upto, u.unsqueeze(-1)).squeeze(-1) == state.sampled).double().mean()) > 0.98


@pytest.mark.parametrize("heat", [0.02, 0.1, 5.0])
def test_any_temperature_and_logits_far_below_the_cap(heat: float) -> None:
    """Probabilities written in one pass would be too small at the first two; rows above and below side by side."""
    torch.manual_seed(2)
    state = state_of(1, 6, 1300, SamplerConfig(), [1])
    state.temperature.fill_(heat)
    logits = torch.randn(1, 6, 1300) * 2
    logits += torch.tensor([-80.0, -25.0, 0.0, 10.0, 25.0, 80.0]).view(1, 6, 1)
    logits = logits.bfloat16().to(DEVICE)
    probabilities = torch.full((6, 1300), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    denoising.sample(state, logits, probabilities)
    shares = processed(logits, state.temperature).softmax(-1)[0]
    for row, scale, exact in zip(probabilities, state.scale, shares, strict=True):
        assert error(row.double() * scale.double(), exact) <= LIMIT * (1 + 0.01 / heat)  # float32's tanh is magnified


def test_a_logit_that_is_no_number_shows_in_the_entropy() -> None:
    state = state_of(1, 3, 1300, SamplerConfig(), [0])
    logits = torch.randn(1, 3, 1300, device=DEVICE).bfloat16()
    logits[0, 1, 700] = torch.nan
    denoising.sample(state, logits)
    assert state.entropy.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_steps_are_the_samplers(stability: int) -> None:
    """Logits that settle: canvases, acceptances and stops over some steps, rows stopping one after the other."""
    torch.manual_seed(3)
    rows, canvas, vocab = 4, 37 if CUDA else 5, 600
    config = SamplerConfig(steps=9, stability=stability, confidence=0.02)
    state = state_of(rows, canvas, vocab, config, [2, 0, 9, 4])
    here, random, stopper = torch.arange(rows, device=DEVICE), counted(state, vocab), sampler.Stopper(config)
    expected, done = state.canvas.clone(), torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    argmax, took = expected, torch.zeros_like(here)
    target = torch.randint(vocab, (rows, canvas, 1), device=DEVICE)
    stops = []
    for step in range(1, 10):
        logits = torch.randn(rows, canvas, vocab, device=DEVICE)
        strength = torch.tensor([2.0, 4.0, 6.0, 0.5], device=DEVICE).view(-1, 1, 1) * step
        logits.scatter_add_(-1, target, strength.expand(-1, canvas, 1))
        logits = logits.bfloat16()
        heat = sampler.temperature(10 - step, config, torch.device(DEVICE))
        assert torch.allclose(state.temperature[~done], heat, rtol=1e-6)
        denoising.sample(state, logits)
        denoising.decide(state)
        capped = SOFTCAP * torch.tanh(logits.float() / SOFTCAP)
        new = sampler.decide(capped, 10 - step, config, lambda p, s=step: random.draw(p, here, 4, s))
        took += ~done
        argmax = torch.where(done[:, None], argmax, new.argmax)
        expected = torch.where(done[:, None], expected, new.canvas)
        assert torch.equal(state.accepted[~done], new.accepted[~done])
        assert torch.allclose(state.mean[~done], new.entropy.mean(-1)[~done], rtol=1e-4, atol=1e-6)
        done = done | stopper.done(argmax, new.entropy)
        stops.append(done.tolist())
        assert torch.equal(state.canvas, expected) and torch.equal(state.argmax, argmax)
        assert torch.equal(state.done.bool(), done) and torch.equal(state.took.long(), took)
    assert len({tuple(stop) for stop in stops}) >= 3, "nothing stopped"


def test_what_was_there_before_the_first_step_is_no_past() -> None:
    state = state_of(1, 5, 600, SamplerConfig(confidence=1.0), [0])
    for streak in (0, 1, 2):
        state.entropy.zero_()
        state.newest.fill_(99)  # as the poison
        state.sampled.fill_(3)
        assert not state.done.any()
        denoising.decide(state)
        assert state.streak.tolist() == [streak] and state.done.tolist() == [min(streak, 1)]
        if state.done.any():
            return


@pytest.mark.parametrize("bound", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("canvas", [1, 32, 100, 256])
def test_acceptance(canvas: int, bound: float) -> None:
    """Of entropies with many equals."""
    torch.manual_seed(4)
    state = state_of(2, canvas, 600, SamplerConfig(entropy_bound=bound), [0, 1])
    state.entropy.copy_((torch.rand(2, canvas) ** 8 * 64).round() / 64)
    state.sampled.fill_(-1)
    denoising.decide(state)
    expected = sampler.accept(state.entropy, bound)
    assert torch.equal(state.accepted, expected)
    assert torch.equal(state.canvas == -1, expected)
    assert math.isclose(float(state.mean[1]), float(state.entropy[1].mean()), rel_tol=1e-5, abs_tol=1e-9)


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else 1 << 20, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a function allocates holds poison, so that a result that it does not write is never right by luck."""
    monkeypatch.setattr(fused.torch, "empty", _poisoned_empty)


def _poisoned_empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None, **_: Any) -> Tensor:
    size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return torch.full(size, torch.nan if dtype.is_floating_point else 1 << 20, dtype=dtype, device=device)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def exact_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x.double()
    x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return x if weight is None else x * weight.double()


EPS = 1e-6
WIDTHS = [(3, 72), (2, 256)] + ([(256, 2816), (1, 2816), (777, 2816)] if CUDA else [])


@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_norm(shape: tuple[int, int]) -> None:
    torch.manual_seed(5)
    x, plus, weight = normal(*shape), normal(*shape), normal(shape[1], dtype=torch.float32)
    scale = (torch.rand(shape[0], 3, device=DEVICE) + 0.1)[:, 1]
    small = (torch.rand(shape[0], 3, device=DEVICE) * 2e-3)[:, 1]  # where eps is felt
    for args, exact in [
        ({"weight": weight}, exact_norm(x, weight)),
        ({"weight": None}, exact_norm(x)),
        ({"weight": None, "plus": plus}, exact_norm(x.double() + plus.double())),
        ({"weight": weight, "scale": scale, "factor": 7.5}, exact_norm(x.double() * scale[:, None] * 7.5, weight)),
        ({"weight": None, "scale": small}, exact_norm(x.double() * small.double()[:, None])),
    ]:
        assert error(fused.norm(x, eps=EPS, **args), exact) <= LIMIT
    out = fused.norm(x, weight, EPS, ordered=True)
    assert error(out, in_order(exact_norm(x, weight))) <= LIMIT


@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_after_attention(shape: tuple[int, int]) -> None:
    torch.manual_seed(6)
    width = shape[1]
    x, seen = normal(*shape), normal(*shape)
    after, dense, routed = (normal(width, dtype=torch.float32) for _ in range(3))
    router_scale = normal(width)
    before, new = x.clone(), x.double() + exact_norm(seen, after)
    out = fused.mixed(x, seen, (after, dense, routed), router_scale, EPS)
    assert error(x, new) <= LIMIT
    assert error(out.dense, exact_norm(x, dense)) <= LIMIT
    assert error(out.router, exact_norm(x) * router_scale.double() * width**-0.5) <= LIMIT
    ordered = in_order(exact_norm(x, routed))
    assert out.routed.shape == ordered.shape and error(out.routed, ordered) <= LIMIT
    assert not out.routed[ordered == 0].any()
    again = fused.mixed(before, seen, (after, dense, routed), router_scale, EPS, ordered=True)
    assert error(again.dense, in_order(exact_norm(before, dense))) <= LIMIT and error(again.routed, ordered) <= LIMIT


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_after_the_experts(shape: tuple[int, int], k: int) -> None:
    torch.manual_seed(7)
    rows, width = shape
    x, dense = normal(*shape), normal(*shape)
    parts = normal(rows, k, width) if k > 1 else normal(*shape)
    w1, w2, w3, following = (normal(width, dtype=torch.float32) for _ in range(4))
    scalar = torch.tensor([0.37], dtype=torch.bfloat16, device=DEVICE)
    total = parts.double().sum(1) if k > 1 else parts
    both = exact_norm(dense, w1) + exact_norm(total, w2)
    before, new = x.clone(), (x.double() + exact_norm(both, w3)) * scalar.double()
    out = fused.fed(x, dense, parts, (w1, w2, w3, following), scalar, EPS)
    assert error(x, new) <= LIMIT
    assert error(out, exact_norm(x, following)) <= LIMIT
    ordered = fused.fed(before, dense, parts, (w1, w2, w3, following), scalar, EPS, ordered=True)
    assert error(ordered, in_order(exact_norm(before, following))) <= LIMIT and error(before, new) <= LIMIT


@pytest.mark.parametrize(("tokens", "experts", "k"), [(5, 16, 4), (3, 128, 8), (9, 30, 1), (1, 12, 12)])
def test_route(tokens: int, experts: int, k: int) -> None:
    torch.manual_seed(8)
    tokens = tokens * 85 if CUDA else tokens
    scores, scale = normal(tokens, experts) * 3, normal(experts)
    scores[0] = 1.0  # equals: the first are taken
    chosen, share = fused.route(scores, scale, k)
    best = scores.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(chosen.long(), best)
    exact = scores.double().softmax(-1).gather(-1, best)
    exact = exact / exact.sum(-1, keepdim=True) * scale.double()[best]
    assert torch.allclose(share.double(), exact, rtol=1e-5)


def test_scores_that_are_no_numbers_stay_within_the_experts() -> None:
    chosen, _ = fused.route(torch.full((4, 12), torch.nan, device=DEVICE), normal(12), 3)
    assert bool(((chosen >= 0) & (chosen < 12)).all())


@pytest.mark.parametrize("full", [False, True])
def test_rotations(full: bool) -> None:
    frequencies = 1 / (1e6 if full else 1e4) ** (torch.arange(0, 64, 2) / 64)
    frequencies[8 if full else 32 :] = 0
    length = torch.tensor([0, 5, 262_000], dtype=torch.int32, device=DEVICE)
    out = fused.rotations(length, frequencies.to(DEVICE), 3)
    position = (length[:, None] + torch.arange(3, device=DEVICE)).flatten().float()
    angle = (position[:, None] * frequencies.to(DEVICE)).double()  # rounded as the model does
    assert torch.allclose(out[0].double(), angle.cos(), atol=1e-6) and torch.allclose(
        out[1].double(), angle.sin(), atol=1e-6
    )


HEADS = [(4, 2, 16, 5), (3, 1, 32, 3)] + ([(16, 8, 256, 256), (16, 2, 512, 256), (16, 8, 256, 1)] if CUDA else [])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, tokens, heads, d); cos and sin (rows * tokens, d / 2)."""
    cos, sin = (part.double().view(*x.shape[:2], 1, -1) for part in (cos, sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_place(shape: tuple[int, int, int, int], paged: bool) -> None:
    """Queries, keys and values of one product; the ring's end is crossed; slots beside the written ones keep theirs."""
    torch.manual_seed(9)
    heads, kv, dim, tokens = shape
    rows, size = 2, 64 if tokens < 64 else 512
    length = torch.tensor([size - 2, 3 * size + 1], dtype=torch.int32, device=DEVICE)
    qkv = normal(rows * tokens, (heads + 2 * kv) * dim)
    q, k, v = qkv.split((heads * dim, kv * dim, kv * dim), -1)
    norms = normal(dim, dtype=torch.float32), normal(dim, dtype=torch.float32)
    turns = fused.rotations(length, torch.rand(dim // 2, device=DEVICE), tokens)
    pages = torch.randperm(16)[:12].view(2, 6).int().to(DEVICE) if paged else None
    buffer = normal(2, 16 if paged else rows, kv, size, dim)
    expected = buffer.double()
    out = fused.place(q, k, v, norms, turns, fused.KeyValues(buffer[0], buffer[1], length, pages), EPS)
    q, k, v = (part.unflatten(-1, (-1, dim)).unflatten(0, (rows, tokens)) for part in (q, k, v))
    assert error(out, turned(exact_norm(q, norms[0]), *turns).transpose(1, 2)) <= LIMIT
    k, v = turned(exact_norm(k, norms[1]), *turns), exact_norm(v)
    for row in range(rows):
        for i in range(tokens):
            p = int(length[row]) + i
            page = row if pages is None else int(pages[row, p // size])
            expected[0, page, :, p % size], expected[1, page, :, p % size] = k[row, i], v[row, i]
    untouched = expected == buffer.double()
    assert int((~untouched).sum()) <= 2 * rows * tokens * kv * dim
    assert error(buffer, expected) <= LIMIT
    assert float((buffer.double() - expected).abs().max()) < 0.1


CASES = [  # heads, kv heads, head_dim, tokens, size, window, lengths, starts, causal, paged, splits
    (4, 2, 16, 5, 64, None, [11, 30], None, False, False, 1),
    (4, 2, 16, 5, 64, None, [11, 30], [4, 0], False, False, 3),
    (2, 1, 32, 21, 64, 24, [0, 200], None, False, False, 2),  # a ring; nothing cached
    (4, 1, 16, 9, 32, None, [40, 3], None, False, True, 2),
    (4, 2, 16, 19, 64, 12, [0, 77], None, True, False, 1),
    (2, 2, 16, 40, 64, None, [7], [7], True, False, 2),
    (3, 1, 16, 1, 32, None, [0], None, False, False, 2),  # a part without keys
]
if CUDA:
    CASES += [
        (16, 8, 256, 256, 1280, 1024, [1024], None, False, False, None),
        (16, 8, 256, 256, 1280, 1024, [100, 5000], [30, 4800], False, False, None),
        (16, 2, 512, 256, 1280, None, [1024], None, False, False, None),
        (16, 2, 512, 256, 8192, None, [7777, 1, 3000], [0, 0, 2999], False, False, None),
        (16, 2, 512, 256, 256, None, [1000, 2222], None, False, True, None),
        (16, 8, 256, 512, 1536, 1024, [900], None, True, False, None),
        (16, 2, 512, 300, 2048, None, [1300], None, True, False, None),
        (16, 2, 512, 7, 2048, None, [1300], None, True, False, 8),
    ]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case: tuple, apart: bool) -> None:
    heads, kv, dim, tokens, size, window, lengths, starts, causal, paged, splits = case
    torch.manual_seed(10)
    rows, group = len(lengths), heads // kv
    q = (torch.randn(rows, heads, tokens, dim) * 1.5 * dim**-0.5).bfloat16().to(DEVICE)
    count = -(-(max(lengths) + tokens) // size)
    pages = torch.randperm(rows * count + 3)[: rows * count].view(rows, count).int().to(DEVICE) if paged else None
    buffer = torch.full((2, rows * count + 3 if paged else rows, kv, size, dim), torch.nan).bfloat16().to(DEVICE)
    expected = torch.empty(rows, tokens, heads, dim, dtype=torch.float64, device=DEVICE)
    for row, length in enumerate(lengths):
        total, start = length + tokens, 0 if starts is None else starts[row]
        k, v = (torch.randn(kv, total, dim).mul(scale).bfloat16().to(DEVICE) for scale in (1.5, 1.0))
        for p in range(max(0, total - size) if not paged else 0, total):
            page = row if pages is None else int(pages[row, p // size])
            buffer[0, page, :, p % size], buffer[1, page, :, p % size] = k[:, p], v[:, p]
        at = torch.arange(total, device=DEVICE)
        place = length + torch.arange(tokens, device=DEVICE)[:, None]
        seen = (at >= start).expand(tokens, -1)
        if causal:
            seen = seen & (at <= place) & (at > place - (window or 1 << 30))
        elif window:
            seen = seen & (at > length - window)
        k, v = (part.double().repeat_interleave(group, 0) for part in (k, v))
        scores = (q[row].double() @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        expected[row] = (scores.softmax(-1) @ v).transpose(0, 1)
    small = cached_attention.Blocks(16, 16, 4, 2, apart, 1 if apart else dim // 16)
    cut = None if dim > 128 else small
    begin = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    cache = cached_attention.KeyValues(buffer[0], buffer[1], length, pages)
    mask = cached_attention.Mask(window, causal, begin)
    out = cached_attention.attend(q, cache, mask, blocks=cut, splits=splits)
    assert error(out, expected.flatten(2)) <= LIMIT
    if heads * dim % 64 == 0:
        again = cached_attention.attend(q, cache, mask, ordered=True, blocks=cut, splits=splits)
        assert error(again.flatten(0, 1), in_order(expected.flatten(2).flatten(0, 1))) <= LIMIT


IMAGES = [  # heads, kv heads, head_dim, slots, window, length, tokens of each image (0: of text), splits
    (4, 2, 16, 128, 12, 9, [3, -20, 2, -1, 1, -30, 5], 1),  # an image longer than the window
    (4, 2, 16, 128, None, 40, [-17, 4, -9], 3),
    (3, 1, 32, 64, 8, 0, [-40, 1], 2),
] + ([(16, 8, 256, 1536, 1024, 900, [30, -280, 3, -280, 9], None),
      (16, 2, 512, 3072, None, 900, [30, -1120, 3, -280, 9], None)] if CUDA else [])  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_attend_over_images(case: tuple, apart: bool) -> None:
    """Causal, and every token of a run of n < 0 sees the whole run."""
    heads, kv, dim, size, window, length, runs, splits = case
    torch.manual_seed(12)
    tokens, group = sum(map(abs, runs)), heads // kv
    q = (torch.randn(1, heads, tokens, dim) * 1.5 * dim**-0.5).bfloat16().to(DEVICE)
    image = torch.cat([torch.full((abs(n),), -1 if n > 0 else i) for i, n in enumerate(runs)]).to(DEVICE)
    buffer = torch.full((2, 1, kv, size, dim), torch.nan).bfloat16().to(DEVICE)
    buffer[:, :, :, : length + tokens] = torch.randn(2, 1, kv, length + tokens, dim).bfloat16().to(DEVICE)
    place, at = torch.arange(tokens, device=DEVICE)[:, None] + length, torch.arange(length + tokens, device=DEVICE)
    seen = (at <= place) & (at > place - (window or 1 << 30))
    seen[:, length:] |= (image[:, None] == image) & (image >= 0)
    k, v = (part[0, :, : length + tokens].double().repeat_interleave(group, 0) for part in buffer)
    scores = (q[0].double() @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(0, 1)[None].flatten(2)
    spans = [(i if n < 0 else 0, -n - 1 - i if n < 0 else 0) for n in runs for i in range(abs(n))]
    reach = torch.tensor(spans, dtype=torch.int32, device=DEVICE).T.contiguous()
    cut = None if dim > 128 else cached_attention.Blocks(16, 16, 4, 2, apart, 1)
    held = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    cache, mask = cached_attention.KeyValues(*buffer, held), cached_attention.Mask(window, True, reach=reach)
    out = cached_attention.attend(q, cache, mask, blocks=cut, splits=splits)
    assert error(out, expected) <= LIMIT


def test_soft_embedding() -> None:
    """sample()'s probabilities and scale, through the product and the norm, against the reference's softmax."""
    torch.manual_seed(11)
    rows, vocab, hidden = (256, 262144, 2816) if CUDA else (4, 600, 72)
    state = state_of(1, rows, vocab, SamplerConfig(), [0])
    logits = (torch.randn(1, rows, vocab) * 4).bfloat16().to(DEVICE)
    probabilities = poisoned(rows, vocab)
    denoising.sample(state, logits, probabilities)
    table, weight = normal(vocab, hidden), normal(hidden, dtype=torch.float32)
    found = fused.norm(fused.soft_embed(probabilities, table), weight, EPS, scale=state.scale, factor=hidden**0.5)
    shares = processed(logits, state.temperature).softmax(-1)[0]
    exact = torch.cat([part @ table.double() for part in shares.split(64)])
    assert error(found, exact_norm(exact * hidden**0.5, weight)) <= LIMIT
