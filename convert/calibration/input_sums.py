"""What goes into each weight, added up by side, kind and expert.

    a product's input x (tokens, in)  ──>  sum2   (2, in)     sum of x², of the prompts' tokens and of the canvases'
                                           amax   (2,)        the largest |x| of each side
                                           count  (KINDS,)    tokens of each kind (layerwise/samples.py)

For a fused expert weight each of them has an expert's axis in front. Sums are float64: the order in which they are
taken does not show in the float32 that STATS keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.convert.calibration.stats import WATCHED
from dgq.convert.layerwise.samples import KINDS
from dgq.convert.resume import ranks
from dgq.quant.errors import InputError


class InputSums:
    """A ForwardHook that adds up what goes into the weights that STATS name. experts: how many a layer has."""

    kinds: Tensor

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._rows: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None
        self._totals: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        if name.endswith(WATCHED):
            self._add(name, x.reshape(-1, x.shape[-1]), expert, tokens)
        return y

    def _add(self, name: str, x: Tensor, expert: int | None, tokens: Tensor | None) -> None:
        sides, count = self._sides(tokens)
        sums = sides @ x.double().square()
        amax = (sides * x.abs().amax(-1)).amax(-1).float()
        if name + ".sum2" not in self._totals:
            lead = () if expert is None else (self._experts,)
            self._totals[name + ".sum2"] = sums.new_zeros(*lead, *sums.shape)
            self._totals[name + ".amax"] = amax.new_zeros(*lead, 2)
            self._totals[name + ".count"] = count.new_zeros(*lead, KINDS)
        at = ... if expert is None else expert
        totals = {part: self._totals[f"{name}.{part}"][at] for part in ("sum2", "count", "amax")}
        totals["sum2"].add_(sums)
        totals["count"].add_(count)
        torch.maximum(totals["amax"], amax, out=totals["amax"])

    def _sides(self, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which rows are a prompt's and which a canvas's, float64 (2, rows), and how many of each kind. They are kept
        for the next product, as an expert's two products have the same rows."""
        if self._rows is None or self._rows[0] is not self.kinds or self._rows[1] is not tokens:
            kinds = self.kinds if tokens is None else self.kinds[tokens]
            sides = torch.stack((kinds == 0, kinds != 0)).double()
            numbers = torch.arange(KINDS, device=kinds.device).unsqueeze(1)
            self._rows = self.kinds, tokens, sides, (kinds == numbers).sum(1)  # bincount() waits for the GPU
        return self._rows[2:]

    def result(self, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The sums over all processes, on the CPU. expected: every weight that any process may have seen -> shape of
        its sum2. InputError if a sum is not finite."""
        totals = {}
        for name, shape in expected.items():
            zeros = {"sum2": torch.zeros(shape, dtype=torch.float64), "amax": torch.zeros(shape[:-1]),
                     "count": torch.zeros(*shape[:-2], KINDS, dtype=torch.int64)}  # fmt: skip
            for part, zero in zeros.items():
                value = self._totals.get(f"{name}.{part}", zero).cpu()
                ranks.add_up(value, largest=part == "amax")
                if not bool(value.isfinite().all()):
                    raise InputError(f"{name}: its inputs are not numbers; the checkpoint is damaged")
                totals[f"{name}.{part}"] = value
        return totals


def add_sums(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add another round's sums, maxima and counts to `total`."""
    for name, value in more.items():
        known = total.get(name)
        if known is None:
            total[name] = value
        else:
            total[name] = torch.maximum(known, value) if name.endswith(".amax") else known + value
