"""What models are judged on: prompts, what follows them, and exact answers where there are any. A seed fixes the noise.

    {"text": …}                             the first tokens are the prompt, the next ones its canvas
    {"prompt": … | "messages": […], "answer": …}    the chat's prompt; its canvas is the answer, then padding
    {"prompt": … | "messages": […]}         the chat's prompt; its canvas is what the reference writes there itself

An entry's "group" (or "task") is the heading that it is reported under. `tiny` has 64 texts and 256 tasks of its own,
on which it was neither trained nor calibrated; every other model gets prompts/validation.jsonl.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgq.convert.layerwise.measure import noised
from dgq.convert.source.hub import TINY
from dgq.convert.source.prompts import PromptFile, is_chat, read_prompts, shipped_prompts
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.reply import parse_reply

LEVELS = (0.25, 0.5, 0.75, 1.0)  # share of a canvas's tokens replaced by random ones
LONGEST = 1024  # tokens of a text's prompt
SHORTEST = 8
BATCH_LOGITS = 1 << 26  # rows * canvas * vocab of a batch at most, if it has more rows than one
ROWS = 16


@dataclass(frozen=True)
class Question:
    """A prompt to be judged on. group: the heading that it is reported under; prompt: token ids; canvas: the clean ids
    behind it, None until the reference has written them; answer: the exact text, None if there is none."""

    group: str
    prompt: tuple[int, ...]
    canvas: tuple[int, ...] | None
    answer: str | None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Question:
        canvas = raw["canvas"]
        return cls(raw["group"], tuple(raw["prompt"]), None if canvas is None else tuple(canvas), raw["answer"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def right(self, text: str) -> bool:
        """Whether a reply's text has the answer behind its thoughts, up to case, spaces and a full stop."""
        return self.answer is not None and _plain(parse_reply(text).text) == _plain(self.answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()


def questions(model: Artifact, asked: str, file: Path | None, each: int) -> tuple[list[Question], dict[str, Any]]:
    """Up to `each` questions with a text and `each` others, or all of `file`'s; and the files' names and SHA-256.
    asked: the SRC. Of dgq's own files, a model without a chat template gets the texts alone. InputError names the line
    that is wrong."""
    every: list[Question] = []
    digest = hashlib.sha256()
    names = []
    for prompts in [read_prompts(file)] if file else _shipped(asked):
        digest.update(prompts.raw)
        names.append(prompts.where)
        lines = prompts.json_lines()
        if file is None and not model.tokenizer.chats:
            lines = ((at, entry) for at, entry in lines if isinstance(entry.get("text"), str))
        every += [_question(entry, at, model) for at, entry in lines]
    if not every:
        raise InputError(f"{file}: holds no prompt")
    texts = [question for question in every if question.group == "text"]
    others = [question for question in every if question.group != "text"]
    chosen = every if file else texts[:each] + others[:each]
    return chosen, {"names": names, "sha256": digest.hexdigest(), "questions": len(chosen)}


def _shipped(asked: str) -> list[PromptFile]:
    names = ("heldout_text.jsonl", "heldout_tasks.jsonl") if asked == TINY else ("validation.jsonl",)
    return [shipped_prompts(name) for name in names]


def _question(item: Any, at: str, model: Artifact) -> Question:
    if not isinstance(item, dict):
        raise InputError(f"{at}: holds a {type(item).__name__}, expected a JSON object")
    group, answer = item.get("group", item.get("task")), item.get("answer")
    if not isinstance(answer, str | None) or not isinstance(group, str | None):
        raise InputError(f"{at}: answer and group are texts")
    if isinstance(item.get("text"), str):
        return _text(item["text"], group or "text", at, model)
    messages = [{"role": "user", "content": item["prompt"]}] if "prompt" in item else item.get("messages")
    if not isinstance(messages, list) or not is_chat(messages):
        raise InputError(f'{at}: expected {{"prompt", "answer"}}, {{"messages", "answer"}} or {{"text"}}')
    prompt = _checked(model.tokenizer.chat(messages), at, model)
    canvas = None
    if answer is not None:
        whole = model.tokenizer.chat([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        canvas = _canvas(_checked(whole, at, model)[len(prompt) :], model)
    return Question(group or ("chat" if answer is None else "task"), tuple(prompt), canvas, answer)


def _text(text: str, group: str, at: str, model: Artifact) -> Question:
    """The prompt reaches past the sliding window, if the text is long enough."""
    ids, config = _known(model.tokenizer.encode(text), at, model), model.config
    prefix = min(3 * config.window // 2, len(ids) - config.canvas, config.context - config.canvas, LONGEST)
    prefix = max(SHORTEST, prefix)
    if len(ids) <= prefix:
        raise InputError(f"{at}: its text is too short, {len(ids)} tokens; {SHORTEST + 1} at least")
    return Question(group, tuple(ids[:prefix]), _canvas(ids[prefix:], model), None)


def _canvas(ids: Sequence[int], model: Artifact) -> tuple[int, ...]:
    """A whole canvas of ids, cut or filled up. Behind an end-of-sequence token there is padding only, as in
    generation."""
    end = next((i + 1 for i, token in enumerate(ids) if token in model.generation.eos_ids), len(ids))
    length = model.config.canvas
    return (*ids[:end], *[model.generation.pad_id] * length)[:length]


def _checked(ids: list[int], at: str, model: Artifact) -> list[int]:
    config = model.config
    if len(ids) > config.context - config.canvas:
        raise InputError(f"{at}: its {len(ids)} tokens leave no room for a canvas in the context of {config.context}")
    return _known(ids, at, model)


def _known(ids: list[int], at: str, model: Artifact) -> list[int]:
    if not ids:
        raise InputError(f"{at}: holds no token")
    if max(ids) >= model.config.vocab:
        raise InputError(f"{at}: its tokenizer gives token {max(ids)}, the vocabulary has {model.config.vocab}")
    return ids


def batches(count: int, canvas: int, vocab: int) -> list[range]:
    """The questions of each batch, the same for every model and however many processes there are."""
    rows = max(1, min(ROWS, BATCH_LOGITS // (canvas * vocab)))
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def canvases(questions: Sequence[Question], rows: Sequence[int], seed: int, vocab: int) -> Tensor:
    """The noised canvases (levels, rows, canvas) int64. A question's noise depends on the seed and its number only."""
    each = []
    for row in rows:
        canvas = questions[row].canvas
        assert canvas is not None
        number = int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:7], "little")
        each.append(noised(torch.tensor(canvas), LEVELS, number, vocab))
    return torch.stack(each, dim=1)


def written(questions: Sequence[Question], committed: Tensor, canvas: int) -> list[Question]:
    """The questions, where those without a canvas get the first one that the reference committed, of (questions,
    tokens) int64."""
    return [
        question if question.canvas is not None else replace(question, canvas=tuple(row[:canvas]))
        for question, row in zip(questions, committed.tolist(), strict=True)
    ]
