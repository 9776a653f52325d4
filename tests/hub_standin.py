"""A stand-in for the Hugging Face Hub: serves one repository to the real huggingface_hub client over loopback HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repo: str, folder: Path, status: int = 200) -> Iterator[str]:
    """The endpoint's URL while it serves `folder` as `repo` at COMMIT. A status other than 200 answers everything.

    The branch and the tag v1 lead to COMMIT once; after that they have moved away (404): who pins does not notice.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = urlparse(self.path).path
            names = sorted(file.name for file in folder.iterdir())
            if status != 200:
                return self.reply(status, json.dumps({"error": "as told"}).encode(), body)
            if path.startswith(f"/api/models/{repo}/tree/"):
                entries = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n} for n in names]
                return self.reply(200, json.dumps(entries).encode(), body)
            named = path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/v1")
            moved = named and path in asked
            asked.append(path)
            if path == f"/api/models/{repo}/revision/{COMMIT}" or (named and not moved):
                info: dict[str, Any] = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.reply(200, json.dumps(info).encode(), body)
            name = path.rsplit("/", 1)[-1]
            if path == f"/{repo}/resolve/{COMMIT}/{name}" and name in names:
                data = (folder / name).read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                return self.reply(200, data, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})
            known = path.startswith((f"/api/models/{repo}/", f"/{repo}/"))
            code = "RevisionNotFound" if known else "RepoNotFound"
            self.reply(404, b"{}", body, {"X-Error-Code": code, "X-Error-Message": "not here"})

        def reply(self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {
                "Content-Length": str(len(data)),
                "Content-Type": "application/json",
                **(headers or {}),
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
