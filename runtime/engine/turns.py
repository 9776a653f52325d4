"""The keys and values that a conversation keeps from one turn to the next.

    in the cache    prompt of turn 1 ··········· | its reply, block by block
    turn 2          the same ··········· the same x written anew ······ and what is new
                    <-------- kept -------------> <------------- encoded ------------->

A turn's prompt is the whole conversation as the chat template renders it. The template may render an earlier turn
differently than before: it drops thoughts, and a reply's text may have other tokens than the reply. The tokens that
the cache and the new prompt begin with in common are kept.

The cache of a full layer can be cut at any token. A sliding layer holds only its last window, which is of no use
further back. So copies of the windows are saved at the token where the next prompt is expected to differ, which is
before the generation prompt. A prompt that differs earlier than that is encoded as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgq.runtime.engine.batch import PREFILL, OnCache, OnSlots, backend_of, session_for
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom, Random
from dgq.runtime.model.session import Session
from dgq.runtime.shape.pictured import marks_of, part, pictures, pieces
from dgq.runtime.shape.settings import SamplerConfig

ROOM = 4096  # tokens that a conversation's slots are first made for; the number doubles whenever they are full


class Store(Protocol):
    """A place that holds the keys and values of one row."""

    @property
    def first(self) -> int:
        """The first token that every layer still holds."""
        ...

    def windows(self, length: int) -> list[Tensor]:
        """Copies of the sliding layers' windows while the store holds `length` tokens."""
        ...

    def rewind(self, length: int, windows: Sequence[Tensor] | None = None) -> None:
        """Forget all but the first `length` tokens. windows: what windows(length) returned earlier, where the sliding
        layers no longer hold that window."""
        ...

    def extend(self, ids: Sequence[int], length: int) -> None:
        """Encode tokens behind the `length` tokens that are there."""
        ...


@dataclass(frozen=True)
class _Saved:
    """The sliding layers' windows at the end of these tokens."""

    ids: list[int]
    windows: list[Tensor]


class Turns:
    """The turns of one conversation.

    settled: how many tokens of the next prompt no later turn is expected to render differently. encoded: how many
    tokens of the last prompt were not kept. ids: the tokens in the store, as pictured.marks_of() compares them; empty
    while the store is being written to, so that half a turn is never kept. adapter: what the tokens were encoded with.
    """

    def __init__(self) -> None:
        self.settled = self.encoded = 0
        self.store: Store | None = None
        self.ids: list[int] = []
        self.adapter: object = None
        self._saved: _Saved | None = None

    def choose(self, adapter: object) -> None:
        """Go on with these adapters; keys and values that others made are of no use."""
        if adapter != self.adapter:
            self.adapter, self.store, self.ids, self._saved = adapter, None, [], None

    def begin(self, store: Store, ids: Sequence[int], window: int) -> None:
        """Make the store hold `ids` and nothing else. It is another store than before if the earlier one was taken by
        somebody else. window: of the sliding layers, in tokens."""
        if store is not self.store:
            self.store, self.ids, self._saved = store, [], None
        marks = marks_of(ids)
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
        """A context in which a block (1, canvas) is encoded behind the tokens that are there."""
        ids, self.ids = self.ids, []
        yield
        self.ids = ids + canvas[0].tolist()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both begin with in common."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


class CacheStore:
    """A store that is a growing cache."""

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
    """A store that is the row of a session. It is the conversation's while nobody else takes the model's session."""

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


class TurnOnCache(OnCache):
    """batch.OnCache for the next turn of a conversation, in the cache that its earlier turns filled."""

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
        self._cache = store.cache
        self._cache.as_stacked(False)
        turns.begin(store, ids, model.config.window)
        self._cache.as_stacked(random.independent)  # for the blocks, as in any other batch

    def commit(self, canvas: Tensor) -> None:
        with self._turns.growing(canvas):
            super().commit(canvas)


class TurnOnSlots(OnSlots):
    """batch.OnSlots for the next turn of a conversation, in its own slots as long as these are large enough."""

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
        store = _store_for(model, capacity, sampler, turns)
        self._session, self._tenant = store.session, turns
        turns.begin(store, ids, model.config.window)

    def commit(self, canvas: Tensor) -> None:
        length = len(self._turns.ids) + canvas.shape[1]
        with self._turns.growing(canvas):
            super().commit(canvas)
            self._session.slots.reach(length)


def _store_for(model: Model, capacity: int, sampler: SamplerConfig, turns: Turns) -> SessionStore:
    """The conversation's store, moved to a larger session if it must be; an empty one if its session was taken."""
    store, session = turns.store, model.session
    if (
        not isinstance(store, SessionStore)
        or session is None
        or store.session is not session
        or session.tenant is not turns
    ):
        session = session_for(model, 1, max(capacity, min(ROOM, model.config.context)), sampler)
        session.tenant = turns
        return SessionStore(session)
    if session.fits(1, capacity, sampler):
        return store
    slots, room = session.slots, session.slots.capacity
    if capacity > room:
        room = max(capacity, min(2 * room, model.config.context))
    model.drop_session()
    del session, store.session  # its graphs are gone before the larger session is made
    store.session = model.keep_session(Session(backend_of(model), 1, room, sampler))
    store.session.tenant = turns
    store.session.slots.take(slots, len(turns.ids))
    return store
