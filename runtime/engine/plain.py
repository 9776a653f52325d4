"""A model's passes by the reference's operations, on any device: what kernels and CUDA graphs are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from dgq.runtime.model.layers import soft_embed
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, inverse_cdf
from dgq.runtime.model.sampler import decide
from dgq.runtime.model.slots import CanvasView, PromptView
from dgq.runtime.shape.pictured import Pictures
from dgq.runtime.shape.settings import SamplerConfig


class Plain:
    """The session.Backend of any model that holds its weights for the reference."""

    prefill = 512
    capturable = False
    kind = "none"  # of a choice of adapters: nothing is captured for any

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def reserve(self, rows: int) -> None:
        if self._model.choice is not None:
            self._model.choice.grow(rows)

    def new_state(self, rows: int, sampler: SamplerConfig) -> PlainState:
        return PlainState(self._model, rows, sampler)

    def decode(self, state: PlainState, view: CanvasView) -> Tensor:
        self._look(view)
        masks = {sliding: view.decoder_mask(sliding) for sliding in (False, True)}
        return self._model.logits(self._model.refined(state.canvas, state.soft, view.positions(), masks, view))

    def encode(self, ids: Tensor, view: CanvasView) -> None:
        self._look(view)
        masks = {sliding: view.encoder_mask(sliding) for sliding in (False, True)}
        self._model.append(ids, view.positions(), masks, view)

    def encode_prompt(self, ids: Tensor, view: PromptView, images: Pictures | None) -> None:
        self._look(view)
        masks = {sliding: view.mask(sliding, images) for sliding in (False, True)}
        self._model.append(ids, view.positions(), masks, view, images)

    def _look(self, view: CanvasView | PromptView) -> None:
        if self._model.choice is not None:
            self._model.choice.look(*view.span)


class PlainState:
    """The session.State of Plain. canvas (rows, canvas): the next step's input; soft (rows, canvas, hidden): the
    expected embedding that conditions it, zeros before the first step. All random numbers of a block are made when it
    begins."""

    def __init__(self, model: Model, rows: int, sampler: SamplerConfig) -> None:
        self._model, self._sampler = model, sampler
        device, shape = model.device, (rows, model.config.canvas)
        self.canvas, self.argmax = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.accepted = torch.zeros(shape, dtype=torch.bool, device=device)
        self.soft = torch.zeros(*shape, model.config.hidden, dtype=model.dtype, device=device)
        self.took = torch.zeros(rows, dtype=torch.int64, device=device)
        self._done = torch.zeros(rows, dtype=torch.bool, device=device)
        self._entropy = torch.zeros(shape, device=device)
        self._past = torch.zeros(sampler.stability, *shape, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)  # how many steps were made

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        missing = len(self.took) - len(rows)
        places = torch.cat((rows, rows[:1].expand(missing)))
        self.canvas[:], self._u, self._fresh = random.ahead(places, block, self._sampler.steps)
        self.argmax.copy_(self.canvas)
        for state in (self.soft, self.took, self._done, self._step):
            state.zero_()
        self._done[len(rows) :] = True

    def decide(self, logits: Tensor) -> None:
        sampler, done, step = self._sampler, self._done, self._step

        def draw(probabilities: Tensor) -> tuple[Tensor, Tensor]:
            u, fresh = (numbers.index_select(0, step)[0] for numbers in (self._u, self._fresh))
            return inverse_cdf(probabilities.flatten(0, 1), u.flatten()).view_as(u), fresh

        self.took += ~done
        new = decide(logits, sampler.steps - step[0], sampler, draw)
        self.argmax.copy_(torch.where(done[:, None], self.argmax, new.argmax))
        self.canvas.copy_(torch.where(done[:, None], self.canvas, new.canvas))
        self.accepted.copy_(new.accepted)
        self._entropy.copy_(new.entropy)
        self._logits = new.logits
        same = (self._past == self.argmax).all(-1).all(0) & (step >= sampler.stability)
        if sampler.stability:
            self._past.index_copy_(0, step % sampler.stability, self.argmax[None])
        done |= (new.entropy.mean(-1) < sampler.confidence) & same
        step += 1

    def soften(self) -> None:
        self.soft.copy_(soft_embed(self._logits.to(self._model.dtype), self._model.table, self._model.dtype))

    def mean_entropy(self) -> Tensor:
        return self._entropy.mean(-1)

    def flag(self) -> Tensor:
        return (self._done.all() + 2 * self._entropy.isnan().any()).int()[None]
