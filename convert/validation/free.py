"""Free running: the same prompts and random numbers, each model with its own sampler's settings, from noise to text.

questions ── free_batches ──> rows of a batch ── run ──> canvases, steps, seconds ── scores.free ──> FreeResult
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from dgq.convert.resume.work import UnitResult
from dgq.convert.validation.questions import BATCH_LOGITS, Question
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.model.model import Model
from dgq.runtime.shape.settings import GenerationConfig

ROWS = 8  # of a batch, which waits for its slowest row


def free_batches(questions: Sequence[Question], texts: int, canvas: int, vocab: int) -> list[list[int]]:
    """The numbers of the questions of each batch: the first `texts` texts to be continued, and all others. The two
    kinds are not mixed, since a batch waits for its slowest row."""
    rows = max(1, min(ROWS, BATCH_LOGITS // (canvas * vocab)))
    continued = [i for i, question in enumerate(questions) if question.group == "text"][:texts]
    others = [i for i, question in enumerate(questions) if question.group != "text"]
    return [kind[i : i + rows] for kind in (continued, others) for i in range(0, len(kind), rows)]


def run(
    model: Model, generation: GenerationConfig, questions: Sequence[Question], rows: Sequence[int], seed: int,
    blocks: int,
) -> UnitResult:  # fmt: skip
    """Answer a batch with `blocks` canvases a question. rows: the numbers of the questions and of their random streams.

    "canvases" int64 (rows, tokens) as committed; "steps" int64 (rows, blocks), -1 where the answer had ended;
    "seconds".
    """
    prompts = [questions[row].prompt for row in rows]
    tokens = blocks * model.config.canvas
    began = time.perf_counter()
    result = generate(model, Request(prompts, generation, tokens, seed, rows=rows))
    seconds = time.perf_counter() - began
    steps = torch.full((len(rows), blocks), -1)
    for row, took in enumerate(result.steps):
        steps[row, : len(took)] = torch.tensor(took)
    committed = torch.full((len(rows), tokens), generation.pad_id)
    committed[:, : result.canvases.shape[1]] = result.canvases
    return {"canvases": committed, "steps": steps, "seconds": torch.tensor(seconds, dtype=torch.float64)}


def agreement(a: Tensor, b: Tensor, pad: int) -> Tensor:
    """The share (n,) of equal tokens in two canvases (n, tokens), where not both have ended; 1 where both are empty."""
    counted = (a != pad) | (b != pad)
    return ((a == b) & counted).sum(-1) / counted.sum(-1).clamp(min=1) + (~counted.any(-1)).float()


def tokens_of(canvases: Tensor, generation: GenerationConfig) -> list[list[int]]:
    """The tokens of each row of canvases (n, tokens) up to the first end-of-sequence token."""
    answers = []
    for row in canvases.tolist():
        end = next((i for i, token in enumerate(row) if token in generation.eos_ids), len(row))
        answers.append(row[:end])
    return answers
