"""The data and the scoring of dgq_tiny.yaml: `tiny`'s questions, right where `dgq validate` calls them right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).resolve().parent.parent / "prompts" / "heldout_tasks.jsonl"


def load(**_: Any) -> dict[str, Any]:
    """The questions as the harness's dataset: {"test": rows of "messages", "answer", "task"}."""
    from datasets import Dataset

    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer is right up to case, spaces and a full stop; once for all kinds, once for the question's."""
    right = float(_plain(results[0]) == _plain(doc["answer"]))
    return {"exact_match": right, doc["task"]: right}


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()
