"""Answers as OpenAI's objects, whole and as a stream's chunks, with dgq's own fields beside them."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from dgq.runtime.serve.asking import Asked
from dgq.runtime.serve.rows import Draft, Progress

EMPTY = {
    "thought": "the tokens ran out within the model's reasoning; give more max_tokens",
    "stop": "the answer begins with a stop string",
    "length": "the tokens ran out before the model wrote any text",
    "ended": "the model ended its answer without writing any",
}


@dataclass
class Answer:
    """The response to one request while it is made. chat: whether of messages. began: of time.monotonic()."""

    asked: Asked
    model: str
    chat: bool
    began: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Progress]) -> dict[str, Any]:
        """The response that is not streamed."""
        made = [self._choice(index, one) for index, one in enumerate(choices)]
        object_ = "chat.completion" if self.chat else "text_completion"
        return self._head(object_) | {"choices": made, "usage": self.usage(choices), "dgq": self.about(choices)}

    def _choice(self, index: int, one: Progress) -> dict[str, Any]:
        content: dict[str, Any] = {"text": one.text}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": one.text or (None if one.calls else "")}
            if one.reasoning:
                message["reasoning_content"] = one.reasoning
            if one.calls:
                message["tool_calls"] = _calls(one, self.id, index)
            content = {"message": message}
        return {"index": index, **content, "finish_reason": one.finish, "logprobs": None, "dgq": _blocks(one)}

    def usage(self, choices: list[Progress]) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of the answers."""
        prompts = {id(row.prompt): row.prompt.length for row in self.asked.rows}
        prompt, answer = sum(prompts.values()), sum(one.tokens for one in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in choices)},
        }

    def about(self, choices: list[Progress]) -> dict[str, Any]:
        """dgq's fields about the whole request. notes: what was not followed, and why an answer is empty."""
        seconds = time.monotonic() - self.began
        tokens, steps = sum(one.tokens for one in choices), sum(sum(one.steps) for one in choices)
        notes = list(self.asked.notes)
        for index, one in enumerate(choices):
            if one.timed_out:
                notes.append(f"choice {index}: the server's time limit ended it")
            if not one.text.strip() and not one.calls:
                notes.append(f"choice {index} is empty: {EMPTY[_emptiness(one)]}")
        return {
            "seed": self.asked.seed,
            "seconds": round(seconds, 4),
            "steps": steps,
            "tokens_per_step": round(tokens / max(steps, 1), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 2),
            "notes": notes,
        }

    def chunk(self, index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A chunk with a part of one choice. delta: of a message; of a text, its content."""
        part = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **part, "finish_reason": finish, "logprobs": None, **more}
        return self._chunk_head() | {"choices": [choice]}

    def draft(self, index: int, draft: Draft) -> dict[str, Any]:
        """A chunk without a choice: the canvas of one."""
        return self._chunk_head() | {"choices": [], "dgq": {"draft": {"index": index, **vars(draft)}}}

    def last(self, choices: list[Progress]) -> dict[str, Any]:
        """The chunk behind all choices, if the usage was asked for."""
        return self._chunk_head() | {"choices": [], "usage": self.usage(choices)}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.model}


class Sent:
    """What a stream has sent of one choice."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._answer, self._index = answer, index
        self._text = self._reasoning = ""
        self._blocks = 0

    def chunk(self, one: Progress) -> dict[str, Any]:
        """The chunk of a block: what is new and stays as it is."""
        answer, index = self._answer, self._index
        delta: dict[str, Any] = {} if self._blocks else {"role": "assistant"}
        more: dict[str, Any] = {"dgq": _block(one)}
        reasoning, text = one.steady_reasoning, one.steady
        if reasoning.startswith(self._reasoning) and reasoning != self._reasoning:
            delta["reasoning_content"] = reasoning[len(self._reasoning) :]
            self._reasoning = reasoning
        if text.startswith(self._text):
            if text != self._text or not self._blocks:
                delta["content"] = text[len(self._text) :]
            self._text = text
        elif one.finish is not None:  # a mark late in the answer changed what its beginning means
            more["dgq"] |= {"text": one.text, "reasoning_content": one.reasoning}
        if one.finish is not None and one.calls and answer.chat:
            calls = _calls(one, answer.id, index)
            delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
        self._blocks += 1
        return answer.chunk(index, delta, one.finish, **more)


def _calls(one: Progress, name: str, choice: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{name}_{choice}_{at}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for at, call in enumerate(one.calls)
    ]


def _blocks(one: Progress) -> dict[str, Any]:
    return {
        "steps": list(one.steps),
        "settled": list(one.settled),
        "tokens_per_step": round(one.tokens / max(sum(one.steps), 1), 3),
        "stop_string": one.stopped_by,
    }


def _block(one: Progress) -> dict[str, Any]:
    """Of the last block."""
    return {"block": len(one.steps) - 1, "steps": one.steps[-1], "settled": one.settled[-1]}


def _emptiness(one: Progress) -> str:
    if one.unfinished_thought:
        return "thought"
    if one.stopped_by is not None:
        return "stop"
    return "length" if one.finish == "length" else "ended"
