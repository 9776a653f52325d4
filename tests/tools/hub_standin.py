"""A stand-in for the Hugging Face Hub: serves one repository to the real huggingface_hub client over loopback HTTP.

    /api/models/REPO[/revision/R]     commit, files, sizes       R: the tag v1 or COMMIT
    /api/models/REPO/tree/COMMIT      the files again
    /REPO/resolve/COMMIT/FILE         a small file; a large one (*.safetensors, LFS) is sent on to another host,
    /cdn/FILE                         which serves its bytes, or a range of them, and must not see the token

Everything can go wrong on demand (Fault), and everything asked for is in the log.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forked import forked
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens to requests whose path ends in `path`: another answer, or (cut) an end before that byte of it."""

    path: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int | None = None
    times: float = float("inf")


@dataclass
class Asked:
    """One request, and how many bytes of body it got."""

    method: str
    path: str
    range: str | None
    sent: int = 0


@dataclass
class Hub:
    """token: without it, every answer is 401. The branch and the tag lead to COMMIT once; after that they have moved
    away (404), which who pins does not notice."""

    repo: str
    folder: Path
    faults: list[Fault]
    token: str | None = None
    url: str = ""
    log: list[Asked] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)

    def file(self, name: str) -> dict[str, Any]:
        """A file's entry in listings, in every spelling the client reads."""
        data = (self.folder / name).read_bytes()
        git, lfs = hashlib.sha1(data).hexdigest(), hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": git, "blobId": git}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": lfs, "sha256": lfs, "size": len(data), "pointerSize": 130}
            entry["xetHash"] = lfs  # the client would go to a Xet server for it, which there is none of here
        return entry

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a path, if nothing goes wrong."""
        api, files = f"/api/models/{self.repo}", f"/{self.repo}/resolve/{COMMIT}/"
        names = sorted(file.name for file in self.folder.iterdir())
        name = path.rsplit("/", 1)[-1]
        if path.startswith(f"{api}/tree/"):
            return 200, json.dumps([self.file(name) for name in names]).encode(), {}
        if path in {api, f"{api}/revision/v1", f"{api}/revision/{COMMIT}"} - self.moved:
            self.moved |= {path} - {f"{api}/revision/{COMMIT}"}
            info = {"id": self.repo, "sha": COMMIT, "siblings": [self.file(name) for name in names]}
            return 200, json.dumps(info).encode(), {}
        if path == files + name and name in names:
            entry = self.file(name)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"'}
            if "lfs" not in entry:
                return 200, (self.folder / name).read_bytes(), headers
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
            return 302, b"", headers | {"Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"}
        if path == f"/cdn/{name}" and name in names:
            return 200, (self.folder / name).read_bytes(), {"Accept-Ranges": "bytes"}
        known = path.startswith((f"{api}/", f"/{self.repo}/"))
        code = "EntryNotFound" if path.startswith(files) else "RevisionNotFound" if known else "RepoNotFound"
        return 404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"}

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        asked = Asked(self.command, path, self.headers.get("Range"))
        self.hub.log.append(asked)
        fault = self.hub.fault(path)
        key = None if path.startswith("/cdn/") else f"Bearer {self.hub.token}"
        if self.hub.token is not None and self.headers.get("Authorization") != key:
            status, data, headers = 401, b'{"error": "Invalid username or password."}', {}
        elif fault is not None and fault.cut is None:
            status, data, headers = fault.status, fault.body, fault.headers
        else:
            status, data, headers = self.hub.answer(path)
        start, stop = 0, len(data)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.range or "")
        if span and "Accept-Ranges" in headers:
            start, stop = int(span[1]), min(int(span[2] or stop - 1) + 1, stop)
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(stop - start), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            stop = min(stop, max(fault.cut, start))
        asked.sent = self.wfile.write(data[start:stop])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(repo: str, folder: Path, *faults: Fault, token: str | None = None) -> Iterator[Hub]:
    """The Hub while it serves `folder` as `repo` at COMMIT; its faults may be changed between requests."""
    hub = Hub(repo, folder, list(faults), token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def dgq_forked(endpoint: str, home: Path, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """`dgq` in a forked child, whose client is told anew what it read of the environment when it was imported."""
    from dgq.convert.cli.__main__ import main

    proxies = {key: None for key in os.environ if key.lower().endswith("_proxy")}

    def work() -> None:
        constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(home / "hub"), str(home / "token")
        constants.HF_HUB_OFFLINE, constants.ENDPOINT = offline, endpoint
        constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        main([*arguments])

    return forked(work, home, {**proxies, "HF_HUB_OFFLINE": "1" if offline else None, "HF_TOKEN": None})
