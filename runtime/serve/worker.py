"""The thread that computes: it makes batches of the rows that wait, and takes each through its blocks.

    waiting   r1 r2 r3 r4 r5 | r6 …          submit() refuses what is more than may wait
    batch     r1 r2 r4                       the first, and those behind it with the same sampler that fit the context
              r1    r4                       r2 ended, or its client left: it leaves at the end of a block

A row gets what it would get alone. A row that is alone continues an earlier conversation, if it begins like one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from threading import Condition, Thread
from typing import TYPE_CHECKING

from dgq.quant.errors import InputError
from dgq.runtime.engine.batch import reserve
from dgq.runtime.engine.engine import Block, Request, Step, stream
from dgq.runtime.engine.prefixes import Prefixes
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model
from dgq.runtime.serve.errors import ApiError, internal
from dgq.runtime.serve.rows import Draft, Row
from dgq.runtime.serve.settings import ServeSettings

if TYPE_CHECKING:
    from dgq.runtime.files.images import Vision
    from dgq.runtime.files.tower import Tower
    from dgq.runtime.serve.metrics import Meters

GATHER_S = 0.005  # requests that come so close together share a batch


class Worker:
    """Computes rows in a thread of its own. running, waiting: how many there are."""

    def __init__(
        self, artifact: Artifact, model: Model, settings: ServeSettings, meters: Meters, tower_device: str
    ) -> None:
        self._artifact, self._model, self._settings, self._meters = artifact, model, settings, meters
        self._tower_device = tower_device
        self._tower: tuple[Vision, Tower] | None = None
        self._waiting: deque[Row] = deque()
        self._changed = Condition()
        self._stopping = False
        self._batch: list[Row] = []
        self._row_s = 1.0  # seconds that a row took lately, its batch's shared out
        self._prefixes = Prefixes(model)
        self._thread = Thread(target=self._run, name="dgq-serve", daemon=True)

    def start(self) -> None:
        """Take the memory that batches need, and begin."""
        reserve(self._model, self._settings.rows, self._settings.context, self._artifact.generation.sampler)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their batch. ApiError 429 if there are too many already, 503 if the server stops."""
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise ApiError(503, "the server is stopping", "stopping", retry=5)
            waiting = sum(not row.gone for row in self._waiting)
            if waiting + len(rows) > self._settings.max_waiting + max(0, self._settings.rows - len(self._batch)):
                raise ApiError(
                    429, f"{waiting} answers are waiting already; try again later", "busy", retry=self._retry(waiting)
                )
            self._waiting.extend(rows)
            self._meters.load(len(self._waiting), len(self._batch))
            self._changed.notify()

    def stop(self) -> None:
        """Refuse what waits and what comes; what is being computed goes on to its end."""
        with self._changed:
            self._stopping = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for row in refused:
            row.fail(ApiError(503, "the server is stopping", "stopping", retry=5))

    def abandon(self) -> None:
        """Let nothing go on beyond the step that is being computed."""
        self.stop()
        for row in self._batch:
            row.gone = True

    def join(self, seconds: float) -> bool:
        """Whether the thread ended within so many seconds."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    def _retry(self, waiting: int) -> int:
        return max(1, min(60, round(self._row_s * (waiting + 1))))

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            began = time.monotonic()
            try:
                if batch:
                    self._compute(batch)
            except Exception as error:
                self._fail(batch, error)
            if batch:
                self._row_s = 0.7 * self._row_s + 0.3 * (time.monotonic() - began) / len(batch)
            with self._changed:
                self._batch = []
                self._meters.load(len(self._waiting), 0)

    def _fail(self, batch: Sequence[Row], error: Exception) -> None:
        """End the rows of a batch that could not be computed, and give its memory back."""
        self._prefixes.forget()
        self._model.drop_session()
        if isinstance(error, InputError):
            shown = ApiError(503, f"the model could not answer: {error}", "model_error")
        elif type(error).__name__ == "OutOfMemoryError":
            shown = ApiError(503, "memory ran out; serve with less --rows or --context", "out_of_memory", retry=10)
        else:
            shown = internal(error)
        for row in batch:
            if not row.done:
                row.fail(shown)

    def _next(self) -> list[Row] | None:
        """Wait for the next batch, which is empty if all its clients have left; None when the server stops."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if len(self._waiting) < self._settings.rows and not self._stopping:
                self._changed.wait_for(lambda: len(self._waiting) >= self._settings.rows, GATHER_S)
            waiting = [row for row in self._waiting if not row.gone]
            batch: list[Row] = []
            for row in waiting:
                if len(batch) < self._settings.rows and self._fits(batch, row):
                    batch.append(row)
            chosen = set(map(id, batch))
            self._waiting = deque(row for row in waiting if id(row) not in chosen)
            self._batch = batch
            self._meters.load(len(self._waiting), len(batch))
            return None if self._stopping and not batch else batch

    def _fits(self, batch: Sequence[Row], row: Row) -> bool:
        """Whether a row may join: the batch's memory is its longest prompt and its longest answer, for every row."""
        asked = [one.request for one in (*batch, row)]
        if any(one.sampler != row.request.sampler for one in asked):
            return False
        canvas = self._model.config.canvas
        blocks = -(-max(one.wanted for one in asked) // canvas)
        return max(one.prompt.length for one in asked) + blocks * canvas <= self._settings.context

    def _compute(self, batch: list[Row]) -> None:
        asked = [row.request for row in batch]
        for row in batch:
            row.begun = True
            self._meters.began(time.monotonic() - row.entered)
        prompts = [one.prompt.resolved(self._vision) for one in asked]
        generation = replace(self._artifact.generation, sampler=asked[0].sampler)
        turns = self._prefixes.turns(prompts[0], asked[0].prompt.settled_whole) if len(batch) == 1 else None
        request = Request(
            prompts,
            generation,
            max(one.wanted for one in asked),
            seed=[one.seed for one in asked],
            rows=[one.number for one in asked],
            leaving=lambda: {i for i, row in enumerate(batch) if row.gone or row.done},
            turns=turns,
        )
        if turns is None and self._model.device.type == "cuda":
            self._prefixes.forget()  # the batch takes the session that its keys lie in
        reserve(self._model, self._settings.rows, self._settings.context, asked[0].sampler)
        events = stream(self._model, request)
        try:
            for event in events:
                if turns is not None:
                    batch[0].cached = len(prompts[0]) - turns.encoded
                self._take(batch, event)
                if all(row.gone or row.done for row in batch):
                    return
        finally:
            events.close()  # type: ignore[attr-defined]

    def _take(self, batch: Sequence[Row], event: Step | Block) -> None:
        for at, number in enumerate(event.rows):
            row = batch[number]
            if row.done or row.gone:
                continue
            if isinstance(event, Block):
                row.take(event.canvas[at].tolist(), event.steps[at])
                self._meters.block(event.steps[at], event.steps[at] < row.request.sampler.steps)
            elif row.request.drafts:
                row.tell(self._draft(event, at))

    def _draft(self, step: Step, at: int) -> Draft:
        tokens, accepted = step.canvas[at].tolist(), step.accepted[at].tolist()
        eos = self._artifact.generation.eos_ids
        stop = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
        parts: list[tuple[str, bool]] = []
        start = 0
        while start < stop:
            end = next((i for i in range(start, stop) if accepted[i] != accepted[start]), stop)
            parts.append((self._artifact.tokenizer.decode(tokens[start:end]), accepted[start]))
            start = end
        return Draft(step.block, step.step, step.steps, tuple(parts), sum(accepted), round(float(step.entropy[at]), 4))

    def _vision(self) -> tuple[Vision, Tower]:
        if self._tower is None:
            vision = self._artifact.vision
            self._tower = vision, vision.tower(self._tower_device, self._model.dtype)
        return self._tower
