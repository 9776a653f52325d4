"""A stand-in for the Hugging Face Hub that can be written to, for the real huggingface_hub client over loopback HTTP.

    POST /api/repos/create, /api/models/REPO/branch/B         repositories and branches
    POST /api/validate-yaml                                   the card's metadata: what the Hub's documentation allows
    POST /api/models/REPO/preupload/B                         which files are large (*.safetensors, *.gguf, *.png)
    POST /REPO.git/info/lfs/objects/batch, PUT /lfs/OID       large files; what is there already gets no address
    POST /api/models/REPO/commit/B                            all at once: nothing of it is there before
    GET  /api/models/REPO[/revision/B], /REPO/resolve/B/FILE  listing and download
    POST /api/collections, /api/collections/SLUG/items

Faults as in hub_standin.py: another answer, or (cut) a connection that drops after so many bytes of a body sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml
from hub_standin import Asked, Fault

LARGE = (".safetensors", ".gguf", ".png")
Answer = tuple[int, Any]
LICENSES = {"apache-2.0", "mit", "gemma", "other"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}


@dataclass
class Repo:
    """branches: name -> commit; commits: id -> file -> its bytes."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        text = json.dumps(
            [len(self.commits), branch, message, {n: hashlib.sha1(d).hexdigest() for n, d in files.items()}]
        )
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class WritableHub:
    token: str
    faults: list[Fault] = field(default_factory=list)
    url: str = ""
    log: list[Asked] = field(default_factory=list)
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, list[str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # addresses of large files that were given a token

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/api/validate-yaml":
            return metadata(json.loads(body)["content"])
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = Repo(said.get("private", said.get("visibility") == "private"))
            self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "other bytes than announced"}
            self.lfs[oid] = body
            return 200, {}
        if path.startswith("/api/collections"):
            return self.collection(path, json.loads(body))
        if ".git/info/lfs/objects/batch" in path:
            return 200, {"transfer": "basic", "objects": [self.place(one) for one in json.loads(body)["objects"]]}
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return 404, {"error": "Repository not found"}
        return self.about(repo, f"{owner}/{name}", rest, body)

    def place(self, said: dict[str, Any]) -> dict[str, Any]:
        known = said["oid"] in self.lfs
        return said | ({} if known else {"actions": {"upload": {"href": f"{self.url}/lfs/{said['oid']}"}}})

    def about(self, repo: Repo, name: str, rest: list[str], body: bytes) -> Answer:
        what, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if what == "branch":
            if revision in repo.branches:
                return 409, {"error": "Reference already exists"}
            repo.branches[revision] = repo.branches["main"]
            return 200, {}
        commit = repo.at(revision)
        if commit is None:
            return 404, {"error": "Revision not found"}
        files = repo.commits[commit]
        if what == "preupload":
            return 200, {"files": [self.mode(one, files) for one in json.loads(body)["files"]]}
        if what == "commit":
            return self.committed(repo, name, revision, body)
        if what == "resolve":
            file = "/".join(rest[2:])
            return (200, (files[file], commit)) if file in files else (404, {"error": "Entry not found"})
        siblings = [self.entry(file, data) for file, data in sorted(files.items())]
        if what == "tree":
            return 200, siblings
        return 200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings}

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        said = {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": git, "blobId": git}
        sha = hashlib.sha256(data).hexdigest()
        return said | (
            {"lfs": {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}} if name.endswith(LARGE) else {}
        )

    @staticmethod
    def mode(said: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        name, large = said["path"], said["path"].endswith(LARGE)
        oid = None
        if name in files:
            entry = WritableHub.entry(name, files[name])
            oid = entry["lfs"]["sha256"] if large else entry["oid"]
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def committed(self, repo: Repo, name: str, branch: str, body: bytes) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            said = line["value"]
            if line["key"] == "deletedFile":
                del files[said["path"]]
            elif line["key"] == "file":
                files[said["path"]] = base64.b64decode(said["content"])
            elif said["oid"] not in self.lfs:
                return 400, {"error": f"LFS object {said['oid']} was never sent"}
            else:
                files[said["path"]] = self.lfs[said["oid"]]
        oid = repo.commit(branch, files, header["summary"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}

    def collection(self, path: str, said: dict[str, Any]) -> Answer:
        if path == "/api/collections":
            slug = f"{said['namespace']}/{said['title'].lower()}-1"
            known = slug in self.collections
            self.collections.setdefault(slug, [])
            return (409 if known else 200), self.shown(slug)
        slug = path.removeprefix("/api/collections/").removesuffix("/items")
        known = said["item"]["id"] in self.collections[slug]
        if not known:
            self.collections[slug].append(said["item"]["id"])
        return (409 if known else 200), self.shown(slug)

    def shown(self, slug: str) -> dict[str, Any]:
        owner = {"name": slug.split("/")[0], "type": "user"}
        return {"slug": slug, "title": slug, "owner": owner, "items": [], "lastUpdated": "2026-01-01T00:00:00.000Z",
                "private": False, "position": 0, "theme": "green", "upvotes": 0}  # fmt: skip


def metadata(text: str) -> Answer:
    """The head of a card, by the rules of the Hub's documentation (model cards, licences, base_model_relation)."""
    errors = []
    said = yaml.safe_load(text.split("---")[1]) if text.startswith("---\n") else None
    if not isinstance(said, dict):
        errors.append("no metadata")
    else:
        if "license" in said and said["license"] not in LICENSES:
            errors.append(f"license {said['license']!r} is none")
        if said.get("base_model_relation", "quantized") not in RELATIONS:
            errors.append("base_model_relation")
        if not all(isinstance(tag, str) for tag in said.get("tags", [])):
            errors.append("tags are no strings")
        if "base_model" in said and str(said["base_model"]).count("/") != 1:
            errors.append("base_model is no id")
    return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    hub: WritableHub

    def handle_all(self) -> None:
        path = urlsplit(self.path).path
        asked = Asked(self.command, path, None)
        self.hub.log.append(asked)
        fault = next((f for f in self.hub.faults if f.times > 0 and path.endswith(f.path)), None)
        if fault is not None:
            fault.times -= 1
            if fault.cut is not None:
                self.rfile.read(fault.cut)
                self.connection.close()
                return
        body = self.body()
        asked.sent = len(body)
        if path.startswith("/lfs/") and self.headers.get("Authorization"):
            self.hub.told.append(path)
        open_ = path.startswith("/lfs/") or path == "/api/validate-yaml"
        if not open_ and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            status, said = 401, {"error": "Invalid username or password."}
        elif fault is not None:
            status, said = fault.status, json.loads(fault.body)
        else:
            status, said = self.hub.answer(self.command, path, body)
        headers = dict(fault.headers) if fault else {}
        if status == 404:
            headers["X-Error-Code"] = {"Rep": "RepoNotFound", "Rev": "RevisionNotFound", "Ent": "EntryNotFound"}[
                said["error"][:3]
            ]
        if not isinstance(said, tuple):
            data = json.dumps(said).encode()
        else:
            data, commit = said
            headers |= {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data) - start),
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:])

    do_GET = do_HEAD = do_POST = do_PUT = handle_all  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(token: str) -> Iterator[WritableHub]:
    hub = WritableHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
