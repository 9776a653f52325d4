"""What /metrics tells Prometheus: requests, queue, tokens, steps, times, memory. Nothing of what was asked."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("dgq_requests", "Requests", ["path", "status"], registry=registry)
        self._waiting = Gauge("dgq_rows_waiting", "Answers that wait for a batch", registry=registry)
        self._running = Gauge("dgq_rows_running", "Answers of the batch being computed", registry=registry)
        self._prompt = Counter("dgq_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("dgq_prompt_tokens_cached", "Of these, not encoded again", registry=registry)
        self._tokens = Counter("dgq_answer_tokens", "Tokens of answers", registry=registry)
        self._steps = Counter("dgq_steps", "Denoising steps of all rows", registry=registry)
        self._blocks = Counter("dgq_blocks", "Blocks of all rows", ["settled"], registry=registry)
        self._wait = Histogram("dgq_wait_seconds", "Until a batch takes a row", buckets=SECONDS, registry=registry)
        self._first = Histogram("dgq_first_block_seconds", "Until the first block", buckets=SECONDS, registry=registry)
        self._whole = Histogram("dgq_answer_seconds", "Until the whole answer", buckets=SECONDS, registry=registry)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def load(self, waiting: int, running: int) -> None:
        """Note the queue's length."""
        self._waiting.set(waiting)
        self._running.set(running)

    def began(self, waited: float) -> None:
        """A row entered its batch after so many seconds."""
        self._wait.observe(waited)

    def block(self, steps: int, settled: bool) -> None:
        """A row's block was committed."""
        self._steps.inc(steps)
        self._blocks.labels(str(settled).lower()).inc()

    def first_block(self, seconds: float) -> None:
        """An answer's first block came after so many seconds."""
        self._first.observe(seconds)

    def answer(self, seconds: float, prompt: int, cached: int, tokens: int) -> None:
        """An answer is whole."""
        self._whole.observe(seconds)
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._tokens.inc(tokens)
