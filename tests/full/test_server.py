"""dgq serve as a process, asked by the programs that people have: openai's package, curl, sockets; and in a browser."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import PIL.Image
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from served import Server

from dgq.convert.cli.__main__ import main
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.serve.app import make_app
from dgq.runtime.serve.server import served as server_of
from dgq.runtime.serve.settings import ServeSettings

pytestmark = pytest.mark.xdist_group("serve")
SORT = "Sort: wind apple king door"
SAID = (SORT, "Reverse: dog cat sun", "What is 3 + 4?", "Sort: zoo ant")
ENDLESS = {"model": "tiny", "prompt": "Once upon a time there was a fox", "max_tokens": 1500}
TEMPLATE = "{% if tools %}<|turn>system\n{{ tools | tojson }}<turn|>\n{% endif %}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server("tiny", "--rows", "4", "--max-waiting", "6")
    yield one
    assert one.stop() == 0
    assert len(one.lines) == 2, one.lines  # its address, and its end: nothing of all these requests


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def run_of(*words: str) -> str:
    done = CliRunner().invoke(main, ["run", *words, "--json", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return str(json.loads(done.stdout.splitlines()[-1])["text"])


def test_the_openai_package(client: openai.OpenAI) -> None:
    """The text of `dgq run` with the same seed; streamed and not; n = 3; a stop string; the model's name."""
    assert [one.id for one in client.models.list()] == ["tiny"]
    expected = run_of("tiny", "--chat", SORT, "--seed", "5")
    ask: dict[str, Any] = {"model": "tiny", "messages": say(SORT), "seed": 5, "max_tokens": 64}
    whole = client.chat.completions.create(**ask, n=3)
    assert whole.choices[0].message.content == expected and len(whole.choices) == 3
    assert whole.model_extra and whole.model_extra["dgq"]["seed"] == 5
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**ask, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [choice.message.content for choice in whole.choices]
    stop = expected[4:7]
    cut = client.chat.completions.create(**ask, stop=[stop])
    assert cut.choices[0].message.content == expected[: expected.index(stop)]
    text = client.completions.create(
        model="tiny", prompt="Once upon", seed=2, max_tokens=65, extra_body={"dgq": {"steps": 2}}
    )
    assert text.choices[0].text == run_of("tiny", "Once upon", "--seed", "2", "--max-new-tokens", "65", "--steps", "2")
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        client.chat.completions.create(**ask, logit_bias={"5": 1})


@pytest.mark.parametrize("recipe", ["nvfp4", "bnb4", "q4_k_m"])
def test_every_format(converted: Callable[..., Path], recipe: str) -> None:
    path = converted(recipe)
    artifact = open_artifact(path)
    served = server_of(artifact, artifact.load("cpu"), ServeSettings(path.name, 512), "cpu")
    try:
        http = TestClient(make_app(served), base_url="http://localhost")
        body = {"model": path.name, "messages": say(SORT), "seed": 4, "max_tokens": 64}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == run_of(str(path), "--chat", SORT, "--seed", "4")
    finally:
        served.worker.abandon()
        assert served.worker.join(60)


def test_the_async_client_and_neighbours(server: Server, client: openai.OpenAI) -> None:
    """Requests that share batches get what each gets alone."""
    alone = [client.chat.completions.create(model="tiny", messages=say(said), seed=i) for i, said in enumerate(SAID)]

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.address + "/v1", api_key="none", timeout=120) as other:
            asks = [
                other.chat.completions.create(model="tiny", messages=say(said), seed=i) for i, said in enumerate(SAID)
            ]
            return list(await asyncio.gather(*asks))

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        assert one.choices == other.choices


def test_curl(server: Server) -> None:
    body = json.dumps({"model": "tiny", "messages": say(SORT), "stream": True})
    words = [
        "curl",
        "-sSN",
        server.address + "/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-2])
    assert text == run_of("tiny", "--chat", SORT)


def test_several_turns_go_on_in_their_cache(client: openai.OpenAI) -> None:
    """The second turn encodes what is new, and its answer is that of a cold server (`dgq run` has no such prompt)."""
    messages = [*say("Tell me of a fox, a bear, a dog and a cat who met in a house by the river. " + SORT)]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=64)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *say(SAID[1])]
    warm = client.chat.completions.create(model="tiny", messages=messages, max_tokens=64)
    assert warm.usage and warm.usage.prompt_tokens_details
    assert (warm.usage.prompt_tokens_details.cached_tokens or 0) > 20
    cold = client.chat.completions.create(model="tiny", messages=messages, max_tokens=64, n=2)  # no conversation's
    assert warm.choices[0].message.content == cold.choices[0].message.content
    assert cold.usage and cold.usage.prompt_tokens_details and cold.usage.prompt_tokens_details.cached_tokens == 0


def png(size: tuple[int, int] = (32, 32), colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_images_tools_and_keys(tmp_path: Path) -> None:
    """A model whose template knows tools, behind a key, with a directory of pictures."""
    recipe = Path(__file__).parents[2] / "recipes" / "tiny"
    model, shown = tmp_path / "toolful", tmp_path / "shown"
    shutil.copytree(recipe, model)
    template = model / "chat_template.jinja"
    template.write_text(TEMPLATE + template.read_text())
    shown.mkdir()
    (shown / "red.png").write_bytes(png())
    (tmp_path / "keys").write_text("# ours\nsecret-key\n")
    one = Server(model, "--api-key-file", str(tmp_path / "keys"), "--image-dir", str(shown), "--host", "127.0.0.1")
    try:
        stranger = openai.OpenAI(base_url=one.address + "/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with openai.OpenAI(base_url=one.address + "/v1", api_key="secret-key", max_retries=0) as client:
            tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
            ask: dict[str, Any] = {"model": "toolful", "messages": say(SORT), "max_tokens": 64}
            bare = client.chat.completions.create(**ask).usage
            with_tools = client.chat.completions.create(**ask, tools=[tool]).usage
            without = client.chat.completions.create(**ask, tools=[tool], tool_choice="none").usage
            assert bare and with_tools and without
            assert with_tools.prompt_tokens > bare.prompt_tokens == without.prompt_tokens
            answers, data = [], "data:image/png;base64," + base64.b64encode(png()).decode()
            for url in ({"url": data}, {"url": "red.png", "detail": "low"}):  # the tokens that tiny has anyhow
                parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": SORT}]
                seen = client.chat.completions.create(**ask | {"messages": say(parts)})  # type: ignore[arg-type]
                answers.append((seen.choices[0].message.content, seen.usage and seen.usage.prompt_tokens))
            assert answers[0] == answers[1] and (answers[0][1] or 0) > bare.prompt_tokens
            assert answers[0][0] == run_of(str(model), "--chat", SORT, "--image", str(shown / "red.png"))
    finally:
        assert one.stop() == 0


def post(server: Server, body: dict[str, Any], **more: Any) -> httpx.Response:
    return httpx.post(server.address + "/v1/completions", json=body, timeout=120, **more)


def numbers(server: Server) -> dict[str, float]:
    lines = httpx.get(server.address + "/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def raw(server: Server, data: bytes) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    one.sendall(data)
    return one


def request_of(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


def test_clients_that_leave_free_their_rows(server: Server) -> None:
    """Waiting, streaming, half closed: the rows leave, and the next request is answered at once."""
    gone = [raw(server, request_of(ENDLESS | {"stream": stream})) for stream in (True, False, True)]
    until(lambda: numbers(server)["dgq_rows_running"] + numbers(server)["dgq_rows_waiting"] == 3)
    gone[0].close()
    gone[1].shutdown(socket.SHUT_WR)
    gone[2].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    gone[2].close()
    until(lambda: numbers(server)["dgq_rows_running"] == numbers(server)["dgq_rows_waiting"] == 0)
    assert post(server, ENDLESS | {"max_tokens": 1}).status_code == 200


def test_more_than_may_wait_is_told_to_come_back(server: Server) -> None:
    held = [raw(server, request_of(ENDLESS)) for _ in range(10)]
    until(lambda: numbers(server)["dgq_rows_running"] + numbers(server)["dgq_rows_waiting"] >= 10)
    refused = post(server, ENDLESS)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for one in held:
        one.close()
    until(lambda: numbers(server)["dgq_rows_running"] == numbers(server)["dgq_rows_waiting"] == 0)


HOSTILE: dict[str, tuple[bytes, bytes]] = {  # what is sent -> how the answer begins
    "no http": (b"\x16\x03\x01 hello\r\n\r\n", b"HTTP/1.1 400"),
    "a huge head": (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"HTTP/1.1 400"),
    "100 MB announced": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000000\r\n\r\n{", b"HTTP/1.1 413"),
    "a length that is none": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 400"),
    "two lengths": (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"HTTP/1.1 400"),
    "another host": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"HTTP/1.1 403"),
    "no host": (b"GET /v1/models HTTP/1.0\r\n\r\n", b"HTTP/1.1 403"),
    "a path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 404"),
    "an encoded path": (b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 404"),
    "a method": (b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 405"),
    "an upgrade": (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_connections(server: Server, name: str) -> None:
    sent, expected = HOSTILE[name]
    with raw(server, sent) as one:
        assert one.recv(4096).startswith(expected)
    assert httpx.get(server.address + "/health").json() == {"status": "ok"}


def test_100_mb_are_refused_before_they_are_read(server: Server) -> None:
    before = server.rss

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    try:
        status = httpx.post(server.address + "/v1/completions", content=pieces(), timeout=60,
                            headers={"Content-Type": "application/json"}).status_code  # fmt: skip
    except httpx.TransportError:  # the server closed the connection while we wrote
        status = 413
    assert status == 413 and server.rss - before < 120 << 20


def _odd(random_: random.Random, depth: int = 0) -> Any:
    kind = random_.randrange(12 if depth < 3 else 9)
    simple: list[Any] = [
        None, True, 0, -1, 10**20, 1.5, "", "x" * random_.randrange(300), "\x00\U0001f600<|turn>\ufffe",
    ]  # fmt: skip
    if kind < len(simple):
        return simple[kind]
    if kind < 10:
        return [_odd(random_, depth + 1) for _ in range(random_.randrange(4))]
    names = ["type", "text", "role", "content", "image_url", "url", "function", "name"]
    return {random_.choice(names): _odd(random_, depth + 1) for _ in range(random_.randrange(4))}


def fuzzed(seed: int) -> tuple[str, dict[str, Any]]:
    """A request that is right but for a field or two; some are right."""
    random_ = random.Random(seed)
    chat = random_.random() < 0.7
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "dgq": {"steps": 1}}
    body |= {"messages": say(SORT)} if chat else {"prompt": "Once"}
    fields = [*body, "stream", "n", "seed", "stop", "temperature", "tools", "tool_choice", "top_p", "logprobs", "user",
              "stream_options", "response_format", "chat_template_kwargs", "reasoning_effort", "made_up"]  # fmt: skip
    for _ in range(random_.randrange(3)):
        body[random_.choice(fields)] = _odd(random_)
    if chat and random_.random() < 0.3:
        body["messages"] = [{"role": random_.choice(["user", "system", "tool", "assistant"]), "content": _odd(random_)}]
    return ("/v1/chat/completions" if chat else "/v1/completions"), body


def test_fuzzed_requests_end_in_an_answer_or_a_refusal(server: Server) -> None:
    """DGQ_FUZZ=2000 asks more of them."""
    count = int(os.environ.get("DGQ_FUZZ", "200"))
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.address, timeout=120) as http:
        for seed in range(count):
            path, body = fuzzed(seed)
            answer = http.post(path, json=body)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), (seed, body, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
    assert statuses[200] > count / 20 and statuses[400] > count / 4, statuses


@pytest.fixture
def loaded() -> Iterator[Server]:
    one = Server("tiny", "--rows", "2", "--max-waiting", "50")
    yield one
    one.process.kill()


def test_sigterm_under_load_and_slow_clients(loaded: Server) -> None:
    """SIGTERM finishes what runs and refuses what waits; a head, and a body, that never end hold nothing up."""
    one = loaded
    slow = [raw(one, b"GET / HT"), raw(one, request_of(ENDLESS)[:-5])]
    ask = ENDLESS | {"max_tokens": 200, "dgq": {"steps": 8}}

    def answered(number: int) -> tuple[int, str]:
        answer = post(one, ask | {"seed": number % 2})
        body = answer.json()
        return answer.status_code, body["choices"][0]["text"] if answer.status_code == 200 else body["error"]["code"]

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(answered, number) for number in range(12)]
        until(lambda: numbers(one)["dgq_rows_waiting"] >= 8)
        assert one.stop() == 0
        found = [each.result() for each in asked]
    assert {status for status, _ in found} == {200, 503}
    assert {text for status, text in found if status == 503} == {"stopping"}
    finished = [(number % 2, text) for number, (status, text) in enumerate(found) if status == 200]
    assert len(set(finished)) == len({seed for seed, _ in finished}) and all(text for _, text in finished)
    for each in slow:
        each.close()


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.browser
def test_the_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    """A canvas forms, its answer stands, a second turn follows, nothing is wider than a phone. DGQ_SHOTS keeps
    pictures."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no browser")
    from playwright.sync_api import sync_playwright

    shots = Path(os.environ.get("DGQ_SHOTS", tmp_path))
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        problems: list[str] = []
        for name, width, height in (("desk", 1200, 800), ("phone", 390, 780)):
            page = running.new_page(viewport={"width": width, "height": height})
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(server.address)
            page.get_by_text("canvas 64").wait_for()
            page.evaluate("window.seen = []; new MutationObserver(() => { const c = document.querySelector('.canvas');"
                          "if (c && c.textContent) seen.push(c.textContent); }).observe(document.body,"
                          "{subtree: true, childList: true, characterData: true})")  # fmt: skip
            for number, said in enumerate((SORT, "Reverse: dog cat sun")):
                page.locator("#ask").fill(said)
                page.locator("#ask").press("Enter")
                page.locator(".numbers", has_text="tokens/s").nth(number).wait_for()
            assert page.locator(".turn.model .text").first.inner_text() == run_of("tiny", "--chat", SORT)
            assert page.evaluate("seen.length") > 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=str(shots / f"{name}.png"))
            assert problems == []
            page.close()
        running.close()
