"""Kernels around a step's products against float64 and the CPU's path; on a GPU if there is one, else interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgq.runtime import sampler
from dgq.runtime.rng import CounterRandom
from dgq.runtime.settings import SamplerConfig

fused = pytest.importorskip("dgq.runtime.fused", reason="needs Triton", exc_type=ImportError)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # numpy's, of infinities
]
LIMIT = 4e-3
SOFTCAP = 30.0
SEED = 12345678901234


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def state_of(rows: int, canvas: int, vocab: int, config: SamplerConfig, numbers: list[int], seed: int = SEED):
    """After begin() of block 4, what a step must write poisoned."""
    state = fused.Denoising.new(rows, canvas, vocab, SOFTCAP, config, DEVICE)
    for part in (state.entropy, state.mean, state.scale, state.temperature):
        part.fill_(torch.nan)
    for part in (state.argmax, state.found, state.sampled, state.canvas, state.streak, state.took, state.done):
        part.fill_(99)
    state.start(seed, numbers)
    fused.begin(state, torch.full((rows,), 4, dtype=torch.int32, device=DEVICE))
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
    fused.sample(state, logits, probabilities)
    exact = processed(logits, state.temperature)
    shares = exact.softmax(-1)
    entropy = -(exact.log_softmax(-1) * shares).sum(-1)
    assert torch.allclose(state.entropy.double(), entropy, rtol=2e-5, atol=2e-6)
    assert torch.equal(state.found, logits.argmax(-1) if spread < 40 else exact.float().argmax(-1))
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
    fused.sample(state, logits, probabilities)
    shares = processed(logits, state.temperature).softmax(-1)[0]
    for row, scale, exact in zip(probabilities, state.scale, shares, strict=True):
        assert error(row.double() * scale.double(), exact) <= LIMIT * (1 + 0.01 / heat)  # float32's tanh is magnified


def test_a_logit_that_is_no_number_shows_in_the_entropy() -> None:
    state = state_of(1, 3, 1300, SamplerConfig(), [0])
    logits = torch.randn(1, 3, 1300, device=DEVICE).bfloat16()
    logits[0, 1, 700] = torch.nan
    fused.sample(state, logits)
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
        fused.sample(state, logits)
        fused.decide(state)
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


@pytest.mark.parametrize("bound", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("canvas", [1, 32, 100, 256])
def test_acceptance(canvas: int, bound: float) -> None:
    """Of entropies with many equals."""
    torch.manual_seed(4)
    state = state_of(2, canvas, 600, SamplerConfig(entropy_bound=bound), [0, 1])
    state.entropy.copy_((torch.rand(2, canvas) ** 8 * 64).round() / 64)
    state.sampled.fill_(-1)
    fused.decide(state)
    expected = sampler.accept(state.entropy, bound)
    assert torch.equal(state.accepted, expected)
    assert torch.equal(state.canvas == -1, expected)
    assert math.isclose(float(state.mean[1]), float(state.entropy[1].mean()), rel_tol=1e-5, abs_tol=1e-9)
