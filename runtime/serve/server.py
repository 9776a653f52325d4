"""uvicorn with what it leaves open: clients that send or read too slowly, and an end that loses no answer.

SIGTERM, SIGINT    no new connections; waiting requests get 503; running ones finish within stop_s seconds
again              the process ends at once
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.memory import GIB, SHORT, working_bytes
from dgq.runtime.model.model import Model
from dgq.runtime.serve.app import Served, make_app
from dgq.runtime.serve.metrics import Meters
from dgq.runtime.serve.settings import ServeSettings
from dgq.runtime.serve.worker import Worker
from dgq.runtime.shape.config import ModelConfig

IDLE_S = 30  # seconds that a connection may wait for its next request


def weights_vram(config: ModelConfig, settings: ServeSettings, vram: int) -> int:
    """What to give Artifact.load() as vram, so that weights and the memory of all rows stay within `vram` bytes:
    loading leaves room for one row of memory.SHORT tokens, the server needs more. InputError if nothing is left."""
    rows = working_bytes(config, settings.context, settings.rows)
    left = vram - max(0, rows - working_bytes(config, SHORT))
    if left <= 0:
        needed = f"{settings.rows} rows of {settings.context} tokens take {rows / GIB:.1f} GiB"
        raise InputError(f"--vram: {needed}; give less --rows or --context")
    return left


def served(artifact: Artifact, model: Model, settings: ServeSettings, tower_device: str) -> Served:
    """A worker that waits for requests, and what the endpoints need. InputError for a model that cannot chat and
    memory that does not suffice."""
    if artifact.config.canvas > settings.context:
        raise InputError(f"--context {settings.context}: is less than one canvas of {artifact.config.canvas}")
    meters = Meters()
    worker = Worker(artifact, model, settings, meters, tower_device)
    try:
        worker.start()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        what = f"{settings.rows} rows of {settings.context} tokens do not fit the GPU beside the weights"
        raise InputError(f"{what}; give less --rows or --context") from None
    return Served(artifact, settings, worker, meters, int(time.time()))


def run(served: Served, ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it. ready is called with the address once connections are taken. InputError if the
    address is taken or not this machine's."""
    settings = served.settings
    config = uvicorn.Config(
        make_app(served),
        host=settings.host,
        port=settings.port,
        http=_protocol(settings.read_s),
        loop="asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=int(settings.stop_s),
        limit_concurrency=settings.connections,
        backlog=settings.connections,
    )
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_Server(config, served.worker, ready).serve())
    finally:
        served.worker.abandon()
        served.worker.join(10)


class _Server(uvicorn.Server):
    """A server that lets the worker finish."""

    def __init__(self, config: uvicorn.Config, worker: Worker, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._worker, self._ready = worker, ready

    async def startup(self, sockets: list[Any] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            where = f"{self.config.host}:{self.config.port}"
            raise InputError(f"{where}: cannot be listened on; it is taken, or no address of this machine") from None
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours: uvicorn's raises the signal again at the end, which would end in another exit code than 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._end)
        yield

    def _end(self) -> None:
        if self.should_exit:
            self.force_exit = True
            self._worker.abandon()
        self.should_exit = True
        self._worker.stop()


def _protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, with a limit to how long a client may take for a request's head, or take nothing of what it
    is sent."""

    class Impatient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                _stop(self._head)
                self._head = None
            elif self._head is None:  # a head began, behind an earlier request
                self._head = self.loop.call_later(seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            _stop(self._reading)
            self._reading = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _stop(self._reading)

        def connection_lost(self, exc: Exception | None) -> None:
            _stop(self._head)
            _stop(self._reading)
            super().connection_lost(exc)

    return Impatient


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
