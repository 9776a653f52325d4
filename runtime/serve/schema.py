"""The fields of requests that dgq knows. Every other field is kept as an extra one, and refused or named: see
refusals.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 16
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Message(_Fields):
    """One message of a chat. content: a text, or parts with a "type": text or image_url."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(_Fields):
    """The definition of a tool. parameters: a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Fields):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class DgqOptions(BaseModel):
    """dgq's own fields. drafts: stream the canvas after every step. steps: denoising steps a canvas at most."""

    model_config = ConfigDict(extra="forbid", strict=True)
    drafts: bool = False
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None


class TemplateOptions(BaseModel):
    """Switches of the chat template, as vLLM names them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    enable_thinking: bool | None = None


class StreamOptions(_Fields):
    """include_usage: a last event with the numbers of tokens."""

    include_usage: bool = False


class Ask(_Fields):
    """What both kinds of request have in common."""

    model: Annotated[str, Field(max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    max_tokens: Count | None = None
    stop: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    dgq: DgqOptions | None = None


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None


class TextAsk(Ask):
    """POST /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=64)]
    )
