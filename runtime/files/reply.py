"""What a model wrote, as its parts: the answer, the reasoning before it, and the tool calls.

    <|channel>thought\\n … <channel|>          reasoning, as Gemma 4 writes it
    <|channel>final\\n … <channel|>            a channel of the answer's
    <think> … </think>                        reasoning, as fine-tunes on other models' data write it
    <|tool_call>call:NAME{ … }<tool_call|>    a tool call, see tool_calls.py
    everything else                           the answer

`dgq run`, Python's Chat and a server all use this one reading. A thought may begin in the prompt, where a chat template
opens it; it may stay open, when the tokens run out; and its beginning may be missing, so that only its end is seen.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from dgq.runtime.files import tool_calls
from dgq.runtime.files.tool_calls import ToolCall, read_call

CHANNEL, END_CHANNEL = "<|channel>", "<channel|>"

MARKERS = frozenset(
    (CHANNEL, END_CHANNEL, tool_calls.OPEN, tool_calls.CLOSE, tool_calls.QUOTE, "<|tool_response>", "<tool_response|>")
)
"""Tokens that structure a reply. They stay in decoded text, whatever a tokenizer flags them as, so that programs can
read it. llama.cpp's converter marks the same ones as visible, for the same reason (Gemma4Model.set_vocab)."""

_THOUGHTS = ("thought", "thinking", "analysis", "reasoning", "commentary")
_ANSWERS = ("final", "answer", "response")
_NAME = re.compile(rf"\s*({'|'.join((*_THOUGHTS, *_ANSWERS))})[ \t]*(?:\n|$)")

# A tag in backticks is talked about, not meant.
_THINK = r"(?<!`)<think(?:ing)?>"
_END_THINK = r"(?<!`)</think(?:ing)?>"
_MARK = re.compile(rf"<\|channel>|<channel\|>|<\|tool_call>|{_THINK}|{_END_THINK}")
_ENDS = {  # What ends a thought that was opened so; None: opened in the prompt.
    "<|channel>": re.compile(r"<channel\|>|(?=<\|channel>)"),
    "<think>": re.compile(_END_THINK),
    None: re.compile(rf"<channel\|>|(?=<\|channel>)|{_END_THINK}"),
}
_OPEN_TAG = re.compile(rf"{_THINK}\s*\Z")


class Reply(NamedTuple):
    """The parts of a reply.

    text: the answer, without reasoning and tool calls; a call that is cut off or malformed stays in it as it was
    written. reasoning: what the model thought, "" if it did not; several thoughts are parted by an empty line.
    tool_calls: in the order in which they were written. unfinished_thought: whether the reply ends inside a thought,
    as when its tokens ran out; the text is then often empty.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    unfinished_thought: bool = False

    def message(self) -> dict[str, Any]:
        """The reply as a message for the chat template of a later turn."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": vars(call)} for call in self.tool_calls]
        return message

    def json(self) -> dict[str, Any]:
        """The reply for json.dumps(); a tool call is {"name": …, "arguments": {…}}."""
        return self._asdict() | {"tool_calls": [vars(call) for call in self.tool_calls]}


def parse_reply(text: str, in_thought: bool = False) -> Reply:
    """The parts of a reply's text, as Tokenizer.decode() gives it. in_thought: whether the prompt ended inside a
    thought, see opens_thought(). Text without any mark is the answer, to its last space.

    For a stream, call this on all text so far, which grows. Text can still turn into something else at a mark that is
    half written, at a tool call that is not yet closed, and at the end of a thought whose beginning was not seen.
    """
    parts = _Parts()
    at = parts.think(text, 0, None) if in_thought else 0
    while match := _MARK.search(text, at):
        mark = match[0]
        call = read_call(text, match.start()) if mark == tool_calls.OPEN else None
        if call is not None:
            parts.answer.append(text[at : match.start()])
            parts.calls.append(call[0])
            at, parts.marked = call[1], True
        elif mark == CHANNEL or (mark.startswith("<think") and _means_thought(text, match)):
            parts.answer.append(text[at : match.start()])
            at = parts.think(text, match.end(), CHANNEL if mark == CHANNEL else "<think>")
        elif mark == END_CHANNEL or mark.startswith("</"):
            parts.end(text[at : match.start()])
            at = match.end()
        else:  # a tag that is talked about, or a call that is none
            parts.answer.append(text[at : match.end()])
            at = match.end()
    parts.answer.append(text[at:])
    return parts.reply()


def opens_thought(prompt: str) -> bool:
    """Whether a prompt's text, or its end, leaves a thought open, as Gemma 4's template does after a tool's response,
    and templates for <think> at every turn."""
    opened = prompt.rfind(CHANNEL)
    if opened > max(prompt.rfind(END_CHANNEL), prompt.rfind("<|turn>")):
        name = _NAME.match(prompt, opened + len(CHANNEL))
        return name is None or name[1] not in _ANSWERS
    return _OPEN_TAG.search(prompt) is not None


def _means_thought(text: str, tag: re.Match[str]) -> bool:
    """Whether a <think> opens a thought: it is closed, or it begins a line."""
    before = text[: tag.start()].rstrip(" \t")
    return not before or before.endswith("\n") or _ENDS["<think>"].search(text, tag.end()) is not None


class _Parts:
    """The parts of a reply while it is read. marked: whether any mark was seen."""

    def __init__(self) -> None:
        self.answer: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCall] = []
        self.marked = self.unfinished = False

    def think(self, text: str, start: int, opened: str | None) -> int:
        """Take the thought, or the channel, that begins at `start`; the place behind it."""
        self.marked = True
        name = _NAME.match(text, start)
        if name is not None and name[1] in _ANSWERS:
            return name.end()
        end = _ENDS[opened].search(text, start)
        call = text.find(tool_calls.OPEN, start) if end is None else -1
        self.unfinished = end is None and call < 0
        last = end.start() if end is not None else call if call >= 0 else len(text)
        self.thoughts.append(text[start:last] if name is None else text[name.end() : last])
        return end.end() if end is not None else last

    def end(self, before: str) -> None:
        """The end of a thought that nothing opened: if it is the first mark, all before it was a thought that the
        prompt began."""
        if self.marked:
            self.answer.append(before)
            return
        self.marked = True
        before, self.answer = "".join((*self.answer, before)), []
        name = _NAME.match(before)
        body = before if name is None else before[name.end() :]
        (self.answer if name is not None and name[1] in _ANSWERS else self.thoughts).append(body)

    def reply(self) -> Reply:
        text = "".join(self.answer)
        thoughts = [thought.strip() for thought in self.thoughts]
        reasoning = "\n\n".join(thought for thought in thoughts if thought)
        return Reply(text.strip() if self.marked else text, reasoning, tuple(self.calls), self.unfinished)
