"""Everything that a Hub says is held to its form before it is used: one damaged field at a time, through the real
client and through what a listing becomes. The forms are those of the Hub's API documentation and of git and LFS."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, get_session

from dgq.convert.source.transfer import download
from dgq.convert.source.transfer.answers import (
    MAX_ANSWER,
    AnswerError,
    Bounded,
    RemoteFile,
    commit_of,
    files_of,
    hold,
    hold_request,
    names_of,
    relative,
)
from dgq.convert.source.transfer.download import fetch, note_revision
from dgq.quant.errors import InputError

COMMIT, GIT, SHA = "0123456789abcdef0123456789abcdef01234567", "a" * 40, "b" * 64
HUB = "https://huggingface.co"


def entry(**damage: Any) -> Any:
    """An entry of a listing as huggingface_hub gives it, LFS where lfs is not None."""
    fields = {"rfilename": "config.json", "size": 7, "blob_id": GIT, "lfs": None} | damage
    return SimpleNamespace(**fields)


def lfs(sha256: object = SHA, size: object = 7) -> Any:
    return SimpleNamespace(sha256=sha256, size=size)


def test_a_listing_in_its_form() -> None:
    files = files_of([entry(), entry(rfilename="vision/x.safetensors", lfs=lfs())])
    assert files == (RemoteFile("config.json", 7, GIT), RemoteFile("vision/x.safetensors", 7, SHA))
    assert [file.is_large for file in files] == [False, True]


NAMES = (
    "", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "\\\\host\\share\\x", "..\\x", "C:\\x", "C:x",
    "x:s", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "x" * 2000, None, 7, ["a"], b"a",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_leave_their_folder(name: object) -> None:
    with pytest.raises(AnswerError, match=r"as the (config\.json )?file name, which it cannot be"):
        relative(name)
    with pytest.raises(AnswerError):
        files_of([entry(rfilename=name)])
    if not isinstance(name, str):
        with pytest.raises(AnswerError):
            names_of(SimpleNamespace(siblings=[entry(rfilename=name)]))


HASHES = (None, "", 7, GIT[1:], GIT + "a", GIT.upper(), "/tmp/x", f"../{GIT[3:]}", f"{GIT}\n", "g" * 40, [GIT])
SIZES = (None, -1, 1.0, "7", True, 1 << 60, float("inf"))


@pytest.mark.parametrize("value", [*HASHES, SHA], ids=repr)
def test_hashes_of_small_files(value: object) -> None:
    with pytest.raises(AnswerError, match="as the hash of config"):
        files_of([entry(blob_id=value)])


@pytest.mark.parametrize("value", [*HASHES, GIT, f"/tmp/{SHA}", f"{SHA[:-3]}/.."], ids=repr)
def test_hashes_of_large_files(value: object) -> None:
    with pytest.raises(AnswerError, match="as the hash of config"):
        files_of([entry(lfs=lfs(value))])


@pytest.mark.parametrize("value", SIZES, ids=repr)
def test_sizes(value: object) -> None:
    for damaged in (entry(size=value), entry(size=value, lfs=lfs(size=value)), entry(lfs=lfs(size=8))):
        with pytest.raises(AnswerError, match="as the size of config"):
            files_of([damaged])


@pytest.mark.parametrize("value", [*HASHES, SHA, "main", f"{GIT}/../.."], ids=repr)
def test_commits(value: object) -> None:
    with pytest.raises(AnswerError, match="as the commit"):
        commit_of(value)


def test_a_name_twice() -> None:
    with pytest.raises(AnswerError, match=r"lists config\.json twice"):
        files_of([entry(), entry(blob_id="c" * 40)])


def library() -> Any:
    """The HTTP library of huggingface_hub: httpx, or httpx2 in later versions."""
    return __import__(type(get_session()).__module__.split(".")[0])


def ask(answer: Any, method: str = "GET", url: str = f"{HUB}/api/models/a/b", **headers: str) -> Any:
    """A request by the client with dgq's hooks, which a function answers in place of a server."""
    http = library()
    hooks = {"request": [hold_request], "response": [hold]}
    transport = http.MockTransport(lambda request: answer(http, request))
    with http.Client(transport=transport, event_hooks=hooks, follow_redirects=True) as client:
        return client.request(method, url, headers=headers)


def fixed(status: int = 200, content: Any = b"{}", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda http, request: http.Response(status, headers=named, content=content)


@pytest.mark.parametrize("etag", ["/tmp/x", "../x", '"../../x"', "x" * 40, 'W/"/tmp/x"', GIT[:-1], f'"{GIT}/.."'])
def test_etags_of_files(etag: str) -> None:
    assert ask(fixed(ETag=f'"{GIT}"', X_Linked_ETag=f'"{SHA}"'), "HEAD").status_code == 200
    for damage in ({"ETag": etag}, {"ETag": f'"{GIT}"', "X_Linked_ETag": etag}):
        with pytest.raises(AnswerError, match="as the ETag"):
            ask(fixed(**damage), "HEAD")
    if "/" in etag.removeprefix("W/"):
        with pytest.raises(AnswerError, match="as the ETag"):
            ask(fixed(ETag=etag))


@pytest.mark.parametrize("commit", ["main", "../x", "/tmp/x", GIT[:-1], f"{GIT}/.."])
def test_commits_in_headers(commit: str) -> None:
    with pytest.raises(AnswerError, match="as the commit"):
        ask(fixed(X_Repo_Commit=commit), "HEAD")


RANGES = ("", "bytes 0-9/100", "bytes 10-19/100", "bytes 11-19/100", "bytes 10-29/100", "bytes 10-19/*", "bytes */100",
          "lines 10-29/100", "bytes 19-10/100", "bytes -10-19/100", "bytes 10-14/12")  # fmt: skip


@pytest.mark.parametrize("given", RANGES)
def test_parts_of_files(given: str) -> None:
    url = f"{HUB}/a/b/resolve/{COMMIT}/x.safetensors"
    whole = "bytes 10-19/100"
    assert ask(fixed(206, b"x", Content_Range=whole), url=url, Range="bytes=10-19").status_code == 206
    assert ask(fixed(206, b"x", Content_Range="bytes 10-11/12"), url=url, Range="bytes=10-19").status_code == 206
    assert ask(fixed(206, b"x", Content_Range="bytes 10-99/100"), url=url, Range="bytes=10-").status_code == 206
    with pytest.raises(AnswerError, match="which is not that part of the file"):
        ask(fixed(206, b"x", Content_Range=given), url=url, **({"Range": "bytes=10-19"} if given != whole else {}))


def test_packed_and_endless_answers() -> None:
    with pytest.raises(AnswerError, match="the server sends gzip"):
        ask(fixed(content=gzip.compress(b"{}"), Content_Encoding="gzip"))
    sent: list[int] = []
    pieces = (bytes(1 << 20) for number in range(MAX_ANSWER) if not sent.append(number))  # type: ignore[func-returns-value]
    with pytest.raises(AnswerError, match=f"longer than {MAX_ANSWER} bytes"):
        ask(fixed(content=pieces))
    assert len(sent) == (MAX_ANSWER >> 20) + 1, "no more of it is read than it takes to know"


ADDRESSES = (
    "http://huggingface.co/x", "ftp://example.com/x", "file:///etc/passwd", "https://user:secret@example.com/x",
    "https://127.0.0.1/x", "https://169.254.169.254/latest", "https://10.0.0.1/x", "https://[::1]/x",
    "https://localhost/x", "https://192.168.1.1:8080/x", "https://0.0.0.0/x",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_to_which_a_server_sends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", HUB)
    asked: list[str] = []

    def answer(http: Any, request: Any) -> Any:
        asked.append(str(request.url))
        return http.Response(302, headers={"Location": address})

    with pytest.raises((AnswerError, library().UnsupportedProtocol)):
        ask(answer)
    assert len(asked) == 1, "the address was not asked"
    with pytest.raises((AnswerError, library().UnsupportedProtocol)):  # an address to upload to
        ask(answer, "PUT", address)
    assert len(asked) == 1


def test_redirects_that_the_hub_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files lie on another host, and get no token; what is uploaded is not sent on."""
    monkeypatch.setattr(constants, "ENDPOINT", HUB)
    there: list[Any] = []

    def answer(http: Any, request: Any) -> Any:
        if request.url.host == "huggingface.co":
            return http.Response(302, headers={"Location": "https://cdn.example.com/x"})
        there.append(request)
        return http.Response(200, content=bytes(10))

    url = f"{HUB}/a/b/resolve/{COMMIT}/x"
    assert len(ask(answer, url=url, Authorization="Bearer hf_secret").content) == 10
    assert "Authorization" not in there[0].headers
    with pytest.raises(AnswerError, match=r"sends what is uploaded on to another host, cdn\.example\.com"):
        ask(answer, "PUT")


def test_no_more_bytes_than_announced() -> None:
    file = io.BytesIO(b"abc")
    file.seek(3)
    bounded = Bounded(file, 5)
    bounded.write(b"de")
    with pytest.raises(AnswerError, match="more than the 5 bytes"):
        bounded.write(b"f")
    assert file.getvalue() == b"abcde"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--a--b"


def serve_bytes(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    def http_get(url: str, out: Any, **how: Any) -> None:
        out.write(data[how["resume_size"] :])

    monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)


def test_small_files_are_checked_by_git_s_hash(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"a": 1}'
    right = RemoteFile("sub/config.json", len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    serve_bytes(monkeypatch, b'{"a": 2}')
    with pytest.raises(InputError, match=r"^a/b: sub/config\.json arrived damaged \(8 of 8 bytes"):
        fetch("a/b", COMMIT, [right])
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    serve_bytes(monkeypatch, data + b" ")
    with pytest.raises(InputError, match="more than the 8 bytes"):
        fetch("a/b", COMMIT, [right])
    serve_bytes(monkeypatch, data)
    snapshot = fetch("a/b", COMMIT, [right])
    assert snapshot == cache / "snapshots" / COMMIT and (snapshot / right.name).read_bytes() == data
    assert (snapshot / right.name).resolve() == cache / "blobs" / right.digest


def test_without_the_right_to_make_links(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the file itself lies in the snapshot, as huggingface_hub does it."""
    data = b"x"
    serve_bytes(monkeypatch, data)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    file = RemoteFile("config.json", 1, hashlib.sha1(b"blob 1\0x").hexdigest())
    snapshot = fetch("a/b", COMMIT, [file])
    assert not (snapshot / "config.json").is_symlink() and (snapshot / "config.json").read_bytes() == data
    assert fetch("a/b", COMMIT, [file]) == snapshot


def test_links_out_of_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a snapshot that is a link to elsewhere, whoever put it there, is not written through."""
    serve_bytes(monkeypatch, b"x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "snapshots" / COMMIT / "sub").symlink_to(outside)
    with pytest.raises(AnswerError, match="lies outside of"):
        fetch("a/b", COMMIT, [RemoteFile("sub/x", 1, hashlib.sha1(b"blob 1\0x").hexdigest())])
    assert not list(outside.iterdir())


def test_more_bytes_than_the_disk_has(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_fetch_blob", lambda *_: pytest.fail("nothing is asked for"))
    with pytest.raises(InputError, match=r"^a/b: \d+ bytes are to be fetched, and .* has room for \d+; set HF_HOME"):
        fetch("a/b", COMMIT, [RemoteFile("x", (1 << 50) - 1, GIT)])


def test_the_commit_of_a_branch_is_noted(cache: Path) -> None:
    for revision in ("main", "refs/pr/1"):
        note_revision("a/b", revision, COMMIT)
        assert (cache / "refs" / revision).read_text() == COMMIT
    for odd in ("../x", "/tmp/x", "a\0b"):
        note_revision("a/b", odd, COMMIT)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"main", "1"}
