"""Questions that `dgq validate` asks: the shipped ones, anyone's, and what counts as their answer."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from dgq.convert.source.models import open_model
from dgq.convert.validation.questions import LEVELS, Question, batches, canvases, questions, written
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    return open_model("tiny")


def test_tinys_own(tiny: Artifact) -> None:
    found, about = questions(tiny, "tiny", None, 12)
    assert [question.group for question in found[:12]] == ["text"] * 12 and about["questions"] == 24
    text = found[0]
    assert len(text.prompt) == 96 and text.canvas is not None and len(text.canvas) == 64
    whole = tiny.tokenizer.encode(json.loads(shipped("heldout_text.jsonl")[0])["text"])
    assert [*text.prompt, *text.canvas] == whole[:160]
    task = found[12]
    assert task.canvas is not None and task.answer is not None
    said = task.canvas[: task.canvas.index(tiny.tokenizer.token_id("<turn|>"))]
    assert tiny.tokenizer.decode(list(said)).strip() == task.answer and set(task.canvas[len(said) + 1 :]) == {0}


def shipped(name: str) -> list[str]:
    return files("dgq.recipes").joinpath("prompts", name).read_text("utf-8").splitlines()


def test_every_other_model_gets_general_ones(tiny: Artifact, tmp_path: Path) -> None:
    shutil.copytree(str(files("dgq.recipes").joinpath("tiny")), tmp_path / "tuned")
    found, about = questions(tiny, str(tmp_path / "tuned"), None, 100)
    assert about["names"] == ["validation.jsonl"] and len(found) == len(shipped("validation.jsonl")) == 56
    assert sum(question.answer is not None for question in found) == 39
    assert sum(question.canvas is None for question in found) == 12, "which the reference writes"
    few, _ = questions(tiny, str(tmp_path / "tuned"), None, 12)
    assert len({question.group for question in few}) >= 6, "any prefix is diverse"
    trained = {line for name in ("general.jsonl", "calibration.jsonl") for line in shipped(name)}
    assert not trained & set(shipped("validation.jsonl"))


def test_answers(tiny: Artifact) -> None:
    question = Question("task", (1,), None, "red  Green blue")
    assert question.right("Red green blue.") and question.right("  red green\nblue ")
    assert not question.right("red blue green") and not question.right("") and not question.right("red green blue!")


def test_what_the_reference_writes_becomes_the_canvas() -> None:
    asked = [Question("chat", (1,), None, None), Question("task", (1,), (5, 6), "x")]
    done = written(asked, torch.tensor([[7, 8, 9, 9], [1, 1, 1, 1]]), 2)
    assert done[0].canvas == (7, 8) and done[1] is asked[1]
    assert [Question.from_json(json.loads(json.dumps(question.to_json()))) for question in done] == done


def test_noise_depends_on_the_seed_and_the_question_alone(tiny: Artifact) -> None:
    found, _ = questions(tiny, "tiny", None, 4)
    whole = canvases(found, range(8), 3, 2048)
    assert whole.shape == (len(LEVELS), 8, 64)
    assert torch.equal(canvases(found, [5, 2], 3, 2048), whole[:, [5, 2]])
    assert not torch.equal(canvases(found, range(8), 4, 2048), whole)


def test_batches_are_bounded_by_their_logits() -> None:
    assert [len(rows) for rows in batches(40, 64, 2048)] == [16, 16, 8]
    assert [len(rows) for rows in batches(3, 256, 262144)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: holds a list"),
        ('{"prompt": "x", "answer": 3}', "answer and group are texts"),
        ('{"messages": []}', 'expected {"prompt", "answer"}'),
        ('{"prompt": 3}', 'expected {"prompt", "answer"}'),
        ('{"text": "a"}', "its text is too short"),
        ('{"prompt": "' + "long " * 3000 + '"}', "leave no room for a canvas in the context of 2048"),
        ("", "holds no prompt"),
    ],
)
def test_bad_lines_are_named(tiny: Artifact, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(InputError) as error:
        questions(tiny, "tiny", tmp_path / "prompts.jsonl", 1)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


def test_lines_as_programs_write_them(tiny: Artifact, tmp_path: Path) -> None:
    """A byte order mark, Windows' ends of lines, and those that a string in JSON may hold."""
    items = [{"prompt": "say\u2028wind\x85", "answer": "wind"}, {"prompt": "say king", "answer": "king"}]
    text = "\ufeff" + "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\r\n"
    (tmp_path / "p.jsonl").write_bytes(text.encode())
    found, _ = questions(tiny, "tiny", tmp_path / "p.jsonl", 1)
    assert [question.answer for question in found] == ["wind", "king"]
