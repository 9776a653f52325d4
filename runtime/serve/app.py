"""The endpoints. A request's rows go to the worker's thread, and its events come back into the event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.serve.asking import asked
from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.guard import Guard
from dgq.runtime.serve.metrics import Meters
from dgq.runtime.serve.responses import Answer, Sent
from dgq.runtime.serve.rows import Draft, Event, Progress, Row
from dgq.runtime.serve.schema import Ask, ChatAsk, TextAsk
from dgq.runtime.serve.settings import ServeSettings
from dgq.runtime.serve.worker import Worker

KEEP_ALIVE_S = 15.0  # a stream that has nothing to say yet sends a comment so often
MOST_DRAFTS = 32  # events that wait for a slow reader; drafts beyond are left out
REFS = "#/components/schemas/{model}"
AskT = TypeVar("AskT", bound=Ask)


@dataclass(frozen=True)
class Served:
    """What the endpoints work with."""

    artifact: Artifact
    settings: ServeSettings
    worker: Worker
    meters: Meters
    started: int


class Job:
    """The rows of one request, and the events that they tell of."""

    def __init__(self, served: Served, answer: Answer) -> None:
        self._served, self.answer = served, answer
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        artifact = served.artifact
        self._rows = [
            Row(request, artifact.tokenizer, artifact.generation, self._teller(index))
            for index, request in enumerate(answer.asked.rows)
        ]
        self.choices: list[Progress] = [Progress()] * len(self._rows)
        self._first = True
        served.worker.submit(self._rows)

    def _teller(self, index: int) -> Any:
        def tell(event: Event) -> None:
            if not isinstance(event, Draft) or self._events.qsize() < MOST_DRAFTS:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return tell

    @property
    def open(self) -> bool:
        """Whether a choice is not finished."""
        return any(one.finish is None for one in self.choices)

    async def next(self, seconds: float) -> tuple[int, Event] | None:
        """The next event; None after so many seconds. Raises what ended a row, and ApiError 503 at the deadline of rows
        that no batch took."""
        deadline = self._rows[0].request.deadline
        try:
            async with asyncio.timeout(
                max(0.0, min(seconds, deadline - time.monotonic()) if self._unbegun else seconds)
            ):
                index, event = await self._events.get()
        except TimeoutError:
            if self._unbegun and time.monotonic() >= deadline:
                raise ApiError(503, "no batch took the request within the time limit", "timeout", retry=10) from None
            return None
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Progress):
            self._note(index, event)
        return index, event

    def _note(self, index: int, event: Progress) -> None:
        self.choices[index] = event
        seconds = time.monotonic() - self.answer.began
        if self._first:
            self._first = False
            self._served.meters.first_block(seconds)
        if event.finish is not None:
            prompt = self._rows[index].request.prompt.length
            self._served.meters.answer(seconds, prompt, event.cached, event.tokens)

    @property
    def _unbegun(self) -> bool:
        return not all(row.begun for row in self._rows)

    def leave(self) -> None:
        """Let the rows leave their batch: nobody waits for them."""
        for row in self._rows:
            row.gone = True


def make_app(served: Served) -> Any:
    """The ASGI application."""
    api = FastAPI(title="dgq serve", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    limit = anyio.CapacityLimiter(2)  # of requests whose prompts are being made
    _plain_endpoints(api, served)

    async def respond(request: Request, kind: type[Ask]) -> Response:
        ask = _parsed(await request.body(), kind)
        work = anyio.to_thread.run_sync(asked, ask, served.artifact, served.settings, limiter=limit)
        job = Job(served, Answer(await work, served.settings.name, kind is ChatAsk))
        if ask.stream:
            with_usage = ask.stream_options is not None and ask.stream_options.include_usage
            return StreamingResponse(
                _stream(job, with_usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return await _whole(job, request)

    @api.post("/v1/chat/completions", openapi_extra=_body_of(ChatAsk), responses=REFUSALS)
    async def chat(request: Request) -> Response:
        """The answer to messages."""
        return await respond(request, ChatAsk)

    @api.post("/v1/completions", openapi_extra=_body_of(TextAsk), responses=REFUSALS)
    async def text(request: Request) -> Response:
        """The continuation of a text."""
        return await respond(request, TextAsk)

    _errors(api, served.settings.name)
    paths = frozenset(getattr(route, "path", "") for route in api.routes)
    return Guard(api, served.settings, served.meters, paths)


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": words}
    for status, words in (
        (400, "not a request that can be answered"), (401, "no key"), (403, "another Host"), (404, "no such model"),
        (408, "too slow"), (413, "too large"), (415, "not JSON"), (429, "too many wait"),
        (503, "stopping, or too late"),
    )
}  # fmt: skip


def _plain_endpoints(api: FastAPI, served: Served) -> None:
    model = _model(served)
    page = files("dgq.runtime.serve").joinpath("page.html").read_text(encoding="utf-8")

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    @api.get("/health", responses={503: REFUSALS[503]})
    async def health() -> JSONResponse:
        """Whether requests are taken."""
        alive = served.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @api.get("/metrics", responses={key: REFUSALS[key] for key in (401, 403)})
    async def metrics() -> Response:
        """The numbers for Prometheus."""
        return Response(served.meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/v1/models", responses={key: REFUSALS[key] for key in (401, 403)})
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{name:path}", responses={key: REFUSALS[key] for key in (401, 403, 404)})
    async def one_model(name: str) -> dict[str, Any]:
        """The model by its name."""
        if name != model["id"]:
            raise ApiError(404, f"this server has {model['id']}", "model_not_found", "model")
        return model

    @api.post("/v1/embeddings", responses=REFUSALS)
    async def embeddings() -> Response:
        """Refused: a model that denoises blocks gives no embeddings of texts."""
        raise ApiError(400, "this model gives no embeddings of texts; use one that is made for them", "unsupported")


def _model(served: Served) -> dict[str, Any]:
    artifact, settings = served.artifact, served.settings
    return {
        "id": settings.name,
        "object": "model",
        "created": served.started,
        "owned_by": "dgq",
        "max_model_len": settings.context,
        "dgq": {"format": artifact.kind, "canvas": artifact.config.canvas, "steps": artifact.generation.sampler.steps},
    }


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"


def _errors(api: FastAPI, name: str) -> None:
    """The form of refusals, and the description of the interface. name: the model's."""

    @api.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.json(), error.status, error.headers)

    @api.exception_handler(InputError)
    async def unusable(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(400, str(error), "invalid_value").json(), 400)

    @api.exception_handler(HTTPException)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        words = {404: "no such path; /openapi.json lists them", 405: "another method is needed here"}
        refusal = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
        return JSONResponse(refusal.json(), error.status_code, error.headers)

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = FastAPI.openapi(api)
            _, models = models_json_schema([(ChatAsk, "validation"), (TextAsk, "validation")], ref_template=REFS)
            for kind in (ChatAsk, TextAsk):
                models["$defs"][kind.__name__]["properties"]["model"] = {"type": "string", "enum": [name]}
            schema.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _body_of(kind: type[Ask]) -> dict[str, Any]:
    schema = {"schema": {"$ref": REFS.format(model=kind.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


def _parsed(body: bytes, kind: type[AskT]) -> AskT:
    """The request. pydantic's parser bounds the nesting. ApiError 400 names the first field that is wrong, and does not
    repeat what it holds."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())[:200]
        message = first["msg"] if first["type"] != "json_invalid" else f"the body is no JSON: {first['msg']}"
        raise ApiError(400, f"{param}: {message}" if param else message, "invalid_value", param or None) from None


async def _whole(job: Job, request: Request) -> Response:
    """Wait for all choices, or for the client to leave."""
    left = asyncio.create_task(_left(request))
    try:
        while job.open:
            event = asyncio.create_task(job.next(1.0))
            await asyncio.wait({event, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done() and not event.done():
                event.cancel()
                return Response(status_code=499)
            await event
        body = await run_in_threadpool(job.answer.whole, job.choices)
        return JSONResponse(body)
    finally:
        left.cancel()
        job.leave()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(job: Job, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events: a block an event."""
    sent = [Sent(job.answer, index) for index in range(len(job.choices))]
    try:
        while job.open:
            event = await job.next(KEEP_ALIVE_S)
            if event is None:
                yield b": still at it\n\n"
                continue
            index, one = event
            if isinstance(one, Draft):
                yield _event(job.answer.draft(index, one))
            elif isinstance(one, Progress):
                # dgq's fields come with the end of the last choice: an event without choices is not expected
                about: dict[str, Any] = {} if job.open else {"dgq": job.answer.about(job.choices)}
                yield _event(sent[index].chunk(one) | about)
        if with_usage:
            yield _event(job.answer.last(job.choices))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.json())
    finally:
        job.leave()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
