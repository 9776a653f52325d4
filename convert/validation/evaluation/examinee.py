"""One model that the harness examines: prompts become token ids, batches of canvases, texts, and what they cost.

    HarnessPrompts of a task ── batches of ROWS ── free.run (a unit of work each, kept in its file) ── texts, TaskCost

A prompt's random numbers depend on the seed and on its place in its task, so that neither the batches nor the other
tasks change an answer.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from dgq.convert.resume.work import UnitResult, Work
from dgq.convert.validation.evaluation.harness import HarnessPrompt
from dgq.convert.validation.evaluation.options import EvaluateOptions
from dgq.convert.validation.free import ROWS, run, tokens_of
from dgq.convert.validation.questions import BATCH_LOGITS, Question
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model


@dataclass
class TaskCost:
    """What a task's answers took; see report.evaluation.TaskEvaluation."""

    samples: int = 0
    blocks: int = 0
    steps: int = 0
    unsettled: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: TaskCost) -> TaskCost:
        return TaskCost(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass
class Examinee:
    """A model to be examined, loaded when it is first needed. costs: of each task that was answered."""

    name: str
    artifact: Artifact
    options: EvaluateOptions
    work: Work
    costs: dict[str, TaskCost] = field(default_factory=dict)
    _model: Model | None = None

    def __post_init__(self) -> None:
        self._tokenizer = self.artifact.tokenizer.thinking(self.options.thinking)
        generation = self.artifact.generation
        if self.options.steps is not None:
            generation = replace(generation, sampler=replace(generation.sampler, steps=self.options.steps))
        self._generation = generation

    def answer(self, prompts: Sequence[HarnessPrompt]) -> list[str]:
        """The texts of a task's answers. InputError names a prompt that is too long for the context."""
        task = prompts[0].task
        cost = self.costs.setdefault(task, TaskCost())
        questions = [self._question(prompt) for prompt in prompts]
        batches = self._batches(prompts)
        ran = self.work.each(
            f"{self.name}-{task}", len(batches), lambda unit: self._run(prompts, questions, batches[unit])
        )
        texts = []
        for unit, batch in enumerate(batches):
            result = ran(unit)
            cost.seconds += float(result["seconds"])
            for row, canvases, steps in zip(batch, result["canvases"], result["steps"].tolist(), strict=True):
                texts.append(self._text(canvases, self._wanted(prompts[row]), cost))
                took = [count for count in steps if count >= 0]
                cost.samples += 1
                cost.blocks += len(took)
                cost.steps += sum(took)
                cost.unsettled += sum(count >= self._generation.sampler.steps for count in took)
        return texts

    def drop(self) -> None:
        """Free the model's memory now: a model and its session hold each other."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _wanted(self, prompt: HarnessPrompt) -> int:
        """The most tokens of the answer."""
        asked = [count for count in (prompt.tokens, self.options.max_new_tokens) if count is not None]
        return min(asked, default=self._generation.max_new_tokens)

    def _blocks(self, prompt: HarnessPrompt) -> int:
        return -(-self._wanted(prompt) // self.artifact.config.canvas)

    def _batches(self, prompts: Sequence[HarnessPrompt]) -> list[list[int]]:
        """The places of each batch's prompts, neighbours that want equally many canvases."""
        config = self.artifact.config
        rows = max(1, min(ROWS, BATCH_LOGITS // (config.canvas * config.vocab)))
        alike = [list(same) for _, same in groupby(range(len(prompts)), key=lambda i: self._blocks(prompts[i]))]
        return [same[i : i + rows] for same in alike for i in range(0, len(same), rows)]

    def _question(self, prompt: HarnessPrompt) -> Question:
        tokenizer, config = self._tokenizer, self.artifact.config
        if prompt.messages is None:
            ids = tokenizer.encode(prompt.text)
        else:
            ids = tokenizer.chat(prompt.messages, prefill=prompt.prefill)
        room = config.context - self._blocks(prompt) * config.canvas
        if not 0 < len(ids) <= room:
            raise InputError(
                f"task {prompt.task}: prompt {prompt.number} has {len(ids)} tokens, and {room} fit into the context of"
                f" {config.context} beside the answer; take fewer --shots or --max-new-tokens"
            )
        return Question(prompt.task, tuple(ids), None, None)

    def _run(self, prompts: Sequence[HarnessPrompt], questions: Sequence[Question], batch: Sequence[int]) -> UnitResult:
        return run(
            self._loaded(), self._generation, questions, batch, self.options.seed, self._blocks(prompts[batch[0]])
        )

    def _loaded(self) -> Model:
        if self._model is None:
            device, dtype = self.options.placement()
            self._model = self.artifact.load(device, dtype, vram=self.options.vram)
        return self._model

    def _text(self, canvases: Tensor, wanted: int, cost: TaskCost) -> str:
        tokens = tokens_of(canvases[None], self._generation)[0][:wanted]
        cost.tokens += len(tokens)
        return self._tokenizer.reply(tokens)[0] if self._tokenizer.chats else self._tokenizer.decode(tokens)
