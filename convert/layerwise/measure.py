"""How far two models' logits lie apart at the same canvas: what a quantised model is judged by, position by position.

    kl           KL(reference || other) in nats, on the logits as the model gives them (temperature 1)
    reverse_kl   KL(other || reference): what the other believes and the reference does not
    top1, top5   whether the best token is the same; which share of the five best are
    entropy      the other's entropy minus the reference's, nats: above 0 it is less sure
    sure_a, sure_b   entropy bound met at the sampler's temperature, by the reference and by the other (sampler.accept)

Both sides are given as hidden states before the head, and their logits are made a few positions at a time by the same
products: equal states give equal logits, so a model against itself has a KL of exactly 0, and nothing is ever as large
as positions times vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgq.runtime.model.sampler import accept

MEASURES = ("kl", "reverse_kl", "top1", "top5", "entropy", "sure_a", "sure_b")
LOGITS = 1 << 24  # made at once on each side: 64 MiB in float32
TOP = 5

Head = Callable[[Tensor], Tensor]  # hidden states (n, hidden) -> logits (n, vocab) float32


@torch.inference_mode()
def compare(a: Tensor, b: Tensor, heads: tuple[Head, Head], vocab: int, temperature: Tensor, bound: float) -> Tensor:
    """The reference's and the other's states (rows, canvas, hidden) -> (len(MEASURES), rows, canvas) float32.

    temperature: the sampler's divisor at this noise level; bound: its entropy bound, nats.
    """
    rows, canvas = a.shape[:2]
    pieces: list[Tensor] = []
    step = max(1, LOGITS // vocab)
    for left, right in zip(a.flatten(0, 1).split(step), b.flatten(0, 1).split(step), strict=True):
        pieces.append(_positions(heads[0](left), heads[1](right), temperature))
    figures = torch.cat(pieces, dim=1).view(-1, rows, canvas)
    sure = [accept(entropy, bound).float() for entropy in figures[-2:]]
    return torch.stack((*figures[:-2], *sure))


def _positions(p: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
    """Logits (n, vocab) twice -> (len(MEASURES), n); the last two are entropies at the temperature."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl, reverse = divergence(log_p, log_q), divergence(log_q, log_p)
    change = (log_p.exp() * log_p).sum(-1) - (log_q.exp() * log_q).sum(-1)
    del log_p, log_q
    best_p, best_q = (side.topk(min(TOP, side.shape[-1]), dim=-1).indices for side in (p, q))
    top5 = (best_p.unsqueeze(-1) == best_q.unsqueeze(-2)).any(-1).float().mean(-1)
    top1 = (p.argmax(-1) == q.argmax(-1)).float()
    return torch.stack((kl, reverse, top1, top5, change, _entropy(p / temperature), _entropy(q / temperature)))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities (…, vocab)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def interval(a: Tensor, b: Tensor | None = None, resamples: int = 2000) -> list[float]:
    """A figure and the bounds between which 95 % of it lie when the units it is made of are resampled: the mean of a
    (n,), or mean of a over mean of b, both resampled together. NaN is no value. The same input gives the same bounds.
    """

    def figure(picks: Tensor) -> Tensor:
        mean = a[picks].nanmean(-1)
        return mean if b is None else mean / b[picks].nanmean(-1)

    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(a), (resamples, len(a)), generator=generator)
    figures = figure(picks)
    figures = figures[figures.isfinite()]
    middle = float(figure(torch.arange(len(a))))
    if not len(figures):
        return [middle, middle, middle]
    low, high = figures.quantile(torch.tensor([0.025, 0.975], dtype=figures.dtype)).tolist()
    return [middle, low, high]


def noised(clean: Tensor, levels: Sequence[float], seed: int, vocab: int) -> Tensor:
    """clean (canvas,) int64 -> (levels, canvas): each token replaced by a uniformly random one with the level's
    probability."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for level in levels:
        replaced = torch.rand(clean.shape, generator=generator) < level
        made.append(torch.where(replaced, torch.randint(0, vocab, clean.shape, generator=generator), clean))
    return torch.stack(made)
