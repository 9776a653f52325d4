"""From a request's fields to the rows that answer it: prompt, tokens, sampler, seed.

max_tokens, max_completion_tokens    the most tokens, of whole canvases; what the context leaves if it is not given
seed                                 of `dgq run --seed`, 0 if it is not given; choice i is the seed's row i
temperature                          a factor of the sampler's temperatures; 1 and 0 leave them as they are
stop                                 the answer is cut there, and denoised no further than that block
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from dgq.quant.errors import InputError
from dgq.runtime.engine.turns import common
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.images import placed
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.messages import templated
from dgq.runtime.serve.pictures import Pictures
from dgq.runtime.serve.refusals import noted
from dgq.runtime.serve.rows import Prompt, RowRequest
from dgq.runtime.serve.schema import Ask, ChatAsk, TextAsk
from dgq.runtime.serve.settings import ServeSettings
from dgq.runtime.shape.settings import SamplerConfig

_DECODING = Lock()  # images are decoded one after the other, which bounds their memory


@dataclass(frozen=True)
class Asked:
    """What a request comes to: its rows, choice after choice, and lines about what was not followed."""

    rows: list[RowRequest]
    notes: list[str]
    seed: int


def asked(ask: Ask, artifact: Artifact, settings: ServeSettings) -> Asked:
    """The rows of a request. ApiError and InputError for what cannot be answered."""
    notes = noted(ask)
    if ask.dgq is not None and ask.dgq.drafts and not ask.stream:
        raise ApiError(400, "dgq.drafts: drafts are events of a stream; set stream", "invalid_value", "dgq.drafts")
    if ask.model != settings.name:
        raise ApiError(404, f"model: this server has {settings.name}", "model_not_found", "model")
    deadline = time.monotonic() + settings.max_seconds
    if isinstance(ask, ChatAsk):
        prompts = [_chat(ask, artifact, settings)]
    else:
        assert isinstance(ask, TextAsk)
        prompts = [_text(prompt, artifact) for prompt in _prompts(ask)]
    sampler = _sampler(ask, artifact.generation.sampler, notes)
    stops = (ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop or ())
    seed, drafts = ask.seed or 0, ask.dgq is not None and ask.dgq.drafts
    rows = [
        RowRequest(prompt, seed, number, _wanted(ask, prompt, artifact, settings), sampler, stops, deadline, drafts)
        for prompt in prompts
        for number in range(ask.n or 1)
    ]
    most = settings.max_waiting + settings.rows
    if len(rows) > most:
        raise ApiError(400, f"{len(rows)} answers in one request; this server takes {most}", "too_many", "n")
    return Asked(rows, notes, seed)


def _chat(ask: ChatAsk, artifact: Artifact, settings: ServeSettings) -> Prompt:
    tokenizer = _tokenizer(ask, artifact.tokenizer)
    pictures = Pictures(settings)
    messages = templated(ask.messages, pictures)
    plain, images, front = placed(tokenizer, messages)
    bare: list[int] = []
    if ask.messages[-1].role in ("user", "tool"):  # else the template may refuse to end there
        bare = tokenizer.chat(messages, add_generation_prompt=False)
    prompt = Prompt(plain, common(plain, bare), True, front=front)
    return _seen(prompt, images, pictures.tokens, artifact) if images else prompt


def _tokenizer(ask: ChatAsk, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer whose template has the request's tools and switches. InputError for a template without them."""
    switch = None if ask.chat_template_kwargs is None else ask.chat_template_kwargs.enable_thinking
    if switch is None and ask.reasoning_effort is not None:
        switch = ask.reasoning_effort != "none"
    tokenizer = tokenizer.thinking(switch)
    if not ask.tools or ask.tool_choice == "none":
        return tokenizer
    return tokenizer.with_tools([tool.model_dump(exclude_none=True) for tool in ask.tools])


def _seen(prompt: Prompt, images: Sequence[Any], tokens: Sequence[int | None], artifact: Artifact) -> Prompt:
    """The prompt with its images cut into patches. tokens: the most that each image becomes."""
    vision = artifact.vision
    with _DECODING:
        patches = [vision.with_tokens(n).patches(image) for image, n in zip(images, tokens, strict=True)]
    return replace(prompt, patches=patches, image=vision.tokens.image)


def _prompts(ask: TextAsk) -> list[str | list[int]]:
    prompt: Any = ask.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _text(prompt: str | list[int], artifact: Artifact) -> Prompt:
    ids, _, _ = placed(artifact.tokenizer, prompt)
    vocab = artifact.config.vocab
    if not ids:
        raise ApiError(400, "prompt: is empty", "invalid_value", "prompt")
    if worst := [token for token in ids if not 0 <= token < vocab]:
        raise ApiError(400, f"prompt: token {worst[0]} is outside the vocabulary of {vocab}", "invalid_value", "prompt")
    return Prompt(ids)


def _wanted(ask: Ask, prompt: Prompt, artifact: Artifact, settings: ServeSettings) -> int:
    """The most tokens of an answer. ApiError if they do not fit the context together with the prompt."""
    given = ask.max_completion_tokens if isinstance(ask, ChatAsk) and ask.max_completion_tokens else ask.max_tokens
    canvas = artifact.config.canvas
    room = (settings.context - prompt.length) // canvas * canvas
    if room < (canvas if given is None else given):
        wanted = canvas if given is None else -(-given // canvas) * canvas
        message = (
            f"the prompt's {prompt.length} tokens and {wanted} new ones (whole canvases of {canvas}) exceed the context"
            f" of {settings.context}"
        )
        raise ApiError(400, message, "context_length_exceeded", "messages" if isinstance(ask, ChatAsk) else "prompt")
    return min(room, settings.max_tokens) if given is None else given


def _sampler(ask: Ask, sampler: SamplerConfig, notes: list[str]) -> SamplerConfig:
    if ask.dgq is not None and ask.dgq.steps is not None:
        sampler = replace(sampler, steps=ask.dgq.steps)
    factor = ask.temperature
    if factor == 0:
        notes.append(
            "temperature 0 leaves the sampler's temperatures as they are: each position's likeliest token is committed,"
            " and the same seed gives the same text"
        )
    elif factor is not None and factor != 1:
        sampler = replace(sampler, t_min=sampler.t_min * factor, t_max=sampler.t_max * factor)
        notes.append(f"temperature {factor:g} makes the sampler's temperatures {sampler.t_max:g} to {sampler.t_min:g}")
    if not sampler.t_min < sampler.t_max:
        raise InputError(f"temperature {factor}: is too small")
    return sampler
