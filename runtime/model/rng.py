"""The source of random tokens: counted words, which depend on nothing but a row's own place; or torch's generator.

    seed ─────────────────────────────┐
    row · block · step · position ─ Philox4x32-10 ─ word 0 ─ u in (0, 1) ─ the token sampled there
                                                 └─ word 1 ─ the fresh token, should that one be rejected;
                                                             at step 0 (before the first) the canvas's noise

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") is a published bijection of the counter in whole
numbers: it gives the same words on every device and in every batch, and has no state. A token is sampled by inverse CDF
on two levels, which costs one u and one pass however large the vocabulary is:

    probabilities   .01 .02 .05 | .10 .20 .00 | .60 .02 .00        u · total = .35
    chunk sums              .08 |         .30 |         .62        .38 > .35: the second chunk; .27 of it are left
    within the chunk              .10 .30                          .30 > .27: its second token

The sums are float64, so that the order of summation does not change the token: only the probabilities do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# Width of the CDF's chunks, and how much of the vocabulary is float64 at once.
CHUNK, PIECE = 512, 16 * 512

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Random(Protocol):
    """The random tokens of one batch. `rows` are places in the batch as it was at first, rising."""

    independent: bool  # no row's tokens depend on the others, so that a finished one may leave

    def canvas(self, rows: Tensor, block: int) -> Tensor:
        """(rows, canvas) ids, uniform over the vocabulary: the block's noise."""
        ...

    def draw(self, probabilities: Tensor, rows: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
        """Ids (rows, canvas) sampled from probabilities (rows, canvas, vocab), and uniform ones. step counts from 1."""
        ...


class TorchRandom:
    """torch's generator, drawn from in transformers' order: canvas; then per step the multinomial, then the fresh
    tokens of ALL positions. On a CPU a seed gives transformers' tokens; CUDA's stream is another."""

    independent = False

    def __init__(self, seed: int, length: int, vocab: int, device: torch.device) -> None:
        self._length, self._vocab = length, vocab
        self._generator = torch.Generator(device).manual_seed(seed)

    def canvas(self, rows: Tensor, block: int) -> Tensor:
        shape = (len(rows), self._length)
        return torch.randint(0, self._vocab, shape, generator=self._generator, device=self._generator.device)

    def draw(self, probabilities: Tensor, rows: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
        flat = probabilities.flatten(0, 1)
        sampled = torch.multinomial(flat, 1, generator=self._generator).view(probabilities.shape[:-1])
        return sampled, self.canvas(rows, block)


class CounterRandom:
    """Counted random tokens: `numbers[row]` is the row's number in the stream, whatever the batch around it. seed: of
    all rows, or one for each."""

    independent = True

    def __init__(
        self, seed: int | Sequence[int], numbers: Sequence[int], length: int, vocab: int, device: torch.device
    ) -> None:
        self.numbers = torch.tensor(numbers, device=device)
        self.seeds = [seed] * len(numbers) if isinstance(seed, int) else list(seed)
        self._keys = torch.stack([round_keys(one) for one in self.seeds], dim=-1).to(device)
        self._positions = torch.arange(length, device=device)
        self._vocab = vocab

    def canvas(self, rows: Tensor, block: int) -> Tensor:
        return self._tokens(self.words(rows, block, 0)[1])

    def draw(self, probabilities: Tensor, rows: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
        words = self.words(rows, block, step)
        u = _uniform(words[0])
        return inverse_cdf(probabilities.flatten(0, 1), u.flatten()).view_as(u), self._tokens(words[1])

    def ahead(self, rows: Tensor, block: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """What canvas() and draw() take in a whole block: its noise (rows, canvas); for each step u (steps, rows,
        canvas) float64, where draw() looks in the distribution, and the fresh tokens."""
        words = self.words(rows, block, torch.arange(steps + 1, device=self._positions.device))
        tokens = self._tokens(words[1])
        return tokens[0], _uniform(words[0, 1:]), tokens[1:]

    def words(self, rows: Tensor, block: int, step: int | Tensor) -> Tensor:
        """(4, rows, canvas) int64, 32 random bits each; for steps (n,) int64 (4, n, rows, canvas)."""
        several = (len(step),) if isinstance(step, Tensor) else ()
        counter = self._positions.new_empty(4, *several, len(rows), len(self._positions))
        counter[0], counter[2] = self._positions, block
        counter[1] = step[:, None, None] if isinstance(step, Tensor) else step
        counter[3] = self.numbers[rows].unsqueeze(-1)
        return philox(counter, self._keys[..., rows].unsqueeze(-1))

    def _tokens(self, words: Tensor) -> Tensor:
        # no token is preferred by more than 2^-32
        return words * self._vocab >> 32


def _uniform(words: Tensor) -> Tensor:
    """Words of 32 bits -> float64 in (0, 1), exactly; the added half leaves out both ends."""
    return (words.double() + 0.5) * 2.0**-32


def round_keys(seed: int) -> Tensor:
    """Philox's key schedule (rounds, 2) int64 for the seed's lowest 64 bits."""
    halves = (seed & _LOW, seed >> 32 & _LOW)
    rounds = range(_ROUNDS)
    return torch.tensor([[(k + n * step) & _LOW for k, step in zip(halves, _WEYL, strict=True)] for n in rounds])


def philox(counter: Tensor, keys: Tensor) -> Tensor:
    """Philox4x32-10 of every column of counter (4, …), int64 holding 32 bits; as many words, keys from round_keys(),
    or (rounds, 2, …) whose further dimensions are broadcast over the counter's last ones.

    Numbers stay below 2^50: products are made of 16-bit halves, and nothing relies on how a device overflows.
    """
    even, odd = counter[0::2], counter[1::2]
    wide = (2, *[1] * (counter.dim() - 1))
    multiplier = torch.tensor(_MULTIPLIERS, device=counter.device).view(wide)
    for key in keys:
        low = multiplier * (even & 0xFFFF)
        high = multiplier * (even >> 16) + (low >> 16)
        key = key.view(2, *[1] * (counter.dim() - key.dim()), *key.shape[1:])
        even, odd = (high >> 16).flip(0) ^ odd ^ key, ((high & 0xFFFF) << 16 | low & 0xFFFF).flip(0)
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """The token at the share u of each row's mass: probabilities (n, vocab) float32, u (n,) float64 in (0, 1) -> (n,).

    Probabilities need not sum to 1; a token of probability 0 is never picked.
    """
    vocab = probabilities.shape[-1]
    sums = torch.cat([_chunk_sums(piece) for piece in probabilities.split(PIECE, dim=-1)], dim=-1)
    chunk, rest = _search(sums, u * sums.sum(-1))
    tokens = chunk.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=u.device)
    inside = probabilities.gather(-1, tokens.clamp(max=vocab - 1)).double().masked_fill(tokens >= vocab, 0.0)
    return chunk * CHUNK + _search(inside, rest)[0]


def _chunk_sums(piece: Tensor) -> Tensor:
    short = -piece.shape[-1] % CHUNK
    chunks = functional.pad(piece.double(), (0, short)).view(len(piece), -1, CHUNK)
    return chunks.sum(-1)


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index where the cumulative weights (n, k) exceed target (n,), and how far target lies into it.

    Rounding may put target at or above the total (then it is the last weight that counts), and a parallel sum may
    dip where a weight is 0: such an index is never taken.
    """
    upto = weights.cumsum(-1)
    counted = upto.masked_fill(weights <= 0, -1.0)
    hit = (counted > target.unsqueeze(-1)) | (counted == counted.amax(-1, keepdim=True))
    index = hit.int().argmax(-1, keepdim=True)
    return index.squeeze(-1), target - (upto - weights).gather(-1, index).squeeze(-1)
