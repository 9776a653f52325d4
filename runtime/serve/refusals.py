"""Fields of OpenAI's interface that block denoising cannot give a meaning, or that dgq does not have.

A field that would change the answer's form or promise something is refused. A field that shapes the sampling of one
token after another is named in the answer's notes, because most chat windows send it with every request.
"""

from __future__ import annotations

from typing import Any

from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.schema import Ask, ChatAsk

ORDER = "all tokens of a canvas are denoised together, so there is no next token"
# Field -> the values that ask for nothing, and why anything else is refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": ((None, {}), ORDER + " whose logits could be biased"),
    "presence_penalty": ((None, 0), ORDER + " that could be punished for those before it"),
    "frequency_penalty": ((None, 0), ORDER + " that could be punished for those before it"),
    "repetition_penalty": ((None, 1), ORDER + " that could be punished for those before it"),
    "logprobs": ((None, False), ORDER + " whose probability given those before it could be reported"),
    "top_logprobs": ((None, 0), ORDER + " whose probability given those before it could be reported"),
    "prompt_logprobs": ((None, False), "a prompt's tokens get no probabilities here"),
    "best_of": ((None, 1), "the best answer would be chosen by log-probabilities, which there are none of; use n"),
    "use_beam_search": ((None, False), "there are no beams; use n"),
    "echo": ((None, False), "the prompt is not sent back"),
    "suffix": ((None, ""), "filling a gap is not supported"),
    "response_format": ((None, {"type": "text"}), "no grammar constrains the canvas; ask for JSON in the prompt"),
    "guided_json": ((None,), "no grammar constrains the canvas; ask for JSON in the prompt"),
    "guided_regex": ((None,), "no grammar constrains the canvas"),
    "guided_choice": ((None,), "no grammar constrains the canvas"),
    "guided_grammar": ((None,), "no grammar constrains the canvas"),
    "structured_outputs": ((None,), "no grammar constrains the canvas"),
    "functions": ((None, []), "is OpenAI's earlier form; use tools"),
    "function_call": ((None, "none"), "is OpenAI's earlier form; use tools and tool_choice"),
    "modalities": ((None, ["text"]), "answers are text"),
    "audio": ((None,), "answers are text"),
    "web_search_options": ((None,), "dgq reaches no network"),
    "min_tokens": ((None, 0), "an answer ends where the model ends it"),
    "ignore_eos": ((None, False), "an answer ends where the model ends it"),
    "continue_final_message": ((None, False), "an answer begins a turn of its own"),
    "add_generation_prompt": ((None, True), "an answer begins a turn of its own"),
}
# Field -> values that ask for nothing, and what is done instead.
NAMED: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((None, 1), "positions are accepted by their entropy"),
    "top_k": ((None, 0, -1), "positions are accepted by their entropy"),
    "min_p": ((None, 0), "positions are accepted by their entropy"),
    "parallel_tool_calls": ((None, True), "the model decides how many tools it calls"),
    "prediction": ((None,), "every canvas begins with noise"),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "store": ((None, False), "nothing is stored"),
    "verbosity": ((None, "medium"), "ask for it in the prompt"),
}
# About the caller or the bill; they ask nothing of the answer.
IDLE = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}


def noted(ask: Ask) -> list[str]:
    """Lines about fields that are not followed. ApiError for a field that is refused."""
    notes = []
    for field, value in (ask.model_extra or {}).items():
        if field in REFUSED:
            idle, reason = REFUSED[field]
            if not _among(value, idle):
                raise ApiError(400, f"{field} is not supported: {reason}", "unsupported_parameter", field)
        elif field in NAMED:
            idle, reason = NAMED[field]
            if not _among(value, idle):
                notes.append(f"{field} has no effect: {reason}")
        elif field not in IDLE and value is not None:
            notes.append(f"{field[:64]!r} is not a field that dgq knows, and has no effect")
    if isinstance(ask, ChatAsk):
        _check_choice(ask)
        if ask.reasoning_effort not in (None, "none"):
            notes.append("reasoning_effort turns thinking on; the model knows no degrees of it")
    return notes[:32]


def _among(value: Any, idle: tuple[Any, ...]) -> bool:
    return any(value == one and (isinstance(value, bool) == isinstance(one, bool)) for one in idle)


def _check_choice(ask: ChatAsk) -> None:
    if ask.tool_choice not in (None, "auto", "none"):
        reason = "the model cannot be made to call a tool; use auto or none"
        raise ApiError(400, f"tool_choice is not supported: {reason}", "unsupported_parameter", "tool_choice")
