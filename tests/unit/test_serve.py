"""dgq serve in one process: what fields mean, what is refused and named, limits, how a stream is cut."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from fastapi.testclient import TestClient

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.model.memory import working_bytes
from dgq.runtime.serve import refusals, server
from dgq.runtime.serve.app import Served, make_app
from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.messages import templated
from dgq.runtime.serve.pictures import Pictures
from dgq.runtime.serve.rows import Progress, Prompt, Row, RowRequest
from dgq.runtime.serve.schema import Message
from dgq.runtime.serve.settings import ServeSettings
from dgq.runtime.shape.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
SORT = [{"role": "user", "content": "Sort: wind apple king door"}]
CHAT = {"model": "tiny", "messages": SORT}
SETTINGS = ServeSettings("tiny", 1024, body=300_000, read_s=2, pixels=10_000, image_bytes=50_000)


def png(width: int = 8, height: int = 8) -> str:
    file = BytesIO()
    PIL.Image.new("RGB", (width, height), (200, 30, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_artifact(TINY)


@pytest.fixture(scope="module")
def served(artifact: Artifact) -> Iterator[Served]:
    one = server.served(artifact, artifact.load("cpu", torch.float32), SETTINGS, "cpu")
    yield one
    one.worker.abandon()
    assert one.worker.join(30)


def client_of(served: Served, **settings: Any) -> TestClient:
    changed = replace(served, settings=replace(served.settings, **settings))
    return TestClient(make_app(changed), base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def client(served: Served) -> TestClient:
    return client_of(served)


def ask(client: TestClient, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=CHAT | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def error(client: TestClient, status: int, path: str = "/v1/chat/completions", **fields: Any) -> str:
    answer = client.post(path, json=CHAT | fields)
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


def test_a_chat_is_the_engines(client: TestClient, artifact: Artifact, served: Served) -> None:
    prompt = artifact.tokenizer.chat(SORT)
    for seed in (0, 7):
        result = generate(served.worker._model, Request([prompt], artifact.generation, 64, seed))
        answer = ask(client, seed=seed, max_tokens=64)
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": artifact.tokenizer.decode(result.tokens[0])}
        assert choice["dgq"]["steps"] == result.steps[0] and choice["dgq"]["settled"] == result.stopped_early[0]
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["usage"]["completion_tokens"] == len(result.tokens[0])
        assert choice["finish_reason"] == "stop" and answer["dgq"]["seed"] == seed and answer["dgq"]["notes"] == []


def test_a_text_is_the_engines_and_choices_are_rows(client: TestClient, artifact: Artifact, served: Served) -> None:
    ids = artifact.tokenizer.encode("Once upon a time")
    fields = {"model": "tiny", "max_tokens": 70, "n": 2, "seed": 3, "dgq": {"steps": 1}}
    expected = []
    for number in range(2):
        alone = Request([ids], artifact.generation, 70, 3, steps=1, rows=[number])
        expected.append(artifact.tokenizer.decode(generate(served.worker._model, alone).tokens[0]))
    for prompt in ("Once upon a time", ids):
        answer = client.post("/v1/completions", json=fields | {"prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == expected
        for number, choice in enumerate(answer["choices"]):
            assert choice["index"] == number
            assert choice["finish_reason"] == "length" and choice["dgq"]["settled"] == [False, False]


def events(client: TestClient, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json=CHAT | fields | {"stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert answer.headers["content-type"].startswith("text/event-stream") and lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_is_the_whole_answer_block_by_block(client: TestClient) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 150, "dgq": {"steps": 1}, "n": 2}
    whole = ask(client, "/v1/completions", **fields)
    streamed = events(client, "/v1/completions", **fields, stream_options={"include_usage": True})
    assert streamed[-1]["choices"] == [] and streamed[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [one["choices"][0] for one in streamed[:-1] if one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["dgq"]["steps"] for one in mine] == choice["dgq"]["steps"] == [1, 1, 1]
        assert [one["finish_reason"] for one in mine] == [None, None, "length"]
    assert "seconds" in streamed[-2]["dgq"]


def test_drafts_are_the_canvas_before_its_block(client: TestClient) -> None:
    found = events(client, dgq={"drafts": True}, max_tokens=64)
    drafts = [one["dgq"]["draft"] for one in found if not one["choices"]]
    assert [draft["step"] for draft in drafts] == list(range(1, len(drafts) + 1)) and drafts
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in found if one["choices"])
    assert "".join(words for words, _ in drafts[-1]["parts"]) == text
    assert "set stream" in error(client, 400, dgq={"drafts": True})


def test_a_stop_string_cuts_whole_and_streamed(client: TestClient) -> None:
    text = ask(client, max_tokens=64)["choices"][0]["message"]["content"]
    for stop in (" door", ["nothing", text[3:6]]):
        cut = ask(client, max_tokens=64, stop=stop)["choices"][0]
        first = min(text.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)
        assert cut["message"]["content"] == text[:first] and cut["finish_reason"] == "stop"
        mine = events(client, max_tokens=64, stop=stop)
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in mine) == text[:first]
    empty = ask(client, max_tokens=64, stop=text[:4])
    assert empty["choices"][0]["message"]["content"] == ""
    assert empty["dgq"]["notes"] == ["choice 0 is empty: the answer begins with a stop string"]


def test_temperature_is_a_factor_and_zero_is_named(client: TestClient, artifact: Artifact, served: Served) -> None:
    sampler = artifact.generation.sampler
    warm = replace(artifact.generation, sampler=replace(sampler, t_min=0.5 * sampler.t_min, t_max=0.5 * sampler.t_max))
    expected = generate(served.worker._model, Request([artifact.tokenizer.chat(SORT)], warm, 64, 0))
    answer = ask(client, temperature=0.5, max_tokens=64)
    assert answer["choices"][0]["dgq"]["steps"] == expected.steps[0]
    assert answer["dgq"]["notes"] == ["temperature 0.5 makes the sampler's temperatures 0.4 to 0.2"]
    assert ask(client, temperature=1, max_tokens=64)["dgq"]["notes"] == []
    assert "leaves the sampler's" in ask(client, temperature=0, max_tokens=64)["dgq"]["notes"][0]


@pytest.mark.parametrize("field", refusals.REFUSED)
def test_fields_without_a_meaning_are_refused(client: TestClient, field: str) -> None:
    assert error(client, 400, **{field: 17}).startswith(f"{field} is not supported: ")


def test_fields_that_ask_for_nothing_are_taken_and_others_are_named(client: TestClient) -> None:
    idle = {field: values[-1] for field, (values, _) in (refusals.REFUSED | refusals.NAMED).items()}
    quick = {"max_tokens": 64, "dgq": {"steps": 1}}
    assert ask(client, **idle, **quick, user="me", tools=[], tool_choice="auto")["dgq"]["notes"] == []
    notes = ask(client, top_p=0.9, colour="red", reasoning_effort="none", **quick)["dgq"]["notes"]
    assert [note.split()[0] for note in notes] == ["top_p", "'colour'"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "types text and image_url"),
        ({"messages": [{"role": "user", "content": "<|image|>"}]}, "send the image as a part"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": 1e9}, "max_tokens"),
        ({"max_tokens": 2000}, "exceed the context of 1024"), ({"n": 17}, "n: "), ({"seed": 1 << 64}, "seed"),
        ({"stop": ""}, "stop"), ({"temperature": 3}, "temperature"), ({"dgq": {"step": 1}}, "dgq.step"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "exceed the context"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "shows the model no tools"),
        ({"tool_choice": "required"}, "cannot be made to call a tool"), ({"stream": "yes"}, "stream"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "has no enable_thinking"),
        ({"reasoning_effort": "high"}, "has no enable_thinking"), ({"model": "gpt-4"}, "this server has tiny"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f",
            "arguments": "{"}}]}]}, "is no JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: TestClient, fields: dict[str, Any], words: str) -> None:
    assert words in error(client, 404 if "model" in fields else 400, **fields)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON"), (b"{", "no JSON"), (b"[" * 10_000, "no JSON"), (b'{"a":' * 10_000, "no JSON"),
        (b'{"model": "tiny", "messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "no JSON"),
        (b"[]", "object"), (b"null", "object"), (b'"x"', "object"), (b"\xff\xfe", "no JSON"), (b"\0" * 10, "no JSON"),
        (b'{"model": "\\ud800", "messages": []}', "no JSON"), (b'{"seed": ' + b"9" * 5000 + b"}", ""),
        (b'{"model": "tiny", "temperature": NaN, "messages": [{"role":"user","content":"x"}]}', "temperature"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(client: TestClient, body: bytes, words: str) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_the_largest_body(client: TestClient) -> None:
    kind = {"Content-Type": "application/json"}
    large = b'{"user": "' + b"x" * 300_000 + b'"}'
    assert client.post("/v1/chat/completions", content=large, headers=kind).status_code == 413
    chunks = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
    assert client.post("/v1/chat/completions", content=chunks, headers=kind).status_code == 413
    assert (
        client.post("/v1/chat/completions", content=b"x=1", headers={"Content-Type": "text/plain"}).status_code == 415
    )


def test_who_is_let_in(served: Served, client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    keyed = client_of(served, keys=("alpha", "beta"))
    for headers, status in (
        ({}, 401), ({"Authorization": "Bearer gamma"}, 401), ({"Authorization": "Basic beta"}, 401),
        ({"Authorization": "Bearer beta"}, 200), ({"Authorization": "bearer alpha"}, 200),
    ):  # fmt: skip
        for path in ("/v1/models", "/metrics"):
            assert keyed.get(path, headers=headers).status_code == status
    assert keyed.get("/health").status_code == keyed.get("/").status_code == 200
    assert keyed.post("/v1/chat/completions", json=CHAT).json()["error"]["type"] == "authentication_error"


def test_the_other_endpoints(client: TestClient) -> None:
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 1024
    assert client.get("/v1/models/other").status_code == client.get("/v2").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert "no embeddings" in error(client, 400, "/v1/embeddings")
    assert client.get("/health").json() == {"status": "ok"}
    assert "dgq_rows_waiting" in client.get("/metrics").text
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not [word for word in ("http://", "https://", "innerHTML", "<script src") if word in page.text]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/cat.png", "fetches nothing"), ("ftp://x/y.png", "fetches nothing"),
        ("file:///etc/passwd", "files are not read"), ("/etc/passwd", "files are not read"), ("", "files are not read"),
        ("data:text/html,hello", "a data URL must be"), ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "is no image"), (png(200, 200), "million pixels"),
        ("data:image/png;base64," + "A" * 80_000, "50,000 bytes"),
    ],
)  # fmt: skip
def test_images_that_are_refused(client: TestClient, url: str, words: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    assert words in error(client, 400, messages=[{"role": "user", "content": content}])


def test_detail_is_the_number_of_an_images_tokens(client: TestClient) -> None:
    pictures = Pictures(SETTINGS)
    for detail in (None, "low", "auto", "high"):
        pictures.open(png(), "x", detail)
    assert pictures.tokens == [None, 70, None, 1120]
    parts = [{"type": "image_url", "image_url": {"url": png(), "detail": []}}]
    assert "low, high or auto" in error(client, 400, messages=[{"role": "user", "content": parts}])


def test_a_bomb_is_not_decoded(client: TestClient) -> None:
    """A header that claims 60,000 x 60,000 pixels, and a compressed image of a million."""
    raw = bytearray(base64.b64decode(png().partition(",")[2]))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    for url in ("data:image/png;base64," + base64.b64encode(raw).decode(), png(1000, 1000)):
        content = [{"type": "image_url", "image_url": url}]
        error(client, 400, messages=[{"role": "user", "content": content}])


def test_files_of_one_directory(tmp_path: Path) -> None:
    folder, secret = tmp_path / "shown", tmp_path / "secret.png"
    folder.mkdir()
    PIL.Image.new("RGB", (4, 4)).save(folder / "cat.png")
    PIL.Image.new("RGB", (4, 4)).save(secret)
    (folder / "link.png").symlink_to(secret)
    pictures = Pictures(replace(SETTINGS, image_dir=folder))
    assert pictures.open("cat.png", "x").size == pictures.open(f"file://{folder}/cat.png", "x").size == (4, 4)
    for name in ("../secret.png", str(secret), "link.png", "file://../secret.png", "%2e%2e/secret.png", "cat.png\0", "",
                 "no.png", "a" * 5000):  # fmt: skip
        with pytest.raises(ApiError, match="no such file"):
            pictures.open(name, "x")


def test_messages_as_templates_take_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    found = templated([Message(**one) for one in given], Pictures(SETTINGS))
    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
            call | {"function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    ]  # fmt: skip


WRITTEN = (
    "<|channel>thought\nIt rains, so I look.<channel|>I look it up."
    '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_reasoning_and_tool_calls_in_blocks_of_any_size(artifact: Artifact, size: int) -> None:
    """What is streamed is a beginning of what is streamed later, and in the end the whole; marks never leak."""
    tokens = artifact.tokenizer._ids(WRITTEN)
    seen: list[Any] = []
    request = RowRequest(Prompt([2], chat=True), 0, 0, 1000, artifact.generation.sampler)
    row = Row(request, artifact.tokenizer, artifact.generation, seen.append)
    for at in range(0, len(tokens), size):
        row.take(tokens[at : at + size] + [1] * (at + size >= len(tokens)), 5)
    for earlier, later in pairwise(seen):
        assert later.steady.startswith(earlier.steady)
        assert later.steady_reasoning.startswith(earlier.steady_reasoning)
        assert "<" not in later.steady + later.steady_reasoning
    last = seen[-1]
    assert isinstance(last, Progress) and last.finish == "tool_calls" and row.done
    assert (last.text, last.reasoning) == (last.steady, last.steady_reasoning)
    assert (last.text, last.reasoning) == ("I look it up.", "It rains, so I look.")
    assert [vars(call) for call in last.calls] == [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]


def test_what_a_row_ends_with(artifact: Artifact) -> None:
    def last(tokens: list[int], wanted: int = 100, **fields: Any) -> Progress:
        seen: list[Any] = []
        request = RowRequest(Prompt([2]), 0, 0, wanted, artifact.generation.sampler, **fields)
        Row(request, artifact.tokenizer, artifact.generation, seen.append).take(tokens, 48)
        return seen[-1]

    word = artifact.tokenizer._ids("wind")
    assert last(word * 3).finish is None and last([*word, 1]).finish == "stop"
    assert last(word * 3, 3).finish == "length" and last([*word * 3, 1], 3).finish == "length"
    late = last(word * 3, deadline=time.monotonic() - 1)
    assert late.finish == "length" and late.timed_out
    assert last(word, stops=("windy",)).steady == "" and last(word).steady == "wind"


def test_too_many_and_too_late(served: Served, artifact: Artifact) -> None:
    """A worker that never begins: what may wait, waits."""
    worker = server.Worker(
        artifact, served.worker._model, replace(SETTINGS, max_waiting=2, rows=1), served.meters, "cpu"
    )
    worker._thread.run = lambda: time.sleep(1)  # type: ignore[method-assign]
    worker._thread.start()
    seen: list[Any] = []
    request = RowRequest(Prompt([2]), 0, 0, 1, artifact.generation.sampler)
    rows = [Row(request, artifact.tokenizer, artifact.generation, seen.append) for _ in range(4)]
    worker.submit(rows[:3])
    with pytest.raises(ApiError) as refused:
        worker.submit(rows[3:])
    assert refused.value.status == 429 and 1 <= int(refused.value.headers["Retry-After"]) <= 60
    rows[0].gone = True
    worker.submit(rows[3:])
    worker.stop()
    assert [one.status for one in seen] == [503] * 4
    with pytest.raises(ApiError, match="stopping"):
        worker.submit(rows[:1])


def test_an_error_of_the_server_is_told_without_what_was_asked(
    served: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the worker, before and after a stream began; the next request is answered."""
    for raised, status in ((ValueError("a secret"), 500), (InputError("the file is damaged"), 503)):

        def broken(*_: Any, raised: Exception = raised) -> Any:
            raise raised

        with monkeypatch.context() as patched:
            patched.setattr("dgq.runtime.serve.worker.stream", broken)
            assert error(client, status, max_tokens=64)
            streamed = client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            assert json.loads(streamed.text[6:])["error"]["type"] == "server_error"
    assert "secret" not in caplog.text and "ValueError at " in caplog.text
    ask(client, max_tokens=64)


def test_vram_holds_the_weights_and_all_rows() -> None:
    config = ModelConfig.from_json(json.loads((GOLDEN / "real26b" / "config.json").read_text()), "26B")
    for rows, context in ((1, 1024), (4, 8192), (8, 16384)):
        weights = server.weights_vram(config, replace(SETTINGS, rows=rows, context=context), 20 << 30)
        assert weights - working_bytes(config, 8192, 1) + working_bytes(config, context, rows) <= 20 << 30
    with pytest.raises(InputError, match="give less --rows or --context"):
        server.weights_vram(config, replace(SETTINGS, rows=64, context=100_000), 20 << 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file, or --without-key"),
        (["--context", "9999"], "--context 9999: the model's is 2048"),
        (["--context", "63"], "less than one canvas of 64"),
        (["--api-key-file", "EMPTY"], "holds no key"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# no key\n\n")
    done = CliRunner().invoke(main, ["serve", "tiny", *(str(empty) if word == "EMPTY" else word for word in words)])
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["serve", "tiny"])
    assert done.exit_code == 2
    assert done.output == (
        "dgq: error: dgq serve needs fastapi, uvicorn, prometheus_client: pip install 'dgq[serve]'\n"
    )
