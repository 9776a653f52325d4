"""What the Hub says, held to its form before it is used. A server may be hostile, compromised or something else.

    listing     a commit of 40 hex digits; names that stay inside a folder; sizes; hashes of 40 or 64 hex digits
    headers     ETag and commit, which huggingface_hub makes paths of; Content-Range; no packed body
    addresses   of redirects and of uploads: http or https, never http where the Hub has https, and no private network
                where the Hub is outside of it; what sends is not sent on to another host
    bodies      no more bytes than were announced

hold() and hold_request() are hooks of the HTTP client, so that what huggingface_hub asks on its own account is held
to the same.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from dgq.quant.errors import InputError

MAX_SIZE = 1 << 50  # bytes of one file
MAX_NAME = 1024  # characters
MAX_ANSWER = 1 << 26  # bytes of an answer that is no download: ten times the listing of 20,000 files
GIT = "0" * 40  # a hash of git's
TAG = re.compile(r"[\w.+=:-]*", re.ASCII)  # what a CDN may give, which is no path
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class AnswerError(InputError):
    """The server's answer has not the form that the Hub's have."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a listing. digest: SHA-256 of a large (LFS) file, else git's SHA-1 of a blob, in hex digits."""

    name: str
    size: int
    digest: str

    @property
    def is_large(self) -> bool:
        return len(self.digest) == 64


def is_commit(revision: object) -> bool:
    """Whether it is a whole commit hash."""
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def commit_of(value: object) -> str:
    """A commit that the Hub gave. AnswerError if it is none: to go on without would be to follow a branch."""
    if not is_commit(value):
        raise _odd("commit", value)
    return str(value)


def names_of(info: Any) -> list[str]:
    """The names in model_info's listing. AnswerError if one is no text; they are not held to be paths yet."""
    names = [entry.rfilename for entry in info.siblings or ()]
    for name in names:
        if not isinstance(name, str):
            raise _odd("file name", name)
    return names


def files_of(entries: Iterable[Any]) -> tuple[RemoteFile, ...]:
    """The files of a listing, name, size and hash checked. AnswerError for the first that has not its form."""
    files = tuple(_file(entry) for entry in entries)
    names = [file.name for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AnswerError(f"the Hub lists {twice} twice")
    return files


def _file(entry: Any) -> RemoteFile:
    name, size, lfs = relative(entry.rfilename), entry.size, entry.lfs
    digest, digits = (entry.blob_id, 40) if lfs is None else (lfs.sha256, 64)
    if not isinstance(digest, str) or len(digest) != digits or not HASH.fullmatch(digest):
        raise _odd(f"hash of {name}", digest)
    if type(size) is not int or not 0 <= size < MAX_SIZE or (lfs is not None and lfs.size != size):
        raise _odd(f"size of {name}", size)
    return RemoteFile(name, size, digest)


def relative(name: object) -> str:
    """A file's name if it stays inside its folder on every system; AnswerError for every other value."""
    form = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
    if not form or any(part in ("", ".", "..") for part in str(name).split("/")) or re.search(r"[\\:]", str(name)):
        raise _odd("file name", name)
    return str(PurePosixPath(str(name)))


def _odd(what: str, value: object) -> AnswerError:
    return AnswerError(
        f"the Hub gives {str(value)[:80]!r} as the {what}, which it cannot be; is HF_ENDPOINT the"
        " Hub? Nothing was written outside of the cache"
    )


class Bounded:
    """A file being written that takes no more bytes than were announced: AnswerError for the first beyond."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.tell, self.seek, self.truncate, self.flush = file.tell, file.seek, file.truncate, file.flush

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            raise AnswerError(f"the server sends more than the {self._size} bytes that it announced")
        return self._file.write(data)


def hold(response: Any) -> None:
    """A hook of the HTTP client for every answer. AnswerError for one that has not its form."""
    request, headers = response.request, response.headers
    if (coding := headers.get("Content-Encoding", "identity")) != "identity":
        raise AnswerError(f"the server sends {coding}, which dgq did not ask for")
    if response.has_redirect_location:
        _hold_redirect(request, headers["Location"])
    elif response.status_code < 400:
        etag = (headers.get("X-Linked-ETag") or headers.get("ETag", GIT)).removeprefix("W/").strip('"')
        form = HASH if request.method == "HEAD" else TAG  # HEAD's becomes the name of a file, in huggingface_hub.
        if not form.fullmatch(etag):
            raise _odd("ETag", etag)
    if (commit := headers.get("X-Repo-Commit")) is not None:
        commit_of(commit)
    if response.status_code == 206:
        _hold_range(request.headers.get("Range", ""), headers.get("Content-Range", ""))
    elif "/resolve/" not in request.url.path and not response.has_redirect_location and not _is_download(response):
        response.stream = _bounded_answer(response.stream)


def _is_download(response: Any) -> bool:
    """Whether the request was sent on from a file's address; its reader bounds it by the listing's size."""
    return any("/resolve/" in str(before.request.url.path) for before in response.history)


def _bounded_answer(stream: Any) -> Any:
    """The same stream of a body, which ends in an AnswerError after MAX_ANSWER bytes. The client takes nothing that is
    no stream of the library that it is made of, httpx or httpx2."""
    (base,) = (one for one in type(stream).__mro__ if one.__name__ == "SyncByteStream")

    def pieces(_: Any) -> Iterator[bytes]:
        count = 0
        for piece in stream:
            count += len(piece)
            if count > MAX_ANSWER:
                raise AnswerError(f"the server's answer is longer than {MAX_ANSWER} bytes")
            yield piece

    return type("Answer", (base,), {"__iter__": pieces, "close": lambda _: stream.close()})()


def _hold_redirect(request: Any, location: str) -> None:
    """What asks may be sent on to another host, as large files are. What sends may not."""
    here, there = request.url, request.url.join(location)
    elsewhere = (here.scheme, here.host, here.port) != (there.scheme, there.host, there.port)
    if elsewhere and request.method not in ("GET", "HEAD"):
        raise AnswerError(f"the server sends what is uploaded on to another host, {there.host[:80]}")


def hold_request(request: Any) -> None:
    """A hook of the HTTP client for every request. AnswerError for an address, of a redirect or of an upload, that the
    server of HF_ENDPOINT may not name."""
    from huggingface_hub import constants

    endpoint, url = urlsplit(constants.ENDPOINT), request.url
    schemes = ("https",) if endpoint.scheme == "https" else ("http", "https")
    if url.scheme not in schemes or url.userinfo:
        raise AnswerError(f"the server names {url.scheme}://{url.host[:80]}, which is no address that dgq follows")
    if _is_private(url.host) and not _is_private(endpoint.hostname or ""):
        raise AnswerError(f"the server names {url.host[:80]}, an address of a private network, which dgq does not ask")


def _is_private(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return False


def _hold_range(wanted: str, given: str) -> None:
    """A part of a file is the part that was asked for, or its beginning where the file ends there."""
    ask, part = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted), re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given)
    if ask and part:
        start, stop, total = map(int, part.groups())
        last = min(int(ask[2] or total), total - 1)
        if start == int(ask[1]) and stop == last and start <= stop:
            return
    raise AnswerError(f"the server gives {given[:80]!r} for {wanted!r}, which is not that part of the file")
