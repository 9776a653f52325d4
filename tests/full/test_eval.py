"""`dgq eval`: the harness's tasks through the engine. The right scores come from the harness's own metrics and from
what `dgq validate` counts; refusals, stop strings and few-shot prompts are held one by one."""

import csv
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgq.convert.cli.__main__ import main
from dgq.convert.source.models import open_model
from dgq.convert.validation.evaluation import harness
from dgq.convert.validation.evaluation.evaluate import evaluate
from dgq.convert.validation.evaluation.harness import HarnessModel, load_tasks, run_tasks, stopped
from dgq.convert.validation.evaluation.options import EvaluateOptions
from dgq.convert.validation.free import free_batches, run, tokens_of
from dgq.convert.validation.questions import questions
from dgq.convert.validation.report.evaluation import EvaluationResult
from dgq.quant.errors import InputError

TASKS = files("dgq.recipes").joinpath("prompts", "heldout_tasks.jsonl").read_text("utf-8").splitlines()
COUNT = 24

ANIMALS = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 70}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.5}}
"""
ROWS = [{"question": f"Copy: {word}", "answer": word} for word in ("lamp horse", "river wall", "salt")]


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """A folder with a task of its own and its data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "animals.yaml").write_text(ANIMALS.format(data=folder / "rows.jsonl", kind="generate_until"))
    (folder / "guess.yaml").write_text(
        ANIMALS.format(data=folder / "rows.jsonl", kind="loglikelihood").replace("task: animals", "task: guess")
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    out = tmp_path_factory.mktemp("eval") / "evaluation.json"
    result = evaluate(["tiny"], EvaluateOptions(tasks=["dgq_tiny"], output=out, limit=COUNT))
    assert result is not None
    assert EvaluationResult.from_json(json.loads(out.read_text())) == result
    return result


def test_the_scores_are_those_that_validate_counts(evaluated: EvaluationResult, tmp_path: Path) -> None:
    """validate's questions, batches and free run on the same lines."""
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(TASKS[:COUNT]))
    artifact = open_model("tiny")
    asked, _ = questions(artifact, "tiny", file, 1)
    model = artifact.load("cpu")
    asked_by, right_by, steps = Counter(q.group for q in asked), Counter(), 0
    for batch in free_batches(asked, 0, artifact.config.canvas, artifact.config.vocab):
        ran = run(model, artifact.generation, asked, batch, 0, 1)
        steps += int(ran["steps"].sum())
        for row, tokens in zip(batch, tokens_of(ran["canvases"], artifact.generation), strict=True):
            right_by[asked[row].group] += asked[row].right(artifact.tokenizer.decode(tokens))
    (one,) = evaluated.models
    (task,) = one.tasks
    found = {score.metric: (round(score.value * score.samples), score.samples) for score in task.scores}
    whole = found.pop("exact_match")
    assert found == {kind: (right_by[kind], count) for kind, count in asked_by.items()}
    assert whole == (right_by.total(), COUNT)
    assert 0 < right_by.total() < COUNT, "a score that could not have been otherwise tells nothing"
    assert (task.samples, task.blocks) == (COUNT, COUNT)
    assert task.steps * COUNT == pytest.approx(steps)


def test_mean_and_standard_error_are_the_harnesss(evaluated: EvaluationResult) -> None:
    """lm_eval.api.metrics: the sample standard deviation over sqrt(n)."""
    (score,) = [score for score in evaluated.models[0].tasks[0].scores if score.metric == "exact_match"]
    share, count = score.value, score.samples
    assert score.stderr == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)


def test_what_the_harness_sends_and_gets(animals: Path) -> None:
    """Few-shot examples become turns, stop strings cut, and the metric is the harness's own exact_match."""
    seen: list[harness.HarnessPrompt] = []

    def answer(prompts: list[harness.HarnessPrompt]) -> list[str]:
        seen.extend(prompts)
        return ["lamp horse\nand more", "something else", "salt"]

    loaded = load_tasks(["animals"], [animals], shots=1)
    (score,) = run_tasks(HarnessModel(answer, "template"), loaded, None, unsafe_code=False)["animals"]
    assert (score.metric, score.value, score.samples) == ("exact_match", pytest.approx(2 / 3), 3)
    assert [prompt.number for prompt in seen] == [0, 1, 2]
    assert all(prompt.tokens == 70 and prompt.stops == ("\n",) for prompt in seen)
    for prompt, row in zip(seen, ROWS, strict=True):
        assert prompt.messages is not None
        assert [message["role"] for message in prompt.messages] == ["user", "assistant", "user"]
        assert prompt.messages[-1]["content"] == row["question"]


def test_without_a_chat_template_prompts_are_texts(animals: Path) -> None:
    seen: list[harness.HarnessPrompt] = []
    loaded = load_tasks(["animals"], [animals], shots=None)
    model = HarnessModel(lambda prompts: [seen.extend(prompts) or "" for _ in prompts], None)
    run_tasks(model, loaded, 1, unsafe_code=False)
    assert (seen[0].text, seen[0].messages) == (ROWS[0]["question"], None)


def test_a_prefilled_answer_stands_behind_the_prompt() -> None:
    """As jinja renders the template, and the tokenizer library encodes the whole text."""
    tokenizer = open_model("tiny").tokenizer
    model = HarnessModel(lambda prompts: [], "template")
    chat = json.loads(model.apply_chat_template(
        [{"role": "user", "content": "Sort: b a"}, {"role": "assistant", "content": "The"}], add_generation_prompt=False
    ))  # fmt: skip
    assert chat == {"messages": [{"role": "user", "content": "Sort: b a"}], "prefill": "The"}
    ids = tokenizer.chat(chat["messages"], prefill="The")
    assert tokenizer.decode(ids, keep_special=True) == tokenizer.render(chat["messages"]) + "The"


@pytest.mark.parametrize(
    ("text", "stops", "right"),
    [("a\nb", ["\n"], "a"), ("abc", [], "abc"), ("abc", [""], "abc"), ("x END y STOP", ["STOP", "END"], "x ")],
)
def test_stop_strings(text: str, stops: list[str], right: str) -> None:
    assert stopped(text, stops) == right


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "guess"], "task guess: compares log-likelihoods of texts"),
        (["--tasks", "animals,nothing"], "--tasks: there is no task 'nothing'"),
        (["--tasks", ","], "--tasks: name at least one task"),
        (["--tasks", "animals", "--report", "{folder}"], "{folder}/report.json: no such file"),
        (["--tasks", "animals", "-o", "{folder}"], "{folder}: exists already"),
        (["--tasks", "animals", "--max-new-tokens", "4000"], None),
        (["--tasks", "animals", "--adapter", "{folder}"], "--adapter: needs --against SRC"),
        (["--tasks", "broken"], "--tasks broken: cannot be loaded"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], line: str | None, animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(animals.parent)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(animals / "none.py"))  # whose thousands take 10 s to list
    (animals / "broken.yaml").write_text(ANIMALS.format(data="nowhere.jsonl", kind="generate_until").replace(
        "task: animals", "task: broken"
    ))  # fmt: skip
    filled = [word.format(folder=animals) for word in words]
    done = CliRunner().invoke(main, ["eval", "tiny", "--task-folder", str(animals), "--limit", "1", *filled])
    if line is None:  # more than the task's own 70 tokens is no mistake: the smaller number counts
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 2, done.output
    assert line.format(folder=animals) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("evaluation.json").exists()


def test_a_report_gets_the_scores(tiny_report: Path, animals: Path, tmp_path: Path) -> None:
    """The page, JSON and CSV of a validation, for the artifacts that it judged and for no others."""
    import shutil

    report = tmp_path / "report"
    shutil.copytree(tiny_report, report)
    options = {"tasks": ["animals"], "task_folders": [animals], "limit": 2, "against": "tiny", "report": report}
    result = evaluate(
        [str(tiny_report.parent / "gguf")], EvaluateOptions(**options, output=tmp_path / "evaluation.json")
    )
    assert result is not None and [model.reference for model in result.models] == [True, False]
    data = json.loads((report / "report.json").read_text())
    before = json.loads((tiny_report / "report.json").read_text())
    assert EvaluationResult.from_json(data.pop("evaluation")) == result
    assert data == before
    assert 'id="evaluation"' in (report / "report.html").read_text()
    rows = list(csv.DictReader((report / "evaluation.csv").open()))
    assert [(row["model"], row["task"], row["metric"]) for row in rows] == [
        ("tiny", "animals", "exact_match"), ("gguf", "animals", "exact_match"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="does not judge the files of other"):
        shutil.copytree(tiny_report.parent / "nvfp4", other := tmp_path / "other")
        text = (other / "dgq.json").read_text()
        (other / "dgq.json").write_text(text + " ")
        evaluate([str(other)], EvaluateOptions(**options, output=tmp_path / "second.json"))
