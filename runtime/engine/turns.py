"""Keys and values that a conversation keeps from one turn to the next.

    in the cache    prompt of turn 1 ··········· | its reply, block by block
    turn 2          the same ··········· the same x written anew ······ and what is new
                    <-------- kept -------------> <------------- encoded ------------->

A turn's prompt is the whole conversation as the chat template renders it, which may write an earlier turn anew (it
drops thoughts; or a reply's text has other tokens than the reply). What both have in common is kept. Full layers can be
cut at any token. A sliding layer has only its last window, of no use further back: so the windows are saved where the
next prompt is expected to part, before the generation prompt. Where it parts earlier than that, all is encoded anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgq.runtime.engine.batch import PREFILL, OnSlots, Reference, passes_of, session_for
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, Random
from dgq.runtime.model.session import Session
from dgq.runtime.shape.pictured import part, pictures, pieces, told
from dgq.runtime.shape.settings import SamplerConfig

ROOM = 4096  # tokens that a conversation's slots are made for at first; twice as many whenever they are full


class Store(Protocol):
    """Where the keys and values of one row are."""

    @property
    def first(self) -> int:
        """The first token that every layer still has."""
        ...

    def windows(self, length: int) -> list[Tensor]:
        """Copies of the sliding layers' windows, `length` tokens being there."""
        ...

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        """Forget what comes after `length` tokens; windows: what windows() gave for this length, if it is needed."""
        ...

    def extend(self, ids: Sequence[int], length: int) -> None:
        """Encode tokens behind the `length` that are there."""
        ...


@dataclass(frozen=True)
class _Saved:
    ids: list[int]
    windows: list[Tensor]


class Turns:
    """One conversation's. settled: tokens of the next prompt that no later turn is expected to write anew; encoded: of
    the last prompt, those that were not kept. ids: as pictured.told() has them."""

    def __init__(self) -> None:
        self.settled = self.encoded = 0
        self.store: Store | None = None
        self.ids: list[int] = []  # in the store; none while it is being written to: half a turn is never kept
        self._saved: _Saved | None = None

    def begin(self, store: Store, ids: Sequence[int], window: int) -> None:
        """Make the store hold just `ids`; it is another than before if somebody else took that one."""
        if store is not self.store:
            self.store, self.ids, self._saved = store, [], None
        marks = told(ids)
        length, saved, broken = common(self.ids, marks), self._saved, not self.ids
        if saved is not None and common(saved.ids, marks) < len(saved.ids):
            saved = self._saved = None
        self.ids, windows = [], None
        if broken or store.first > max(0, length - window + 1):
            length, windows = (len(saved.ids), saved.windows) if saved else (0, None)
        store.rewind(length, windows)
        self.encoded = len(ids) - length
        if length < self.settled <= len(ids):
            store.extend(part(ids, length, self.settled), length)
            length = self.settled
            self._saved = _Saved(marks[:length], store.windows(length))
        store.extend(part(ids, length, len(ids)), length)
        self.ids = marks

    @contextmanager
    def growing(self, canvas: Tensor) -> Iterator[None]:
        """While a block (1, canvas) is encoded behind what is there."""
        ids, self.ids = self.ids, []
        yield
        self.ids = ids + canvas[0].tolist()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


class CacheStore:
    """A growing cache."""

    def __init__(self, model: Model, capacity: int) -> None:
        self._model, self.cache = model, model.new_cache(1, capacity)

    @property
    def first(self) -> int:
        return self.cache.first

    def windows(self, length: int) -> list[Tensor]:
        return self.cache.windows()

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        self.cache.rewind(length, windows)

    def extend(self, ids: Sequence[int], length: int) -> None:
        device = self._model.device
        for piece in pieces([ids], PREFILL) if ids else ():
            new = torch.tensor(ids[piece], device=device)[None]
            self._model.encode(new, self.cache, images=pictures([ids], piece, device))


class SessionStore:
    """The row of a session, which stays a conversation's while nobody else starts one on this model."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def first(self) -> int:
        return self.session.slots.first

    def windows(self, length: int) -> list[Tensor]:
        return self.session.slots.windows(length)

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        self.session.slots.rewind(length, windows)

    def extend(self, ids: Sequence[int], length: int) -> None:
        self.session.extend(ids, length)


class TurnOnCache(Reference):
    """batch.Reference, for one conversation."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        capacity: int,
        sampler: SamplerConfig,
        random: Random,
        turns: Turns,
    ) -> None:
        self._model, self._sampler, self._random, self._turns = model, sampler, random, turns
        store = turns.store if isinstance(turns.store, CacheStore) else CacheStore(model, capacity)
        self._cache, self.keep = store.cache, store.cache.keep
        self._cache.as_stacked(False)
        turns.begin(store, ids, model.config.window)
        self._cache.as_stacked(random.independent)  # the blocks, as in any other batch

    def commit(self, canvas: Tensor) -> None:
        with self._turns.growing(canvas):
            super().commit(canvas)


class TurnOnSlots(OnSlots):
    """batch.OnSlots, for one conversation: in the slots that it has, as long as they are its own and large enough."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        capacity: int,
        sampler: SamplerConfig,
        random: CounterRandom,
        turns: Turns,
    ) -> None:
        self._model, self._sampler, self._random, self._turns = model, sampler, random, turns
        store = _own(model, capacity, sampler, turns)
        self._session, self._tenant = store.session, turns
        turns.begin(store, ids, model.config.window)

    def commit(self, canvas: Tensor) -> None:
        length = len(self._turns.ids) + canvas.shape[1]
        with self._turns.growing(canvas):
            super().commit(canvas)
            self._session.slots.reach(length)


def _own(model: Model, capacity: int, sampler: SamplerConfig, turns: Turns) -> SessionStore:
    """The conversation's session, moved to a larger one if it must be; or one without what was kept."""
    store, session = turns.store, model.session
    if not isinstance(store, SessionStore) or store.session is not session or session.tenant is not turns:
        session = session_for(model, 1, max(capacity, min(ROOM, model.config.context)), sampler)
        session.tenant = turns
        return SessionStore(session)
    if session.fits(1, capacity, sampler):
        return store
    slots, room = session.slots, session.slots.capacity
    if capacity > room:
        room = max(capacity, min(2 * room, model.config.context))
    model.session = None
    del session, store.session  # graphs and all, before the next is made
    model.session = store.session = Session(passes_of(model), 1, room, sampler)
    store.session.tenant = turns
    store.session.slots.take(slots, len(turns.ids))
    return store
