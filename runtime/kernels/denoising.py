"""The sampler and a step's decisions on the device, for CUDA graphs: what sampler.py does with rng.CounterRandom.

    logits ── sample ── entropy, argmax, sampled; probabilities ─> soft embedding of the next step
                           └── decide ── accepted, next canvas, done

Nothing waits for the host, and nothing depends on values that the host would have to know: the numbers of steps and
blocks, temperatures and settings lie on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dgq.runtime.kernels import sample_kernels
from dgq.runtime.shape.settings import SamplerConfig

_SLICE = 4096  # tokens of the vocabulary for one program
_LEAST = 512  # the sampler's chunk


@dataclass(frozen=True)
class Denoising:
    """The canvases of a batch and the state of each row. Rows have numbers of their own and may be at different steps.

    canvas: the next step's input; argmax: what would be committed now. took: the steps made; block and step (from 1)
    number the random words; temperature: the next step's divisor; streak: for how many steps the argmax has not
    changed. Of the last step: sampled tokens, newest (its argmax), entropy in nats (NaN where a logit is not a number),
    accepted, and the mean entropy. A row that is done changes no more.
    """

    settings: Tensor  # float32 (6,)
    seed: Tensor  # int64 (rows,)
    numbers: Tensor  # int64 (rows,): each row's number in the random stream
    block: Tensor  # int32 (rows,), like step, streak and took
    step: Tensor
    streak: Tensor
    took: Tensor
    done: Tensor  # int8 (rows,)
    temperature: Tensor  # float32 (rows,)
    mean: Tensor  # float32 (rows,)
    canvas: Tensor  # int64 (rows, canvas), like argmax, sampled and newest
    argmax: Tensor
    sampled: Tensor
    newest: Tensor
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
        """Memory for a batch. start() chooses the random stream, begin() makes the first canvases."""

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        positions = rows * canvas
        parts = positions, triton.cdiv(vocab, _slice(vocab))
        whole = room(positions, 3, dtype=torch.float32)
        state = cls(
            settings=room(6, dtype=torch.float32),
            seed=room(rows),
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
            newest=room(rows, canvas),
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
        """Use other settings, also in graphs that were captured before."""
        values = (
            config.t_min,
            config.t_max - config.t_min,
            config.steps,
            config.entropy_bound,
            config.confidence,
            config.stability,
        )
        self.settings.copy_(torch.tensor(values, dtype=torch.float32))

    def start(self, seed: int | Sequence[int], numbers: Sequence[int]) -> None:
        """Choose the random stream, see rng.CounterRandom. numbers: of the rows; seed: of all of them, or of each."""
        seeds = [seed] * len(numbers) if isinstance(seed, int) else seed
        signed = [(one & (1 << 64) - 1) - ((one >> 63 & 1) << 64) for one in seeds]  # the same 64 bits, with a sign
        self.seed.copy_(torch.tensor(signed))
        self.numbers.copy_(torch.tensor(numbers))


def _slice(vocab: int) -> int:
    power: int = triton.next_power_of_2(vocab)
    return min(_SLICE, max(_LEAST, power))


def begin(state: Denoising, block: Tensor) -> None:
    """Fill the canvases with noise. block: int32 (rows,), the number of each row's block, from 0."""
    rows, canvas = state.canvas.shape
    state.block.copy_(block)
    sample_kernels.begin[(rows,)](
        state.settings, state.seed, state.step, state.block, state.numbers, state.temperature, state.done,
        state.streak, state.took, state.canvas, canvas, state.vocab, C=triton.next_power_of_2(canvas),
    )  # fmt: skip


def sample(state: Denoising, logits: Tensor, probabilities: Tensor | None = None) -> None:
    """Fill the state's entropy, newest, sampled and scale from a step's logits.

    logits: (rows, canvas, vocab), bfloat16 or float32, the head's product: neither capped nor divided by the
    temperature. probabilities: bfloat16 (rows * canvas, vocab), contiguous, is overwritten for the next step's
    self-conditioning: each row times its scale is the softmax of the capped logits over the temperature.
    """
    rows, canvas = state.canvas.shape
    vocab, softcap = state.vocab, state.softcap
    flat = logits.view(rows * canvas, vocab)
    width = _slice(vocab)
    count, positions = triton.cdiv(vocab, width), rows * canvas
    largest, first, mass, weighted = state._largest, state._first, state._mass, state._weighted
    assert flat.stride(1) == 1 and (probabilities is None or probabilities.is_contiguous())
    sample_kernels.slices[(positions, count)](
        flat, state.temperature, state.done, largest, first, mass, weighted, probabilities, flat.stride(0), canvas,
        vocab, softcap, SLICE=width, WRITE=probabilities is not None, EVEN=vocab % width == 0, num_warps=4,
    )  # fmt: skip
    sample_kernels.pick[(positions,)](
        flat, state.temperature, state.done, state.seed, state.step, state.block, state.numbers, largest, first, mass,
        weighted, state.entropy, state.newest, state.sampled, state._whole, flat.stride(0), canvas, vocab, count,
        softcap, SLICE=width, COUNT=triton.next_power_of_2(count), CHUNKS=width // _LEAST, num_warps=4,
    )  # fmt: skip
    if probabilities is not None:
        sample_kernels.rewrite[(positions, min(count, 4))](
            flat, state.temperature, state.done, state._whole, probabilities, flat.stride(0), canvas, vocab, softcap,
            count, SLICE=width, num_warps=4,
        )  # fmt: skip


def decide(state: Denoising) -> None:
    """After sample(): accept positions by the entropy bound, scramble the others, and mark rows that are done.
    sampler.py is the reference."""
    rows, canvas = state.canvas.shape
    sample_kernels.decide[(rows,)](
        state.settings, state.seed, state.step, state.block, state.numbers, state.temperature, state.done,
        state.streak, state.took, state.canvas, state.argmax, state.accepted, state.mean, state.entropy, state.newest,
        state.sampled, canvas, state.vocab, C=triton.next_power_of_2(canvas), PART=32,
    )  # fmt: skip
