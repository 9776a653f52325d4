"""The counted random stream: published values, independence along every coordinate, and the sampling by inverse CDF."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgq.runtime.model.rng import CHUNK, PIECE, CounterRandom, inverse_cdf, philox, round_keys

CPU = torch.device("cpu")
LEAST, MOST = 2.0**-33, 1 - 2.0**-33  # of u
EDGES = torch.tensor([LEAST, MOST], dtype=torch.float64)


def reference(counter, key):
    """Philox4x32-10 in whole numbers of Python, from the paper."""
    c0, c1, c2, c3 = counter
    for n in range(10):
        k0, k1 = ((key[i] + n * step) % 2**32 for i, step in enumerate((0x9E3779B9, 0xBB67AE85)))
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
    return [c0, c1, c2, c3]


ONES = 0xFFFFFFFF
# Random123's kat_vectors
PUBLISHED = [
    ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([ONES] * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_published_values(counter, key, words):
    found = philox(torch.tensor(counter), round_keys(key[0] | key[1] << 32))
    assert " ".join(f"{word:08x}" for word in found.tolist()) == words
    assert reference(counter, key) == found.tolist()


def test_philox_in_whole_numbers():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        counter = torch.randint(0, 2**32, (4, 7, 30), generator=generator)
        key = torch.randint(0, 2**32, (2,), generator=generator).tolist()
        found = philox(counter, round_keys(key[0] | key[1] << 32))
        expected = [reference(c, key) for c in counter.flatten(1).t().tolist()]
        assert found.flatten(1).t().tolist() == expected


def test_what_is_counted():
    """Position, step, block and row are the counter's words, the seed is the key: other engines can do the same."""
    random = CounterRandom(-2, [5, 2**32 - 1], 3, 100, CPU)
    words = random.words(torch.tensor([0, 1]), 6, 7)
    for row, number in enumerate((5, 2**32 - 1)):
        for position in range(3):
            assert words[:, row, position].tolist() == reference([position, 7, 6, number], (ONES - 1, ONES))
    tokens = words * 64 >> 32
    sampled, fresh = CounterRandom(-2, [5, 2**32 - 1], 3, 64, CPU).draw(
        torch.ones(2, 3, 64), torch.tensor([0, 1]), 6, 7
    )
    assert torch.equal(sampled, tokens[0]) and torch.equal(fresh, tokens[1])
    noise = random.canvas(torch.tensor([1]), 6)
    assert noise.tolist() == [[reference([p, 0, 6, 2**32 - 1], (ONES - 1, ONES))[1] * 100 >> 32 for p in range(3)]]


@pytest.fixture(scope="module")
def grid():
    """(seed 3, purpose 2, row 6, block 4, step 12, position 64) of words: 110,592 in all."""
    rows = torch.arange(6)
    seeds = []
    for seed in (0, 1, 2**32):
        random = CounterRandom(seed, range(6), 64, 2, CPU)
        steps = [torch.stack([random.words(rows, b, s)[:2] for s in range(12)], 2) for b in range(4)]
        seeds.append(torch.stack(steps, 2))
    return torch.stack(seeds)


def test_words_are_uniform(grid):
    """Chi-square over 256 buckets, of the highest bits, the lowest, and of every purpose and seed."""
    for name, words in (("high", grid >> 24), ("low", grid & 255)):
        for part in (words, *words, *words.unbind(1)):
            counts = torch.bincount(part.flatten(), minlength=256).double()
            expected = part.numel() / 256
            off = (float(((counts - expected) ** 2 / expected).sum()) - 255) / math.sqrt(2 * 255)
            assert abs(off) < 4, name
    assert abs(float((grid.double() * 2.0**-32).mean()) - 0.5) < 4 / math.sqrt(12 * grid.numel())


@pytest.mark.parametrize("axis", range(6), ids=["seed", "purpose", "row", "block", "step", "position"])
def test_neighbours_know_nothing_of_each_other(grid, axis):
    u = grid.double() * 2.0**-32 - 0.5
    for apart in range(1, min(4, u.shape[axis])):
        a, b = u.narrow(axis, 0, u.shape[axis] - apart), u.narrow(axis, apart, u.shape[axis] - apart)
        assert abs(float((a * b).mean() * 12)) * math.sqrt(a.numel()) < 4
        equal = int((a == b).sum())
        assert equal <= 1, "words repeat along the axis"


def test_no_collisions_beyond_chance(grid):
    """n^2 / 2^33 pairs among n words of 32 bits: 1.4; none of 64 bits."""
    words = grid.flatten()
    assert len(words) - len(words.unique()) <= 6
    pairs = (grid[:, 0] << 31 ^ grid[:, 1]).flatten()
    assert len(pairs.unique()) == len(pairs)


def test_draws_follow_the_probabilities():
    """Chi-square of 64,000 tokens sampled from one distribution with zeros, and of the fresh ones."""
    generator = torch.Generator().manual_seed(1)
    vocab = 2 * CHUNK + 300
    weights = (torch.randn(vocab, generator=generator) * 1.5).exp()
    weights[torch.rand(vocab, generator=generator) < 0.3] = 0
    weights /= weights.sum()
    random = CounterRandom(9, range(4), 400, vocab, CPU)
    drawn = [random.draw(weights.expand(4, 400, vocab).contiguous(), torch.arange(4), 0, step) for step in range(1, 41)]
    sampled, fresh = zip(*drawn, strict=True)
    for tokens, share in ((sampled, weights), (fresh, torch.full((vocab,), 1 / vocab))):
        counts = torch.bincount(torch.stack(tokens).flatten(), minlength=vocab).double()
        expected = share.double() * counts.sum()
        assert counts[share == 0].sum() == 0
        often = expected >= 5
        off = float(((counts - expected) ** 2 / expected)[often].sum()) - float(often.sum())
        assert abs(off) / math.sqrt(2 * float(often.sum())) < 4


@pytest.mark.parametrize("vocab", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, PIECE, PIECE + 1, 2 * PIECE + 700])
def test_inverse_cdf_against_one_long_sum(vocab):
    """Zeros in front, at the end and whole chunks of them; u at its edges; sums that are not 1."""
    generator = torch.Generator().manual_seed(vocab)
    weights = (torch.randn(64, vocab, generator=generator) * 4).exp()
    weights[torch.rand(64, vocab, generator=generator) < 0.5] = 0
    weights[1, : vocab // 2] = weights[2, vocab // 2 :] = weights[3] = weights[4] = 0
    weights[torch.arange(64), torch.randint(0, vocab, (64,), generator=generator)] = 1e-3
    weights[5, CHUNK // 2 : 3 * CHUNK] = weights[6:, -1] = 0
    weights[5:, 0] = 0.5
    for u in (torch.rand(64, generator=generator, dtype=torch.float64), *EDGES.view(2, 1)):
        u = u.expand(64)
        found = inverse_cdf(weights, u)
        assert (weights.gather(1, found[:, None]) > 0).all()
        upto = weights.double().cumsum(1)
        expected = torch.searchsorted(upto, u[:, None] * upto[:, -1:], right=True)[:, 0]
        assert torch.equal(found, expected)


def test_inverse_cdf_at_the_edges():
    """What rounding could get wrong: nothing of probability 0 is picked, whatever u."""
    weights = torch.zeros(6, 3 * CHUNK + 7)
    weights[0, -1] = 1
    weights[1, 0] = 1
    weights[2, CHUNK] = 1e-45  # the least float32
    weights[3, 5], weights[3, 2 * CHUNK] = 1, 1e-30  # lost in the sum
    weights[4, 5], weights[4, 6], weights[4, 7] = 0.25, 0.5, 0.25
    weights[5, [1, CHUNK + 1, 2 * CHUNK + 1]] = 0.1
    edges = [0.0, 5e-324, LEAST, 0.25, 0.75, MOST, 1 - 2.0**-53, 1.0]
    found = [inverse_cdf(weights, torch.full((6,), u, dtype=torch.float64)).tolist() for u in edges]
    assert [row[:3] for row in found] == [[3 * CHUNK + 6, 0, CHUNK]] * len(edges)
    assert {row[3] for row in found} <= {5, 2 * CHUNK}
    assert [row[4] for row in found] == [5, 5, 5, 6, 7, 7, 7, 7]
    assert [row[5] for row in found] == [1, 1, 1, 1, *[2 * CHUNK + 1] * 4]


def test_a_sum_in_another_order(monkeypatch):
    """A GPU's cumulative sums round differently, and may even dip: the tokens stay, and have a probability."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(500, 3000, generator=generator).mul_(3).exp_()
    weights[torch.rand(weights.shape, generator=generator) < 0.5] = 0
    u = torch.rand(500, generator=generator, dtype=torch.float64)
    edges = EDGES[torch.arange(500) % 2]
    plain = inverse_cdf(weights, u)
    stock = torch.Tensor.cumsum

    def shaken(self, dim):
        noise = torch.rand(self.shape, generator=generator, dtype=self.dtype) - 0.5
        return stock(self, dim) * (1 + noise * 2e-15)

    monkeypatch.setattr(torch.Tensor, "cumsum", shaken)
    assert torch.equal(inverse_cdf(weights, u), plain)
    for target in (u, edges, torch.zeros(500).double(), torch.ones(500).double()):
        assert (weights.gather(1, inverse_cdf(weights, target)[:, None]) > 0).all()


def test_no_large_float64():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                self.elements = max(self.elements, out.numel())
            return out

    weights, u = torch.rand(3, 1 << 18), torch.rand(3, dtype=torch.float64)
    with Largest() as largest:
        inverse_cdf(weights, u)
    assert 3 * CHUNK <= largest.elements <= 3 * PIECE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_cuda():
    """Words bit for bit; tokens from the same probabilities."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(2, 256, 262144, generator=generator) * 3).softmax(-1)
    found = []
    for device in ("cpu", "cuda"):
        random = CounterRandom(2**63 + 5, [3, 2**32 - 1], 256, 262144, torch.device(device))
        rows = torch.arange(2, device=device)
        drawn = random.draw(probabilities.to(device), rows, 1, 2)
        found.append([random.words(rows, 2**31, 47).tolist(), *(tokens.tolist() for tokens in drawn)])
    assert found[0] == found[1]
