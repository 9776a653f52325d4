"""The measures of convert/layerwise/measure.py by formulas of others, and what an interval is."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from dgq.convert.layerwise.measure import MEASURES, compare, interval, noised

VOCAB, HIDDEN = 300, 16


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


@pytest.mark.parametrize("piece", [1 << 24, 7 * VOCAB], ids=["at once", "in pieces"])
def test_measures_are_what_their_names_say(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgq.convert.layerwise.measure.LOGITS", piece)
    table_a, table_b = heads(1)
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(3, 10, HIDDEN, generator=generator, dtype=torch.float64)
    b = a + 0.1 * torch.randn(a.shape, generator=generator, dtype=torch.float64)
    temperature, bound = torch.tensor(0.5), 0.4
    found = compare(a, b, (lambda x: x @ table_a.T, lambda x: x @ table_b.T), VOCAB, temperature, bound)
    of = dict(zip(MEASURES, found, strict=True))
    p, q = Categorical(logits=a @ table_a.T), Categorical(logits=b @ table_b.T)
    torch.testing.assert_close(of["kl"], kl_divergence(p, q).to(found.dtype), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of["reverse_kl"], kl_divergence(q, p).to(found.dtype), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of["entropy"], (q.entropy() - p.entropy()).to(found.dtype), rtol=1e-9, atol=1e-12)
    assert torch.equal(of["top1"].bool(), p.probs.argmax(-1) == q.probs.argmax(-1))
    five = [[set(row.topk(5).indices.tolist()) for row in side.probs.flatten(0, 1)] for side in (p, q)]
    expected = torch.tensor([len(x & y) / 5 for x, y in zip(*five, strict=True)]).view(3, 10)
    assert torch.allclose(of["top5"].float(), expected)
    for name, side, table in (("sure_a", a, table_a), ("sure_b", b, table_b)):
        entropy = Categorical(logits=side @ table.T / temperature).entropy()
        for row, accepted in zip(entropy, of[name].bool(), strict=True):
            order = sorted(range(10), key=lambda i, row=row: float(row[i]))
            kept = {order[i] for i in range(10) if sum(float(row[j]) for j in order[:i]) <= bound}
            assert kept == set(accepted.nonzero().flatten().tolist())


def test_a_model_against_itself_is_exactly_nothing() -> None:
    table, _ = heads(3)
    states = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).float()

    def head(x: torch.Tensor) -> torch.Tensor:
        return x @ table.float().T

    of = dict(zip(MEASURES, compare(states, states, (head, head), VOCAB, torch.tensor(1.0), 0.1), strict=True))
    assert all(not bool(of[name].any()) for name in ("kl", "reverse_kl", "entropy"))
    assert bool((of["top1"] == 1).all()) and bool((of["top5"] == 1).all())


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(4)
    held = 0
    for _ in range(200):
        values = torch.rand(60, generator=generator).square()  # mean 1/3, skewed
        middle, low, high = interval(values, resamples=400)
        assert low <= middle <= high
        held += low <= 1 / 3 <= high
    assert 0.88 < held / 200 < 0.99
    a, b = torch.rand(40, generator=generator) + 1, torch.rand(40, generator=generator) + 2
    assert interval(a, b)[0] == pytest.approx(float(a.mean() / b.mean()))
    assert interval(a, a) == [1.0, 1.0, 1.0]
    assert interval(torch.tensor([1.0, float("nan"), 3.0]))[0] == 2.0


def test_noise_replaces_the_share_it_says() -> None:
    clean = torch.full((5000,), 7)
    made = noised(clean, (0.0, 0.25, 1.0), 1, 1000)
    changed = (made != 7).float().mean(-1).tolist()
    assert changed[0] == 0 and changed[1] == pytest.approx(0.25, abs=0.03) and changed[2] > 0.99
    assert torch.equal(made, noised(clean, (0.0, 0.25, 1.0), 1, 1000))
    assert not torch.equal(made, noised(clean, (0.0, 0.25, 1.0), 2, 1000))
