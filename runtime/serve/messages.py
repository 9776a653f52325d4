"""OpenAI's messages as the checkpoint's chat template takes them.

developer                                            system
content: [{"type": "image_url", …}, {"type": "text"}]   the same parts, the image apart
tool_calls, whose arguments are a string of JSON     the same, the arguments an object
role tool, tool_call_id                              the same, with the function's name
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dgq.runtime.files.images import MARKER
from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.pictures import Pictures
from dgq.runtime.serve.schema import Message


def templated(messages: Sequence[Message], pictures: Pictures) -> list[dict[str, Any]]:
    """The messages for Tokenizer.chat() and images.placed(). ApiError for parts that no model here takes."""
    calls: dict[str, str] = {}
    result = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = "system" if message.role == "developer" else message.role
        one: dict[str, Any] = {"role": role, "content": _content(message, where, pictures)}
        if message.reasoning_content:
            one["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            one["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
            calls |= {call["id"]: call["function"]["name"] for call in one["tool_calls"] if call["id"]}
        if role == "tool":
            one["tool_call_id"] = message.tool_call_id or ""
            one["name"] = message.name or calls.get(one["tool_call_id"], "unknown")
        result.append(one)
    return result


def _content(message: Message, where: str, pictures: Pictures) -> str | list[dict[str, Any]]:
    if message.content is None:
        if message.role not in ("assistant",):
            raise ApiError(400, f"{where}.content is missing", "invalid_value", f"{where}.content")
        return ""
    if isinstance(message.content, str):
        return _text(message.content, f"{where}.content")
    parts = [_part(part, f"{where}.content[{i}]", pictures) for i, part in enumerate(message.content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: dict[str, Any], where: str, pictures: Pictures) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _text(part["text"], f"{where}.text")}
    if kind == "image_url":
        given = part.get("image_url")
        url, detail = (given.get("url"), given.get("detail")) if isinstance(given, dict) else (given, None)
        if isinstance(url, str):
            return {"type": "image", "image": pictures.open(url, f"{where}.image_url", detail)}
    if kind in ("text", "image_url"):
        raise ApiError(400, f"{where}: a part of type {kind} has no {kind}", "invalid_value", where)
    raise ApiError(400, f"{where}: parts may have the types text and image_url", "invalid_value", where)


def _text(text: str, where: str) -> str:
    if MARKER in text:
        raise ApiError(400, f"{where} says {MARKER}; send the image as a part of the message", "invalid_value", where)
    return text


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise ApiError(400, f"{where} has no function with a name", "invalid_value", where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{where}.function.arguments is no JSON object", "invalid_value", where)
    name_of = call.get("id")
    return {
        "id": name_of if isinstance(name_of, str) else "",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
