"""A conversation: messages go through the chat template turn after turn, and the cache stays between the turns.

    chat = engine.chat(system="Be brief.", thinking=True)
    chat.ask("Why is the sky blue?").text
    chat.ask("And at night?").encoded        only the tokens that are new
    chat.ask("Like this?", images=["night.jpg"])

Every turn renders all messages anew, and keeps of the cache what the rendering has in common with it (turns.py). A
reply is added to the messages as its text. Its reasoning is added apart, as "reasoning_content", and its tool calls as
"tool_calls", which is where Gemma 4's template looks for them: it renders the reasoning only for a model that is in the
middle of calling tools.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Block, Request, Rng, Step, stream
from dgq.runtime.engine.turns import Turns, common
from dgq.runtime.files.images import parted, placed
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.files.tool_calls import ToolCall
from dgq.runtime.model.model import Model
from dgq.runtime.shape.pictured import marks_of
from dgq.runtime.shape.settings import GenerationConfig


@dataclass(frozen=True)
class ChatReply:
    """The model's reply to one turn.

    text, reasoning, tool_calls, unfinished_thought: its parts, see files.reply.Reply. tokens: of all of these. ended:
    whether the model ended the reply by itself. steps: how many each block took. prompt_tokens: the length of the
    conversation before the reply; encoded: how many of these were not in the cache.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    unfinished_thought: bool
    tokens: list[int]
    ended: bool
    steps: list[int]
    prompt_tokens: int
    encoded: int


class Chat:
    """A conversation with a model. messages: those so far, as a chat template takes them; a caller may edit them
    between turns. A system message is the first of them."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        generation: GenerationConfig,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
        rng: Rng = "counter",
        see: Callable[[Sequence[int], Sequence[Any]], Sequence[int]] | None = None,
    ) -> None:
        """tokenizer: Tokenizer.thinking() makes one whose conversations think. seed: for all turns, which draw
        different numbers from it. see: puts images into their places among ids; None: the conversation takes text
        alone."""
        self._model, self._tokenizer, self._generation = model, tokenizer, generation
        self._seed, self._rng, self._turns, self._see = seed, rng, Turns(), see
        self._turn: object = None  # the turn that is being generated
        self.messages: list[Mapping[str, Any]] = list(messages)

    def ask(
        self, text: str, on_step: Callable[[Step], None] | None = None, images: Sequence[Any] = (), **settings: Any
    ) -> ChatReply:
        """The reply to a user's text; both are added to the messages. images: files or PIL images of this turn, which
        stand before the text, or where the text says <|image|>. settings: max_new_tokens, steps."""
        events = self.stream(text, images, every_step=on_step is not None, **settings)
        while True:
            try:
                event = next(events)
            except StopIteration as over:
                reply: ChatReply = over.value
                return reply
            if on_step is not None and isinstance(event, Step):
                on_step(event)

    def stream(
        self, text: str, images: Sequence[Any] = (), every_step: bool = True, **settings: Any
    ) -> Generator[Step | Block, None, ChatReply]:
        """Yield what ask() does while it happens; the generator returns the reply. A turn that is not consumed to its
        end leaves the messages as they were."""
        turn = self._turn = object()
        messages = [*self.messages, {"role": "user", "content": parted(text, images)}]
        request = self._request(messages, **settings)
        tokens: list[int] = []
        steps: list[int] = []
        ended = False
        for event in stream(self._model, request, every_step):
            if isinstance(event, Block):
                tokens += event.canvas[0].tolist()
                steps.append(event.steps[0])
                ended = event.ended[0]
            yield event
            if self._turn is not turn:
                raise InputError("another turn was begun meanwhile: this one cannot go on")
        stop = next((i for i, token in enumerate(tokens) if token in self._generation.eos_ids), len(tokens))
        tokens = tokens[: min(stop, request.wanted)]
        reply = self._tokenizer.reply(tokens, request.prompts[0])
        self.messages = [*messages, reply.message()]
        ended = ended and stop < request.wanted
        return ChatReply(*reply, tokens, ended, steps, len(request.prompts[0]), self._turns.encoded)

    def _request(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Request:
        """The request of the next turn. Every turn has its place in the random stream: the number of replies so far."""
        plain, images, _ = placed(self._tokenizer, messages)
        ids: Sequence[int] = plain
        bare: Sequence[int] = self._tokenizer.chat(messages, add_generation_prompt=False)
        if images:
            if self._see is None:
                raise InputError("this conversation is text alone: dgq.runtime.load(…).chat() takes images")
            ids, bare = self._see(ids, images), self._see(bare, images)
        self._turns.settled = common(marks_of(ids), marks_of(bare))
        number = sum(message.get("role") == "assistant" for message in self.messages)
        seed, rows = (self._seed + number, None) if self._rng == "torch" else (self._seed, [number])
        return Request([ids], self._generation, seed=seed, rng=self._rng, rows=rows, turns=self._turns, **settings)
