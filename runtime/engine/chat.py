"""A conversation: messages through the chat template, turn after turn, on a cache that stays.

    chat = engine.chat(system="Be brief.", thinking=True)
    chat.ask("Why is the sky blue?").text
    chat.ask("And at night?").encoded        only the tokens that are new
    chat.ask("Like this?", images=["night.jpg"])

The messages are the truth: every turn renders all of them, and keeps of the cache what the rendering has in common with
it (turns.py). A reply goes among them as its text; its thoughts apart, as "reasoning_content", where Gemma 4's template
looks for them: it gives them back only to a model that is in the middle of calling tools.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Block, Rng, Step, stream
from dgq.runtime.engine.turns import Turns, common
from dgq.runtime.files.images import parted, placed
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model.model import Model
from dgq.runtime.shape.pictured import told
from dgq.runtime.shape.settings import GenerationConfig


@dataclass(frozen=True)
class Reply:
    """To one turn. thought: what the model thought before, "" if it did not; tokens: of both; ended: whether the model
    said so itself; steps: of each block; prompt_tokens: of the conversation before the reply; encoded: of these, how
    many were not in the cache."""

    text: str
    thought: str
    tokens: list[int]
    ended: bool
    steps: list[int]
    prompt_tokens: int
    encoded: int


class Chat:
    """A conversation with a model. messages: so far, as a chat template takes them; may be edited between turns."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        generation: GenerationConfig,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
        rng: Rng = "counter",
        see: Callable[[Sequence[int], Sequence[Any]], Sequence[int]] | None = None,
    ) -> None:
        """thinking: the template's enable_thinking, its own default unless given. seed: of all turns; no two turns
        draw the same from it. see: puts images in their places among ids; None: text alone. InputError if the template
        knows no thinking."""
        self._model, self._tokenizer, self._generation = model, tokenizer.thinking(thinking), generation
        self._seed, self._rng, self._turns, self._see = seed, rng, Turns(), see
        self._turn: object = None  # the one that goes on
        self.messages: list[Mapping[str, Any]] = list(messages)
        if system is not None:
            self.messages.insert(0, {"role": "system", "content": system})

    def ask(
        self, text: str, on_step: Callable[[Step], None] | None = None, images: Sequence[Any] = (), **settings: Any
    ) -> Reply:
        """The reply to a user's text, both added to the messages. images: this turn's, files or PIL images, before the
        text or where it says <|image|>. settings: max_new_tokens, steps."""
        events = self.stream(text, images, every_step=on_step is not None, **settings)
        while True:
            try:
                event = next(events)
            except StopIteration as over:
                reply: Reply = over.value
                return reply
            if on_step is not None and isinstance(event, Step):
                on_step(event)

    def stream(self, text: str, images: Sequence[Any] = (), **settings: Any) -> Generator[Step | Block, None, Reply]:
        """ask(), as it happens; the generator's value is the reply. A turn that is not seen to its end never was."""
        turn = self._turn = object()
        said = [*self.messages, {"role": "user", "content": parted(text, images)}]
        plain, shown, _ = placed(self._tokenizer, said)
        ids: Sequence[int] = plain
        bare: Sequence[int] = self._tokenizer.chat(said, add_generation_prompt=False)
        if shown:
            if self._see is None:
                raise InputError("this conversation is text alone: dgq.runtime.load(…).chat() takes images")
            ids, bare = self._see(ids, shown), self._see(bare, shown)
        self._turns.settled = common(told(ids), told(bare))
        number = sum(message.get("role") == "assistant" for message in self.messages)
        places: dict[str, Any] = {"seed": self._seed, "rows": [number]}
        if self._rng == "torch":
            places = {"seed": self._seed + number}
        events = stream(self._model, [ids], self._generation, rng=self._rng, turns=self._turns, **places, **settings)
        tokens: list[int] = []
        steps: list[int] = []
        ended = False
        for event in events:
            if isinstance(event, Block):
                tokens += event.canvas[0].tolist()
                steps.append(event.steps[0])
                ended = event.ended[0]
            yield event
            if self._turn is not turn:
                raise InputError("another turn was begun meanwhile: this one cannot go on")
        wanted = settings.get("max_new_tokens") or self._generation.max_new_tokens
        stop = next((i for i, token in enumerate(tokens) if token in self._generation.eos_ids), len(tokens))
        answer, thought = self._tokenizer.reply(tokens := tokens[: min(stop, wanted)])
        reply = {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})
        self.messages = [*said, reply]
        return Reply(answer, thought, tokens, ended and stop < wanted, steps, len(ids), self._turns.encoded)
