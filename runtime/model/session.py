"""One batch on fixed memory: a denoising step, and a block's commitment, as CUDA graphs that wait for nothing.

    step     canvas ─ embed ─(+)─ layers ─ head ─ sampler ─> canvas, argmax, done ── one number to the host:
               soft ── MLP ───┘              │                                           is there more to do?
    soft                                  logits ─> soft      meanwhile
    commit   argmax ─ embed ─ layers ─> slots, lengths

Everything that a step reads and changes lies in tensors that stay where they are: keys and values in Slots, which step
it is and what stability compares with in a State. Graphs are captured for a number of rows; the first step of a kind
runs without one, since that is what compiles its kernels. Where there are no graphs (on a CPU, in float32) the same
steps run operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.slots import Canvas, Prompt, Slots
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.pictured import Pictures, pictures, pieces
from dgq.runtime.shape.settings import SamplerConfig


class State(Protocol):
    """Where the canvases of some rows are on their way: (rows, canvas); took (rows,): steps made."""

    argmax: Tensor
    accepted: Tensor
    took: Tensor

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        """New canvases of noise, for rows that have these places in the stream; are there fewer of them, the last ones
        of this state are done before they begin."""
        ...

    def decide(self, logits: Tensor) -> None:
        """A step's decisions, from what Passes.decode() returned."""
        ...

    def soften(self) -> None:
        """The expected embedding under those logits, for the next step."""
        ...

    def mean_entropy(self) -> Tensor:
        """(rows,) of the last step, in nats."""
        ...

    def flag(self) -> Tensor:
        """int32 (1,): 1 if all rows are done, plus 2 if logits were not a number."""
        ...


class Passes(Protocol):
    """The model's work on slots. capturable: without waiting for the device; decode() takes a State of new_state()."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    capturable: bool
    prefill: int  # prompt tokens encoded at once, but for an image that is longer

    def new_state(self, rows: int, sampler: SamplerConfig) -> State: ...
    def decode(self, state: Any, view: Canvas) -> Tensor: ...
    def encode(self, ids: Tensor, view: Canvas) -> None: ...
    def encode_prompt(self, ids: Tensor, view: Prompt, images: Pictures | None) -> None: ...


class Session:
    """Rows being denoised: those of Slots, of which the first `live` are still computed."""

    def __init__(self, passes: Passes, rows: int, capacity: int, sampler: SamplerConfig) -> None:
        self.passes, self.sampler, self.live = passes, sampler, rows
        self.slots = Slots(passes.config, rows, capacity, passes.device, passes.dtype)
        self._commit = torch.zeros(rows, passes.config.canvas, dtype=torch.int64, device=passes.device)
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=passes.device.type == "cuda")
        self._decided = torch.cuda.Event() if passes.device.type == "cuda" else None
        self._states: dict[int, State] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if passes.capturable else None
        self.tenant: object = None  # whose tokens lie in the slots: a batch's, or a conversation's
        self.clock: list[tuple[str, torch.cuda.Event]] | None = None  # a list gets an event for each pass's beginning

    def fits(self, rows: int, capacity: int, sampler: SamplerConfig) -> bool:
        """Whether another batch can have this session's memory and graphs."""
        return (rows, sampler) == (self.slots.rows, self.sampler) and capacity <= self.slots.capacity

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Encode prompts, one for each row, each as though it were alone."""
        self.live, self.tenant, device = self.slots.rows, None, self.passes.device
        self._note("prompt")
        for row, prompt in enumerate(prompts):
            for piece in pieces([prompt], self.passes.prefill):
                ids = torch.tensor(prompt[piece], device=device)[None]
                view = Prompt(self.slots, row, piece.start, ids.shape[1])
                self.passes.encode_prompt(ids, view, pictures([prompt], piece, device))
        self.slots.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts]))

    def extend(self, ids: Sequence[int], length: int) -> None:
        """Encode tokens behind the first `length` of the only row."""
        self.live, device = 1, self.passes.device
        self._note("prompt")
        for piece in pieces([ids], self.passes.prefill) if ids else ():
            new = torch.tensor(ids[piece], device=device)[None]
            view = Prompt(self.slots, 0, length + piece.start, new.shape[1])
            self.passes.encode_prompt(new, view, pictures([ids], piece, device))
        self.slots.holds(length + len(ids))

    @property
    def state(self) -> State:
        """Of the live rows."""
        if self.live not in self._states:
            self._states[self.live] = self.passes.new_state(self.live, self.sampler)
        return self._states[self.live]

    def step(self, last: bool = False) -> bool | None:
        """One step; whether all rows are done. None: their logits are not a number. last: no step follows."""
        self._play("step", self._step)
        if self._decided is not None:
            self._decided.record()
        if not last:  # while the host learns whether it was for nothing, and asks for the next step
            self._play("soft", self._soften)
        if self._decided is not None:
            self._decided.synchronize()  # the one thing that the host waits for
        flag = int(self._flag)
        return None if flag & 2 else bool(flag)

    def commit(self, canvas: Tensor) -> None:
        """Encode what was made of the first rows' canvases (rows, canvas)."""
        self._commit[: len(canvas)] = canvas
        self._play("commit", self._encode)

    def keep(self, rows: Tensor) -> None:
        """The rows that are not in `rows`, int64 and rising, leave. Graphs are made for 1, 2, 4, 8, … rows: up to that
        some places are still computed, for nobody."""
        self.slots.keep(rows)
        self.slots.lengths[len(rows) :] = 0
        self.live = min(self.live, 1 << (len(rows) - 1).bit_length())

    def _step(self) -> None:
        state = self.state
        state.decide(self.passes.decode(state, self._view()))
        self._flag.copy_(state.flag(), non_blocking=True)

    def _soften(self) -> None:
        self.state.soften()

    def _encode(self) -> None:
        self.passes.encode(self._commit[: self.live], self._view())
        self.slots.lengths[: self.live] += self.passes.config.canvas

    def _view(self) -> Canvas:
        return Canvas(self.slots, self.live, self.passes.config.canvas)

    def _play(self, name: str, body: Callable[[], None]) -> None:
        key = name, self.live
        self._note(name)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        body()
        if self.passes.capturable:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                body()
            self._graphs[key] = graph  # only now: a capture that failed cannot be replayed

    def _note(self, name: str) -> None:
        if self.clock is not None:
            self.clock.append((name, torch.cuda.Event(enable_timing=True)))
            self.clock[-1][1].record()
