"""Hub sources through the real huggingface_hub client, against a stand-in on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_standin import COMMIT, serve
from micro import write_micro

REPO = "someone/micro"


def dgq(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "dgq.convert.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=home)


def test_a_hub_id_is_fetched_pinned_and_converted(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder) as endpoint:
        done = dgq(endpoint, tmp_path, "convert", REPO, "--to", "gguf", "-o", "out", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "dgq.json").read_text())
    assert document["source"]["repository"] == REPO
    assert document["source"]["revision"] == COMMIT, "the commit, not the tag that led to it"
    assert str(tmp_path) not in json.dumps(document)
    local = dgq("http://127.0.0.1:9", tmp_path, "convert", str(folder), "--to", "gguf", "-o", "local", "--json")
    assert local.returncode == 0, local.stderr
    tensors = [json.loads(line)["tensors"] for line in (done.stdout, local.stdout)]
    assert tensors[0] == tensors[1]


def test_a_plan_fetches_headers_only(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder) as endpoint:
        remote = dgq(endpoint, tmp_path, "plan", REPO, "--to", "gguf", "--json")
    assert remote.returncode == 0, remote.stderr
    assert not list(tmp_path.glob("hub/**/*.safetensors"))
    local = dgq("http://127.0.0.1:9", tmp_path, "plan", str(folder), "--to", "gguf", "--json")
    plans = [json.loads(done.stdout) for done in (remote, local)]
    assert plans[0]["tensors"] == plans[1]["tensors"] and plans[0]["revision"] == COMMIT


@pytest.mark.parametrize(
    ("repo", "revision", "status", "expected"),
    [
        ("someone/else", None, 200, "someone/else: is not on the Hub"),
        (REPO, "v9", 200, f"{REPO}: has no such revision"),
        (REPO, None, 500, f"{REPO}: the Hub answered 500"),
    ],
)
def test_what_the_hub_refuses(repo: str, revision: str | None, status: int, expected: str, tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder, status) as endpoint:
        pinned = ("--revision", revision) if revision else ()
        done = dgq(endpoint, tmp_path, "plan", repo, "--to", "gguf", *pinned)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"dgq: error: {expected}") and done.stderr.count("\n") == 1, done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = dgq("http://127.0.0.1:9", tmp_path, "plan", REPO, "--to", "gguf")
    assert done.returncode == 2 and "cannot be reached" in done.stderr and done.stderr.count("\n") == 1, done.stderr
