"""What `dgq serve` was started with, and the limits of one request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """The settings of a server.

    name: the model's, as clients give it. context: the most tokens of a prompt and its answer (whole canvases). rows:
    the most answers that are computed together. max_waiting: answers that may wait for them; more are refused (429).
    max_tokens: the most tokens of an answer whose request names no number. max_seconds: of a request, waiting included.
    keys: API keys, one of which each request must show; none: nobody must. image_dir: where images may be read from;
    None: nowhere. body: the most bytes of a request; read_s: seconds in which a request must arrive, and a client must
    take what it is sent. image_bytes, pixels: of all images of a request. stop_s: seconds that answers get to finish
    after SIGTERM.
    """

    name: str
    context: int
    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 8
    max_waiting: int = 64
    max_tokens: int = 2048
    max_seconds: float = 600.0
    keys: tuple[str, ...] = ()
    image_dir: Path | None = None
    body: int = 32 << 20
    read_s: float = 30.0
    image_bytes: int = 24 << 20
    pixels: int = 64_000_000
    stop_s: float = 60.0
    connections: int = 512

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
