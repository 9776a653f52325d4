"""The decisions of one denoising step: which tokens to keep, which to scramble again, when to stop.

    logits / temperature ── softmax ── draw (rng.py) ── sampled and fresh tokens
                               └─ entropy of each position, ascending:  .00 .01 .02 .06 | .09 .8 2.1
                                  accept while the sum of those before  0   .00 .01 .03 | .09+…  > bound
    next canvas = sampled where accepted, fresh (uniformly random) elsewhere

The entropies' sum without the last bounds what the accepted positions can know about each other (arXiv 2505.24857):
positions that are all but certain may be fixed together. A canvas is done when its argmax has not changed for
`stability` steps and the mean entropy is below `confidence`; what is committed is the argmax, not the sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgq.runtime.shape.settings import SamplerConfig


@dataclass(frozen=True)
class Decision:
    """The result of one step. All (rows, canvas), the entropy in nats; logits (rows, canvas, vocab)."""

    canvas: Tensor  # the next step's input
    argmax: Tensor
    accepted: Tensor  # bool
    entropy: Tensor
    logits: Tensor  # scaled by the temperature: the next step's self-conditioning


def temperature(left: int | Tensor, config: SamplerConfig, device: torch.device) -> Tensor:
    """The divisor with `left` steps to go, this one included: from t_max down to nearly t_min.

    A float32 scalar tensor, not a Python number: rounding then is transformers'.
    """
    share = torch.as_tensor(left, dtype=torch.int32, device=device) / config.steps
    return config.t_min + (config.t_max - config.t_min) * share


def accept(entropy: Tensor, bound: float) -> Tensor:
    """Mask (rows, canvas) of the positions with the least entropy whose sum, without the largest, is within bound."""
    ascending, order = entropy.sort(dim=-1, stable=True)
    within = ascending.cumsum(-1) - ascending <= bound
    return torch.zeros_like(within).scatter(-1, order, within)


def decide(
    logits: Tensor, left: int | Tensor, config: SamplerConfig, draw: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Decision:
    """One step on raw logits (rows, canvas, vocab) float32, `left` steps to go. draw: Random.draw of this step."""
    logits = logits / temperature(left, config, logits.device)
    probabilities = logits.softmax(-1)
    sampled, fresh = draw(probabilities)
    entropy = -(logits.log_softmax(-1) * probabilities).sum(-1)
    accepted = accept(entropy, config.entropy_bound)
    return Decision(torch.where(accepted, sampled, fresh), logits.argmax(-1), accepted, entropy, logits)


class Stopper:
    """Remembers a canvas's last argmaxes and says which rows are done: stable and confident. One for each canvas."""

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._past: deque[Tensor] = deque(maxlen=config.stability)

    def done(self, argmax: Tensor, entropy: Tensor) -> Tensor:
        """bool (rows,) after a step with this argmax and these entropies, both (rows, canvas)."""
        done = entropy.mean(-1) < self._config.confidence
        if len(self._past) < self._config.stability:
            done = torch.zeros_like(done)
        for earlier in self._past:
            done = done & (earlier == argmax).all(-1)
        self._past.append(argmax)
        return done
