"""`dgq serve` under load: N clients ask for S seconds, and each answer is held against the single run's.

    python tests/benchmarks/bench_serve.py --clients 64 --seconds 180

Some clients leave in the middle of a stream. A 429 is waited for as its Retry-After says, and counted. One JSON line:
answers, wrong ones, times in seconds (50, 95 and 99 %), tokens a second, and the server's memory at the beginning,
after a third of the time and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from served import Server

from dgq.convert.source.models import open_model
from dgq.runtime.engine.engine import Request, generate

PROMPTS = ("Sort: wind apple king door", "Reverse: dog cat sun", "What is 3 + 4?", "Sort: zoo ant", "Repeat: sun sun")
TEXTS = ("Once upon a time", "The river")


def expected(model: str, seeds: int) -> dict[tuple[str, int], str]:
    """The answers of single runs: of each prompt and text with each seed."""
    artifact = open_model(model)
    loaded = artifact.load("cpu")
    answers = {}
    for seed in range(seeds):
        for prompt in PROMPTS:
            ids = artifact.tokenizer.chat([{"role": "user", "content": prompt}])
            tokens = generate(loaded, Request([ids], artifact.generation, 64, seed)).tokens[0]
            answers[prompt, seed] = artifact.tokenizer.reply(tokens, ids).text
        for text in TEXTS:
            ids = artifact.tokenizer.encode(text)
            tokens = generate(loaded, Request([ids], artifact.generation, 130, seed, steps=4)).tokens[0]
            answers[text, seed] = artifact.tokenizer.decode(tokens)
    return answers


class Load:
    """What all clients saw."""

    def __init__(self, answers: dict[tuple[str, int], str], until: float) -> None:
        self._answers, self._until = answers, until
        self.counts: Counter[str] = Counter()
        self.first: list[float] = []
        self.whole: list[float] = []
        self.tokens = 0

    async def client(self, http: httpx.AsyncClient, number: int) -> None:
        """Ask one thing after another until the time is over."""
        choose = random.Random(number)
        while time.monotonic() < self._until:
            prompt, seed = choose.choice(list(self._answers))
            body: dict[str, Any] = {
                "model": "tiny",
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if prompt in TEXTS:
                path, body = "completions", body | {"prompt": prompt, "max_tokens": 130, "dgq": {"steps": 4}}
            else:
                path = "chat/completions"
                body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
            try:
                await self._ask(http, path, body, prompt, seed, leaves=choose.random() < 0.05)
            except httpx.TransportError as error:
                self.counts[type(error).__name__] += 1

    async def _ask(
        self, http: httpx.AsyncClient, path: str, body: dict[str, Any], prompt: str, seed: int, leaves: bool
    ) -> None:
        began = time.monotonic()
        async with http.stream("POST", f"/v1/{path}", json=body) as answer:
            if answer.status_code == 429:
                self.counts["429"] += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]))
                return
            if answer.status_code != 200:
                self.counts[str(answer.status_code)] += 1
                return
            if leaves:
                await asyncio.sleep(0.5)
                self.counts["left"] += 1
                return
            text, first, usage = "", 0.0, {"completion_tokens": 0}
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                first = first or time.monotonic() - began
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        self.first.append(first)
        self.whole.append(time.monotonic() - began)
        self.tokens += usage["completion_tokens"]
        self.counts["answers"] += 1
        self.counts["wrong"] += text != self._answers[prompt, seed]


def shares(seconds: list[float]) -> list[float]:
    """The 50, 95 and 99 % points."""
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return [round(cuts[at], 3) for at in (49, 94, 98)] if cuts else []


async def loaded(server: Server, clients: int, seconds: float, answers: dict[tuple[str, int], str]) -> dict[str, Any]:
    """Load the server; what came of it."""
    load = Load(answers, time.monotonic() + seconds)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    memory = [server.rss]
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as http:
        work = asyncio.gather(*(load.client(http, number) for number in range(clients)))
        await asyncio.sleep(seconds / 3)
        memory.append(server.rss)
        await work
    memory.append(server.rss)
    return {
        "clients": clients,
        "seconds": seconds,
        **load.counts,
        "first_s": shares(load.first),
        "whole_s": shares(load.whole),
        "tokens_per_second": round(load.tokens / seconds, 1),
        "rss_mib": [round(one / 2**20) for one in memory],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=180)
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--max-waiting", type=int, default=40)
    options.add_argument("--seeds", type=int, default=2)
    given = options.parse_args()
    answers = expected("tiny", given.seeds)
    server = Server("tiny", "--rows", str(given.rows), "--max-waiting", str(given.max_waiting))
    try:
        found = asyncio.run(loaded(server, given.clients, given.seconds, answers))
    finally:
        code = server.stop()
    print(json.dumps(found | {"rows": given.rows, "max_waiting": given.max_waiting, "exit": code}))


if __name__ == "__main__":
    main()
