"""What stands before every endpoint: whose requests are taken, how large they are, and that nothing escapes as a
traceback. A plain ASGI middleware, so that a body is bounded before anything reads it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dgq.runtime.serve.errors import ApiError, internal
from dgq.runtime.serve.metrics import Meters
from dgq.runtime.serve.settings import LOOPBACK, ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")  # need no key: the page asks for it
# The page talks to its own server, loads nothing else, and is in nobody's frame.
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """The middleware."""

    def __init__(self, app: App, settings: ServeSettings, meters: Meters, paths: frozenset[str]) -> None:
        """paths: the known ones, under which requests are counted."""
        self._app, self._settings, self._meters, self._paths = app, settings, meters, paths
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SAFE]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope, headers)
            body = await self._body(scope, headers, receive) if scope["method"] == "POST" else None
            await self._app(scope, receive if body is None else _replayed(body, receive), watched)
        except ApiError as error:
            await _refuse(watched, error, scope["method"] == "POST")
        except Exception as error:
            refusal = internal(error)
            if not status:
                await _refuse(watched, refusal, True)
            else:
                raise ConnectionError("a response broke off") from None
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._meters.request(path, status)

    def _check(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> None:
        """ApiError for a request that comes from a web page elsewhere, or without a key."""
        settings = self._settings
        if settings.loopback and not self._keys:
            # A page that points its own name at 127.0.0.1 would otherwise talk to this server.
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.strip("[]").lower() not in LOOPBACK:
                raise ApiError(403, "Host: is not this machine's loopback name", "forbidden_host")
        if scope["path"] in OPEN:
            return
        if self._keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "Content-Type: must be application/json", "unsupported_media_type")

    async def _body(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self._settings.body
        too_large = ApiError(413, f"the request has more than {most:,} bytes", "request_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size, deadline = 0, asyncio.get_running_loop().time() + self._settings.read_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request took more than {self._settings.read_s:g} s", "timeout") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left", "client_left")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive() that gives the body, and then whatever comes."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _refuse(send: Send, error: ApiError, close: bool) -> None:
    """Send the error. close: the connection, since the rest of the request may still be on its way."""
    body = json.dumps(error.json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
