"""One answer on its way: a row of a batch, from its prompt to its last block.

    tokens ── decoded ── reply's parts ── cut at a stop string ── Progress ──> whoever waits for it

A Row belongs to the worker's thread while it is computed. It hands out Progress, which never changes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dgq.runtime.files.reply import Reply
from dgq.runtime.files.tool_calls import OPEN, ToolCall
from dgq.runtime.shape.pictured import Pictured
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

if TYPE_CHECKING:
    from dgq.runtime.files.images import Vision
    from dgq.runtime.files.tokenizer import Tokenizer
    from dgq.runtime.files.tower import Patches, Tower

Finish = Literal["stop", "length", "tool_calls"]
_HALF_A_MARK = re.compile(r"</?[\w|\"]{0,16}\Z|</?think(ing)?>\s*\Z")


@dataclass
class Prompt:
    """A prompt's tokens, its images as one token each. settled: how many of them no later turn of the same chat will
    render differently. front: where images stand that the tokens do not name."""

    ids: list[int]
    settled: int = 0
    chat: bool = False
    patches: list[Patches] = field(default_factory=list)
    front: int | None = None
    image: int | None = None  # the token of an image
    whole: Sequence[int] | None = None  # with its images' embeddings

    @cached_property
    def length(self) -> int:
        """Its tokens, those of images counted."""
        there = self.image in self.ids if self.image is not None else False
        return len(self.ids) + sum(one.soft_tokens + 1 + (not there) for one in self.patches)

    def resolved(self, vision: Callable[[], tuple[Vision, Tower]]) -> Sequence[int]:
        """The prompt for the engine; images go through the tower once, however many rows share the prompt."""
        if not self.patches:
            return self.ids
        if self.whole is None:
            parts, tower = vision()
            self.whole = parts.prompt(self.ids, self.patches, tower, self.front)
        return self.whole

    @property
    def settled_whole(self) -> int:
        """`settled`, images counted as the tokens that they become."""
        if not isinstance(self.whole, Pictured):
            return self.settled
        images = sum(token == self.image for token in self.ids[: self.settled])
        return self.settled + sum(one.soft_tokens + 1 for one in self.patches[:images])


@dataclass(frozen=True)
class RowRequest:
    """What an answer is to be. number: the row's place in the seed's random stream; wanted: tokens at most; stops:
    texts that end it; deadline: of time.monotonic(); drafts: whether every step is wanted as well."""

    prompt: Prompt
    seed: int
    number: int
    wanted: int
    sampler: SamplerConfig
    stops: tuple[str, ...] = ()
    deadline: float = float("inf")
    drafts: bool = False


@dataclass(frozen=True)
class Progress:
    """An answer so far. steady, steady_reasoning: the beginnings of text and reasoning that no later block changes.
    steps, settled: of each block, how many it took and whether it was sure before they ran out. cached: tokens of the
    prompt that were not encoded again. timed_out: whether the time limit ended it."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    steady: str = ""
    steady_reasoning: str = ""
    finish: Finish | None = None
    tokens: int = 0
    steps: tuple[int, ...] = ()
    settled: tuple[bool, ...] = ()
    cached: int = 0
    unfinished_thought: bool = False
    timed_out: bool = False
    stopped_by: str | None = None


@dataclass(frozen=True)
class Draft:
    """The canvas after a step that was not the block's last. parts: its text up to the end, cut where it changes
    between accepted and not."""

    block: int
    step: int
    steps: int
    parts: tuple[tuple[str, bool], ...]
    accepted: int
    entropy: float


Event = Progress | Draft | Exception


class Row:
    """An answer being made. tell: called with each event, in the worker's thread."""

    def __init__(
        self, request: RowRequest, tokenizer: Tokenizer, generation: GenerationConfig, tell: Callable[[Event], None]
    ) -> None:
        self.request, self.tell = request, tell
        self.gone = self.begun = self.done = False
        self.cached = 0
        self.entered = time.monotonic()
        self.tokens: list[int] = []
        self._tokenizer, self._eos = tokenizer, generation.eos_ids
        self._steps: list[int] = []
        self._settled: list[bool] = []

    def take(self, canvas: Sequence[int], steps: int) -> None:
        """Add a committed block, and tell of it."""
        stop = next((i for i, token in enumerate(canvas) if token in self._eos), len(canvas))
        ended = stop < len(canvas) and len(self.tokens) + stop < self.request.wanted
        self.tokens = (self.tokens + list(canvas[:stop]))[: self.request.wanted]
        self._steps.append(steps)
        self._settled.append(steps < self.request.sampler.steps)
        late = not ended and len(self.tokens) < self.request.wanted and time.monotonic() > self.request.deadline
        finish: Finish | None = "stop" if ended else None
        if finish is None and (late or len(self.tokens) >= self.request.wanted or stop < len(canvas)):
            finish = "length"
        progress = self._progress(finish, late)
        self.done = progress.finish is not None
        self.tell(progress)

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self.done = True
        self.tell(error)

    def _progress(self, finish: Finish | None, late: bool) -> Progress:
        prompt = self.request.prompt
        reply = (
            self._tokenizer.reply(self.tokens, prompt.ids)
            if prompt.chat
            else Reply(self._tokenizer.decode(self.tokens))
        )
        text, stopped_by = _cut(reply.text, self.request.stops)
        if stopped_by is not None:
            finish = "stop"
        elif reply.tool_calls and finish == "stop":
            finish = "tool_calls"
        whole = finish is not None
        return Progress(
            text,
            reply.reasoning,
            reply.tool_calls,
            text if whole else _steady(text, self.request.stops, prompt.chat),
            reply.reasoning if whole else _steady_reasoning(reply),
            finish,
            len(self.tokens),
            tuple(self._steps),
            tuple(self._settled),
            self.cached,
            reply.unfinished_thought,
            late,
            stopped_by,
        )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first stop string, and which that is."""
    places = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    at, stop = min(places, default=(len(text), None))
    return text[:at], stop


def _steady_reasoning(reply: Reply) -> str:
    """The reasoning likewise. Its first word may be half the name of its channel."""
    return "" if re.fullmatch(r"\w{0,16}", reply.reasoning) else _steady(reply.reasoning, (), True)


def _steady(text: str, stops: Sequence[str], chat: bool) -> str:
    """The text without what may still turn into something else: a tool call or a mark that is not yet whole, half a
    stop string, half a letter, space at an end."""
    ends = [len(text.rstrip().rstrip("\ufffd"))]
    if chat:
        ends += [at for at in (text.find(OPEN),) if at >= 0]
        if match := _HALF_A_MARK.search(text):
            ends.append(match.start())
    for stop in stops:
        half = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
        ends.append(len(text) - half)
    return text[: min(ends)].rstrip()
