"""The headers of safetensors files that stay on the Hub, fetched by ranged requests, and no other byte of the weights.

A header goes the way of a local file's: the same checks, of its length against the file's size and of its offsets.
"""

from __future__ import annotations

from typing import Any

from dgq.convert.source.transfer.answers import AnswerError, RemoteFile
from dgq.convert.source.transfer.session import TIMEOUT
from dgq.quant.files.hf_dir import MAX_HEADER

FIRST = 100_001  # bytes of the first request, which holds most headers whole


def header_start(repo: str, commit: str, file: RemoteFile) -> bytes:
    """A file's bytes from its first on, its whole header among them if it has one. Exceptions of huggingface_hub and
    of its transport; AnswerError for a server that sends something else than what was asked for."""
    start = _part(repo, commit, file, 0, FIRST)
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= min(file.size, 8 + MAX_HEADER):
        start += _part(repo, commit, file, len(start), end)
    return start


def _part(repo: str, commit: str, file: RemoteFile, start: int, stop: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    stop, data = min(stop, file.size), bytearray()
    if start >= stop:
        return b""
    headers: dict[str, Any] = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    url = hf_hub_url(repo, file.name, revision=commit)
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        first = start if response.status_code == 206 else 0  # A server may not know ranges, and send the whole file.
        for piece in response.iter_bytes():
            data += piece
            if first + len(data) >= stop:
                break
    part = bytes(data[start - first : stop - first])
    if len(part) != stop - start:
        raise AnswerError(f"{file.name}: the server sends {len(part)} bytes for {stop - start} of its header")
    return part
