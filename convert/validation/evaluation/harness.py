"""lm-evaluation-harness and the engine: a model that the harness can ask, and the tasks that it asks.

    tasks' prompts ── HarnessModel.generate_until ── answer(prompts, numbers, tokens) ──> texts ── the harness's scores
                                                          │
                                                     TaskCost: blocks, steps, unsettled blocks, seconds

Block denoising writes whole canvases, so that a stop string cuts the finished text, and the length asked for is rounded
up to canvases and then cut. It knows no log-likelihood of a text, so that tasks that need one are refused by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dgq.convert.validation.report.evaluation import Score
from dgq.quant.errors import InputError

try:
    from lm_eval.api.model import LM as _LM
except ImportError:
    raise InputError("dgq eval: needs lm-evaluation-harness: pip install 'dgq[eval]'") from None

Loaded = dict[str, Any]  # what TaskManager.load() gives: "tasks" by name, "groups", "group_map"
FEWSHOT_SEED = 1234  # the harness's own default
BOOTSTRAPS = 1000  # draws for the standard error of a metric that is no mean
UNSCORED = ("name", "alias", "sample_len", "samples", "sample_count")


@dataclass(frozen=True)
class HarnessPrompt:
    """A prompt of a task. number: its place among the task's prompts, which fixes its random numbers; tokens: the most
    that the task wants written, None for the model's own limit."""

    task: str
    number: int
    text: str
    messages: tuple[Mapping[str, Any], ...] | None
    prefill: str
    stops: tuple[str, ...]
    tokens: int | None


Answer = Callable[[Sequence[HarnessPrompt]], list[str]]
"""Answers the prompts of one task, in their order, stop strings not yet cut."""


class HarnessModel(_LM):  # type: ignore[misc]
    """What the harness calls a model. answer: gives the texts; template: the chat template's text, None without one."""

    tokenizer_name = "the checkpoint's own"

    def __init__(self, answer: Answer, template: str | None) -> None:
        super().__init__()
        self._answer, self._template = answer, template

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to the harness's requests, whose args are the prompt and its settings."""
        by_task: dict[str, list[tuple[int, HarnessPrompt]]] = {}
        for place, request in enumerate(requests):
            prompts = by_task.setdefault(request.task_name, [])
            prompts.append((place, self._prompt(request, len(prompts))))
        texts = [""] * len(requests)
        for numbered in by_task.values():
            answers = self._answer([prompt for _, prompt in numbered])
            for (place, prompt), text in zip(numbered, answers, strict=True):
                texts[place] = stopped(text, prompt.stops)
        return texts

    def _prompt(self, request: Any, number: int) -> HarnessPrompt:
        text, settings = request.args
        stops = settings.get("until") or []
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        wanted = next(
            (settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in settings), None
        )
        task = str(request.task_name)
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise InputError(f"task {task}: its max_gen_toks is {wanted!r}, expected a number of tokens")
        if self._template is None:
            return HarnessPrompt(task, number, text, None, "", stops, wanted)
        chat = json.loads(text)
        return HarnessPrompt(task, number, "", tuple(chat["messages"]), chat["prefill"], stops, wanted)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON, from which generate_until() makes token ids. Without add_generation_prompt the last
        message is the answer's beginning."""
        prefill = "" if add_generation_prompt else str(chat_history[-1]["content"])
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        return json.dumps({"messages": messages, "prefill": prefill}, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, by which the harness names its caches."""
        return self._template or ""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: see check_tasks()."""
        raise InputError(_refusal(str(requests[0].task_name)))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refused: see check_tasks()."""
        raise InputError(_refusal(str(requests[0].task_name)))


def stopped(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _refusal(task: str) -> str:
    return (
        f"task {task}: compares log-likelihoods of texts, which a model that denoises blocks does not have;"
        " take a task that generates (output_type generate_until)"
    )


def harness_version() -> str:
    """The version of lm_eval that is installed."""
    return version("lm_eval")


def load_tasks(names: Sequence[str], folders: Sequence[Path], shots: int | None) -> Loaded:
    """The tasks and groups of these names, from the harness's own and from folders of YAML files.

    shots: worked examples before each prompt, None for each task's own number. InputError for a name that nothing has,
    for a task whose data cannot be had, and for one that needs log-likelihoods.
    """
    from lm_eval.tasks import TaskManager

    with quiet():
        paths = [str(folder) for folder in folders]
        manager = TaskManager(include_path=paths, include_defaults=False)
        if any(name not in manager.all_tasks for name in names):  # The harness's own are thousands of files.
            manager = TaskManager(include_path=paths)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise InputError(
                f"--tasks: there is no task {unknown[0]!r}; `lm-eval ls tasks` lists the harness's, and --task-folder"
                " names a folder of your own YAML files"
            )
        try:
            loaded: Loaded = manager.load(list(names))
        except Exception as error:  # A task is somebody's YAML and program, and its data may lie on the network.
            raise InputError(f"--tasks {','.join(names)}: cannot be loaded ({_words(error)})") from None
    for name, task in loaded["tasks"].items():
        if task.get_config("output_type") != "generate_until":
            raise InputError(_refusal(name))
        usual = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(usual or 0) if shots is None or usual == 0 else shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def run_tasks(model: HarnessModel, loaded: Loaded, limit: int | None, unsafe_code: bool) -> dict[str, list[Score]]:
    """Task or group -> its scores. limit: prompts of a task at most. unsafe_code: whether tasks may run what the model
    wrote. InputError for a task that fails."""
    from lm_eval.evaluator import evaluate

    chats = model.chat_template() != ""
    with quiet():
        try:
            outcome = evaluate(
                model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True, apply_chat_template=chats,
                fewshot_as_multiturn=chats, confirm_run_unsafe_code=unsafe_code,
            )  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # A task's own functions ran.
            raise InputError(f"the harness ended with {_words(error)}") from error
    assert outcome is not None
    results = dict(outcome["results"]) | dict(outcome.get("groups") or {})
    return {name: _scores(name, values, outcome) for name, values in results.items()}


def _scores(name: str, values: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[Score]:
    """The scores of one task: "metric,filter" -> value, beside "metric_stderr,filter"."""
    scores = []
    for key, value in values.items():
        metric, _, kept = key.partition(",")
        if key in UNSCORED or metric.endswith("_stderr") or isinstance(value, str) or not kept:
            continue
        stderr = values.get(f"{metric}_stderr,{kept}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        scores.append(Score(metric, kept, float(value), stderr, _count(name, metric, kept, outcome)))
    return scores


def _count(name: str, metric: str, kept: str, outcome: Mapping[str, Any]) -> int:
    """How many answers have this metric; of a group, of all its tasks."""
    tasks = outcome["samples"].keys() if name not in outcome["samples"] else [name]
    children = [task for task in tasks if task == name or task in (outcome.get("group_subtasks") or {}).get(name, ())]
    return sum(
        1 for task in children for sample in outcome["samples"][task] if metric in sample and sample["filter"] == kept
    )


def _words(error: Exception) -> str:
    """An error of somebody's code as part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness and its libraries from writing: dgq's commands say what they do themselves."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    import lm_eval.api.task as task_module

    bar = task_module.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        task_module.tqdm = lambda iterable, **_: iterable
        yield
    finally:
        task_module.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
