"""One batch in fixed memory. Its three pieces of work are captured as CUDA graphs, none of which waits for the host:

    step     canvas ─ embed ─(+)─ layers ─ head ─ sampler ─> canvas, argmax, done ── one number to the host:
               soft ── MLP ───┘              │                                           is there more to do?
    soft                                  logits ─> soft      while the host looks at that number
    commit   argmax ─ embed ─ layers ─> slots, lengths

Everything that a step reads and changes lies in tensors that never move: keys and values in Slots; the number of the
step and the argmax that stability compares with in a State. A graph is captured for each number of rows. The first
step of a kind runs without a graph, because running it compiles its kernels. Where there are no graphs (on a CPU, or
in float32) the same steps run operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.slots import CanvasView, PromptView, Slots
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.pictured import Pictures, pictures, pieces
from dgq.runtime.shape.settings import SamplerConfig


class State(Protocol):
    """The canvases of a fixed number of rows between two steps: what the sampler decided so far."""

    argmax: Tensor  # (rows, canvas) int64: what would be committed now
    accepted: Tensor  # (rows, canvas) bool: positions that the last step kept
    took: Tensor  # (rows,) how many steps each row has made

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        """Fill the canvases with noise. rows: each row's place in the random stream; if there are fewer of them than
        this state has rows, the rows behind are marked as done."""
        ...

    def decide(self, logits: Tensor) -> None:
        """Make a step's decisions from the logits that Backend.decode() returned."""
        ...

    def soften(self) -> None:
        """Compute the expected embedding under those logits, which conditions the next step."""
        ...

    def mean_entropy(self) -> Tensor:
        """The last step's entropy, mean over each canvas: (rows,) in nats."""
        ...

    def flag(self) -> Tensor:
        """int32 (1,): 1 if all rows are done, plus 2 if a logit is not a number."""
        ...


class Backend(Protocol):
    """What computes the model's passes over slots: engine/fast.py by kernels, engine/plain.py by the reference."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    capturable: bool  # whether nothing in a pass waits for the host, so that a CUDA graph can hold it
    prefill: int  # prompt tokens encoded at once; an image is never split, however long it is

    @property
    def kind(self) -> str:
        """Of the rows' choice of adapters, see adapters.beside.Choice: a graph is captured for each."""
        ...

    def reserve(self, rows: int) -> None:
        """Make room for the choices of adapters of so many rows, before anything is captured."""
        ...

    def new_state(self, rows: int, sampler: SamplerConfig) -> State:
        """The state that decode() of this backend works on."""
        ...

    def decode(self, state: Any, view: CanvasView) -> Tensor:
        """Logits of the state's canvases, for State.decide()."""
        ...

    def encode(self, ids: Tensor, view: CanvasView) -> None:
        """Write keys and values of ids (rows, canvas), finished canvases, to the slots."""
        ...

    def encode_prompt(self, ids: Tensor, view: PromptView, images: Pictures | None) -> None:
        """Write keys and values of ids (1, tokens), a piece of one row's prompt, to the slots."""
        ...


class Session:
    """Rows being denoised. Slots hold their keys and values; the first `live` of them are still computed.

    tenant: the batch or the conversation whose tokens lie in the slots. clock: None, or a list that gets an event at
    the beginning of every pass, for measuring.
    """

    def __init__(self, backend: Backend, rows: int, capacity: int, sampler: SamplerConfig) -> None:
        self.backend, self.sampler, self.live = backend, sampler, rows
        backend.reserve(rows)
        self.slots = Slots(backend.config, rows, capacity, backend.device, backend.dtype)
        self._commit = torch.zeros(rows, backend.config.canvas, dtype=torch.int64, device=backend.device)
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=backend.device.type == "cuda")
        self._decided = torch.cuda.Event() if backend.device.type == "cuda" else None
        self._states: dict[int, State] = {}
        self._graphs: dict[tuple[str, int, str], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if backend.capturable else None
        self.tenant: object = None
        self.clock: list[tuple[str, torch.cuda.Event]] | None = None

    def fits(self, rows: int, capacity: int, sampler: SamplerConfig) -> bool:
        """Whether a batch of so many rows and tokens can use this session's memory and graphs."""
        return (rows, sampler) == (self.slots.rows, self.sampler) and capacity <= self.slots.capacity

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Encode one prompt for each row, each of them as though it were alone."""
        self.live, self.tenant, device = self.slots.rows, None, self.backend.device
        self._note("prompt")
        for row, prompt in enumerate(prompts):
            for piece in pieces([prompt], self.backend.prefill):
                ids = torch.tensor(prompt[piece], device=device)[None]
                view = PromptView(self.slots, row, piece.start, ids.shape[1])
                self.backend.encode_prompt(ids, view, pictures([prompt], piece, device))
        self.slots.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts]))

    def extend(self, ids: Sequence[int], length: int) -> None:
        """Encode tokens behind the first `length` tokens of a session of one row."""
        self.live, device = 1, self.backend.device
        self._note("prompt")
        for piece in pieces([ids], self.backend.prefill) if ids else ():
            new = torch.tensor(ids[piece], device=device)[None]
            view = PromptView(self.slots, 0, length + piece.start, new.shape[1])
            self.backend.encode_prompt(new, view, pictures([ids], piece, device))
        self.slots.holds(length + len(ids))

    @property
    def state(self) -> State:
        """The state of the live rows, made when a number of rows is first reached."""
        if self.live not in self._states:
            self._states[self.live] = self.backend.new_state(self.live, self.sampler)
        return self._states[self.live]

    def step(self, last: bool = False) -> bool | None:
        """Make one step and tell whether all rows are done; None if a logit is not a number. last: no step follows, so
        the expected embedding for the next one is not computed."""
        self._play("step", self._step)
        if self._decided is not None:
            self._decided.record()
        if not last:  # runs while the host waits for the flag; in vain if the flag ends the block
            self._play("soft", self._soften)
        if self._decided is not None:
            self._decided.synchronize()  # the only wait of the host in a step
        flag = int(self._flag)
        return None if flag & 2 else bool(flag)

    def commit(self, canvas: Tensor) -> None:
        """Encode the finished canvases (rows, canvas) of the first rows behind what each row has."""
        self._commit[: len(canvas)] = canvas
        self._play("commit", self._encode)

    def keep(self, rows: Tensor) -> None:
        """Drop the rows that are not in `rows`, int64 and rising. Graphs are made for 1, 2, 4, 8, … rows, so that some
        places up to the next power of two are computed although nobody reads them."""
        self.slots.keep(rows)
        self.slots.lengths[len(rows) :] = 0
        self.live = min(self.live, 1 << (len(rows) - 1).bit_length())

    def _step(self) -> None:
        state = self.state
        state.decide(self.backend.decode(state, self._view()))
        self._flag.copy_(state.flag(), non_blocking=True)

    def _soften(self) -> None:
        self.state.soften()

    def _encode(self) -> None:
        self.backend.encode(self._commit[: self.live], self._view())
        self.slots.lengths[: self.live] += self.backend.config.canvas

    def _view(self) -> CanvasView:
        return CanvasView(self.slots, self.live, self.backend.config.canvas)

    def _play(self, name: str, body: Callable[[], None]) -> None:
        """Replay the graph of this work for so many rows; the first time, run the work and then capture it."""
        key = name, self.live, self.backend.kind
        self._note(name)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        body()
        if self.backend.capturable:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                body()
            self._graphs[key] = graph  # only now, so that a capture that failed is never replayed

    def _note(self, name: str) -> None:
        if self.clock is not None:
            self.clock.append((name, torch.cuda.Event(enable_timing=True)))
            self.clock[-1][1].record()
