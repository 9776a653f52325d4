"""Hub sources through the real huggingface_hub client, against a stand-in on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_standin import COMMIT, Fault, dgq_forked, serve
from huggingface_hub import constants
from micro import micro_config, write_micro
from safetensors.torch import load_file, save_file

from dgq.convert.source.hub import Located, locate, remote_specs
from dgq.quant.errors import InputError

REPO = "someone/micro"
BIG = "model.safetensors"  # the one weight file of write_big
CUT = 10 * 2**20 + 12345  # the client writes, and so keeps, a download in pieces of 10 MiB


def dgq(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [sys.executable, "-m", "dgq.convert.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=home)


def write_big(path: Path) -> Path:
    """A model of one file of 19 MB: enough for a download to break in the middle of it."""
    config = micro_config()
    config["text_config"]["num_experts"] = 256
    return write_micro(path, config, shards=0)


def assert_made_from(document: dict[str, Any], folder: Path) -> None:
    """A dgq.json whose source is these files, byte for byte."""
    said = {name: entry["sha256"] for name, entry in document["source"]["files"].items()}
    assert any(name.endswith(".safetensors") for name in said)
    assert said == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in said}


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    return Fetch(tmp_path / "home", monkeypatch)


class Fetch:
    """`locate` in this process: the environment variables the client read when it was imported, set anew."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = home / "hub"
        self.set = monkeypatch.setattr
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        self.set(constants, "HF_HUB_CACHE", str(self.cache))
        self.set(constants, "HF_TOKEN_PATH", str(home / "token"))

    def __call__(self, endpoint: str, repo: str = REPO, *, offline: bool = False, **how: Any) -> Located:
        self.set(constants, "HF_HUB_OFFLINE", offline)
        self.set(constants, "ENDPOINT", endpoint)
        self.set(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        return locate(repo, **how)

    def refused(self, endpoint: str, repo: str = REPO, **how: Any) -> str:
        with pytest.raises(InputError) as caught:
            self(endpoint, repo, **how)
        return str(caught.value)


def test_a_hub_id_is_fetched_pinned_and_converted_and_then_needs_no_network(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder) as hub:
        done = dgq(hub.url, tmp_path, "convert", REPO, "--to", "gguf", "-o", "out", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("\n") == 1, "no progress bars of the client"
    assert hub.moved == {f"/api/models/{REPO}/revision/v1"}, "a second look at the tag would have gone wrong"
    document = json.loads((tmp_path / "out" / "dgq.json").read_text())
    assert document["source"]["repository"] == REPO
    assert document["source"]["revision"] == COMMIT, "the commit, not the tag that led to it"
    assert str(tmp_path) not in json.dumps(document)
    assert_made_from(document, folder)
    again = ("convert", REPO, "--to", "gguf", "-o", "again", "--revision", COMMIT, "--json")
    cached = dgq_forked(hub.url, tmp_path, *again, offline=True)
    assert cached.returncode == 0, cached.stderr
    assert (tmp_path / "again" / "dgq.json").read_text() == (tmp_path / "out" / "dgq.json").read_text()


def test_a_plan_fetches_headers_only(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder) as hub:
        remote = dgq_forked(hub.url, tmp_path, "plan", REPO, "--to", "gguf", "--no-probe", "--json")
    assert remote.returncode == 0 and remote.stderr == "", remote.stderr
    assert not list(tmp_path.glob("hub/**/*.safetensors"))
    ranges = {asked.range for asked in hub.log if asked.path.startswith("/cdn/") and asked.sent}
    assert ranges == {"bytes=0-100000"}
    local = dgq_forked(hub.url, tmp_path, "plan", str(folder), "--to", "gguf", "--no-probe", "--json")
    plans = [json.loads(done.stdout) for done in (remote, local)]
    assert plans[0]["tensors"] == plans[1]["tensors"] and plans[0]["revision"] == COMMIT


def test_what_cannot_be_converted_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")  # its rows of 96 and 160 fit no NF4 block
    with serve(REPO, folder) as hub:
        done = dgq_forked(hub.url, tmp_path, "convert", REPO, "--to", "bnb4", "-o", "out")
        assert done.returncode == 2 and "rows of 160" in done.stderr, done.stderr
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        (folder / "config.json").write_text(json.dumps(config))
        shard = next(folder.glob("*.safetensors"))
        tensors = load_file(shard)
        tensors[next(iter(tensors))] = torch.zeros(8, dtype=torch.uint8)
        save_file(tensors, shard)
        (tmp_path / "other").mkdir()
        done = dgq_forked(hub.url, tmp_path / "other", "run", REPO, "hello", "--revision", COMMIT)
        assert done.returncode == 2 and "already quantised ('modelopt')" in done.stderr, done.stderr
    ranges = {asked.range for asked in hub.log if asked.path.startswith("/cdn/") and asked.sent}
    assert ranges == {"bytes=0-100000"}, "headers, no more"


def test_a_broken_download_is_continued_by_the_next_run(tmp_path: Path) -> None:
    folder = write_big(tmp_path / "micro")
    size = (folder / BIG).stat().st_size
    command = ("convert", REPO, "--to", "gguf", "--effort", "stock", "--json", "-o")
    with serve(REPO, folder, Fault(f"/cdn/{BIG}", cut=CUT)) as hub:
        broken = dgq_forked(hub.url, tmp_path, *command, "out", "--revision", COMMIT)
        assert broken.returncode == 2 and broken.stdout == "" and broken.stderr.count("\n") == 1, broken.stderr
        assert f"dgq: error: {REPO}: the download of {BIG} broke off at 10485760 of {size} bytes (" in broken.stderr
        assert "; run the command again to continue it" in broken.stderr
        assert not (tmp_path / "out").exists()
        hub.faults.clear()
        first, hub.log[:] = [asked for asked in hub.log if asked.path == f"/cdn/{BIG}"], []
        done = dgq_forked(hub.url, tmp_path, *command, "out", "--revision", COMMIT)
        assert done.returncode == 0, done.stderr
        second = [asked for asked in hub.log if asked.path == f"/cdn/{BIG}" and asked.method == "GET"]
    assert [asked.range for asked in second] == ["bytes=0-100000", "bytes=10485760-"], "its header, and the rest"
    assert second[1].sent == size - 10485760 and sum(asked.sent for asked in first) < 10485760 + 200_100
    assert_made_from(json.loads(done.stdout), folder)


def test_a_download_is_continued_within_a_run_and_checked(tmp_path: Path, fetch: Fetch) -> None:
    folder = write_big(tmp_path / "micro")
    with serve(REPO, folder, Fault(f"/cdn/{BIG}", cut=CUT, times=1)) as hub:
        where = fetch(hub.url)
        assert (where.path / BIG).read_bytes() == (folder / BIG).read_bytes() and where.revision == COMMIT
        assert [asked.range for asked in hub.log if asked.path == f"/cdn/{BIG}"] == [None, "bytes=10485760-"]
        blob = (where.path / BIG).resolve()
        for begun in (b"\0" * 12345, b"\0" * (folder / BIG).stat().st_size, b"\0" * 30_000_000):
            blob.unlink()
            part = blob.with_name(f"{blob.name}.incomplete")
            part.write_bytes(begun)  # what a crash left
            line = fetch.refused(hub.url, revision=COMMIT)
            assert line.startswith(f"{REPO}: {BIG} arrived damaged (") and "run the command again" in line
            assert not part.exists() and not blob.exists()
            fetch(hub.url, revision=COMMIT)
            assert blob.read_bytes() == (folder / BIG).read_bytes() and not part.exists()


def test_a_cached_file_of_another_size(tmp_path: Path, fetch: Fetch) -> None:
    folder = write_micro(tmp_path / "micro")
    with serve(REPO, folder) as hub:
        for name in (fetch(hub.url).path / "tokenizer.json", next(fetch.cache.glob("*/snapshots/*/*.safetensors"))):
            whole = name.read_bytes()
            blob = name.resolve()
            blob.write_bytes(whole[:-1])
            line = fetch.refused(hub.url, revision=COMMIT)
            said = f"the cached copy has {len(whole) - 1} bytes, the Hub's {len(whole)}; remove {blob} and run"
            assert line.startswith(f"{name}: {said}")
            blob.unlink()  # as the line says
            assert (fetch(hub.url, revision=COMMIT).path / name.name).read_bytes() == whole


def test_offline(tmp_path: Path, fetch: Fetch) -> None:
    folder = write_micro(tmp_path / "micro")
    line = f"{REPO}: commit {COMMIT} is not, or not wholly, in the cache, and HF_HUB_OFFLINE is set; unset it to fetch"
    with serve(REPO, folder) as hub:
        assert fetch.refused(hub.url, revision=COMMIT, offline=True).startswith(line)
        assert "HF_HUB_OFFLINE is set; unset it, or name a cached commit" in fetch.refused(hub.url, offline=True)
        assert hub.log == []
        fetch(hub.url, weights=False)
        assert fetch.refused(hub.url, revision=COMMIT, offline=True).startswith(line), "no half a snapshot"
        where = fetch(hub.url, revision=COMMIT)
        online = remote_specs(REPO, COMMIT)
        hub.log.clear()
        assert fetch(hub.url, revision=COMMIT, offline=True) == where
        offline = remote_specs(REPO, COMMIT)
        assert hub.log == []
    assert {name: (spec.dtype, spec.shape) for name, spec in offline.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in online.items()
    }


API, CONFIG, TREE = f"/api/models/{REPO}", f"/resolve/{COMMIT}/config.json", f"/tree/{COMMIT}"
SHARD = "model-00001-of-00002.safetensors"
CDN = f"/cdn/{SHARD}"
GATED, MISSING = {"X-Error-Code": "GatedRepo"}, {"X-Error-Code": "EntryNotFound"}
LATER, SPENT = {"Retry-After": "300"}, {"RateLimit": '"api";r=0;t=55', "Retry-After": "7"}
HTML = b"<html>Welcome to the hotel</html>"

NOT_HUB = "URL does not answer as the Hub does ({}); a proxy or a login page? check the network and HF_ENDPOINT"
TERMS = f"it is gated; accept its terms at URL/{REPO}, then log in with `hf auth login`"
RIGHTS = "forbidden; check the rights of your token on the Hub"
WAIT = "too many requests; wait 55 seconds and run the command again"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(API, 401), "the Hub answered 401: it is not on the Hub, or private; check the name, log in with"),
        (Fault(API, 403, GATED), f"the Hub answered 403: {TERMS}"),
        (Fault(API, 403), f"the Hub answered 403: {RIGHTS}"),
        (Fault(API, 429), "the Hub answered 429: too many requests; wait some minutes and run the command again"),
        (Fault(API, 429, LATER), "the Hub answered 429: too many requests; wait 300 seconds and run the command again"),
        (Fault(API, 429, SPENT), f"the Hub answered 429: {WAIT}"),
        (Fault(API, 500), "the Hub answered 500: the Hub is in trouble; run the command again in some minutes"),
        (Fault(API, 503, LATER), "the Hub answered 503: the Hub is in trouble; run the command again in 300 seconds"),
        (Fault(API, 418), "the Hub answered 418: dgq does not know why; run the command again later"),
        (Fault(API, 200, body=HTML), NOT_HUB.format("JSONDecodeError")),
        (Fault(API, 200), NOT_HUB.format("KeyError")),
        (Fault(API, 200, body=b"[]"), NOT_HUB.format("TypeError")),
        (Fault(API, 200, body=b'{"id": "someone/micro"}'), NOT_HUB.format("KeyError")),
        (Fault(TREE, 429, SPENT), f"the Hub answered 429: {WAIT}"),
        (Fault(CONFIG, 404, MISSING), "the Hub answered 404 for config.json: the file is listed, but not there;"),
        (Fault(CONFIG, 403, GATED), f"the Hub answered 403 for config.json: {TERMS}"),
        (Fault(CONFIG, 429, SPENT), f"the Hub answered 429 for config.json: {WAIT}"),
        (Fault(CONFIG, 200, body=HTML), NOT_HUB.format("FileMetadataError")),
        (Fault(CDN, 403), f"the Hub answered 403 for {SHARD}: {RIGHTS}"),
        (Fault(CDN, 404), f"the Hub answered 404 for {SHARD}: dgq does not know why; run the command again later"),
        (Fault(CDN, 429, SPENT), f"the Hub answered 429 for {SHARD}: {WAIT}"),
        (Fault(CDN, 503), f"the Hub answered 503 for {SHARD}: the Hub is in trouble; run the command again in some"),
        (Fault(CDN, 200, body=HTML), f"{SHARD} arrived damaged ({len(HTML)} of "),
    ],
    ids=lambda value: f"{value.status} {value.path.rsplit('/', 1)[-1]}" if isinstance(value, Fault) else "",
)
def test_what_the_hub_refuses(fault: Fault, expected: str, tmp_path: Path, fetch: Fetch) -> None:
    with serve(REPO, write_micro(tmp_path / "micro"), fault) as hub:
        begun = time.monotonic()
        line = fetch.refused(hub.url)
        assert line.startswith(f"{REPO}: {expected.replace('URL', hub.url)}"), line
        assert "\n" not in line and time.monotonic() - begun < 5
        hub.faults.clear()
        hub.moved.clear()
        assert fetch(hub.url).revision == COMMIT, "and what was refused once does not stay broken"


def test_a_header_the_hub_refuses(tmp_path: Path, fetch: Fetch) -> None:
    with serve(REPO, write_micro(tmp_path / "micro"), Fault(CDN, 503)) as hub:
        fetch(hub.url, weights=False)
        with pytest.raises(InputError, match=f"^{REPO}: the Hub answered 503 for {SHARD}: the Hub is in trouble; run"):
            remote_specs(REPO, COMMIT)


def test_names_revisions_and_tokens(tmp_path: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(REPO, write_micro(tmp_path / "micro"), token="hf_right") as hub:
        assert "the Hub answered 401: it is not on the Hub, or private; check the name" in fetch.refused(hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "401: your token is not valid (any more); log in with `hf auth login`" in fetch.refused(hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        missing = "someone/else: the Hub answered 404: it is not on the Hub, or private; check the name, log in with"
        assert fetch.refused(hub.url, "someone/else") == f"{missing} `hf auth login`"
        assert fetch.refused(hub.url, revision="v9").endswith("answered 404: it has no revision v9; check --revision")
        assert fetch.refused(hub.url, "some--one/micro") == "some--one/micro: is no valid Hub id (USER/NAME)"
        assert fetch(hub.url).revision == COMMIT


def test_a_hub_that_is_not_there(fetch: Fetch) -> None:
    for url in ("http://127.0.0.1:9", "http://no.invalid"):
        line = fetch.refused(url)
        assert line.startswith(f"{REPO}: {url} cannot be reached (ConnectError: [Errno "), line
        assert line.endswith("); check the network and HF_ENDPOINT")


def test_one_line_and_no_traceback(tmp_path: Path) -> None:
    """The same through the command: what the client logs while it tries again stays out of sight."""
    retried = Fault(TREE, 503, {"Retry-After": "0"}, times=1)
    with serve(REPO, write_micro(tmp_path / "micro"), retried, Fault(CONFIG, 503, LATER)) as hub:
        done = dgq_forked(hub.url, tmp_path, "plan", REPO, "--to", "gguf")
    assert done.returncode == 2 and done.stdout == "" and retried.times == 0
    said = "the Hub answered 503 for config.json: the Hub is in trouble; run the command again in 300 seconds"
    assert done.stderr == f"dgq: error: {REPO}: {said}\n"
