"""`dgq publish` through the real huggingface_hub client, against a stand-in on loopback: what arrives, what is sent
twice, what is said when it fails; and never a token."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_standin import Fault
from hub_writable import WritableHub, serve
from huggingface_hub import ModelCard, constants
from kinds import write_kinds

import dgq.convert.publication.upload as upload
from dgq.convert.cli.__main__ import main
from dgq.convert.source.hashes import describe
from dgq.convert.write import provenance

TOKEN = "hf_" + "thisisnotasecret"
REPO = "someone/quant"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("publish")
    source = write_kinds(root / "source", ("normal", "outliers", "heavy-tailed", "ties"))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name, how in (("bnb4", ("bnb4",)), ("gguf", ("gguf",)), ("nvfp4", ("nvfp4", "--recipe", "nvfp4-w4a16"))):
        words = ["convert", str(source), "--to", *how, "--effort", "stock", "-o", str(root / name)]
        assert CliRunner().invoke(main, words).exit_code == 0
    return root


def report(root: Path, *names: str, ok: bool = True) -> Path:
    """What dgq validate would write of these artifacts; the figures are made up."""
    same = [1.0, 0.9, 1.0]
    row = {"kl": [0.0123, 0.0101, 0.0144], "top1": [0.9871, 0.98, 0.99], "top5": [0.96, 0.95, 0.97]}
    row |= dict.fromkeys(("reverse_kl", "entropy", "accepted", "accepted_ratio", "accepted_same"), same)
    free = {"score": [0.75, 0.5, 0.9], "steps": [3.5, 3.1, 3.9], "early": same, "steps_limit": 48, "canvases": 8,
            "by_task": {"sum": [3, 4]}, "histogram": {"3": 4, "4": 4}, "tokens_per_step": same, "tokens": 80,
            "seconds": 1.5, "tokens_per_second": 50.0}  # fmt: skip
    levels = {level: {"both": row, "plain": row, "conditioned": row} for level in ("0.25", "0.5", "0.75", "1.0")}
    fixed = {"mean": row, "by_level": levels, "by_condition": {"plain": row, "conditioned": row},
             "by_group": {"sum": row | {"questions": 4}}, "by_position": {"kl": [0.01], "top1": [0.99]}}  # fmt: skip
    cost = {"load_s": 0.5, "step_ms": 12.5, "weight_bytes": 5.0, "peak_bytes": 9.0}
    gate = [{"limit": "fixed.kl_mean <= 0.05", "ok": ok, "said": "KL 0.0123"}]
    artifacts = [{
        "name": name, "path": str(root / name), "ok": ok, "gate": gate, "activations": None, "bytes": 5,
        "kind": "gguf", "params": 10, "quantized_share": 1.0, "experts_share": 1.0, "schemes": {}, "calibration": None,
        "config": {}, "generation": {}, "device": "cpu", "cost": cost, "remarks": [],
        "files": {file.name: describe(file) for file in (root / name).iterdir()
                  if file.suffix in (".safetensors", ".gguf") or file.name == provenance.FILE},
        "fixed": fixed, "free": free | {"steps_ratio": [1.02, 0.99, 1.05], "early_drop": same, "agreement": same,
                                        "same_canvases": same},
    } for name in names]  # fmt: skip
    about = {"dgq": "0.1.0", "device": "CPU", "dtype": "torch.float32", "quick": True, "seed": 0, "activations": None,
             "levels": [0.25, 0.5, 0.75, 1.0], "ok": ok,
             "texts": [{"group": "sum", "prompt": "private words", "answer": None, "reference": "1", "written": {}}],
             "questions": {"names": [str(root / "prompts.jsonl")], "questions": 24, "sha256": "", "run_freely": 8},
             "reference": {"name": str(root / "source"), "bytes": 9, "free": free, "cost": cost,
                           "dtype": "torch.float32", "device": "CPU", "weights_compared": False}}  # fmt: skip
    file = root / f"report-{'-'.join(names)}-{ok}.json"
    file.write_text(json.dumps(about | {"artifacts": artifacts}))
    return file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """The client's endpoint, cache and token are set as the environment would before it is imported."""
    for key, value in {"HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "no-token"),
                       "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():  # fmt: skip
        monkeypatch.setattr(constants, key, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(upload, "LARGE", 1000)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with serve(TOKEN) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield served
    for name, repo in served.repos.items():  # a token is nowhere on the Hub, and goes to no storage beside it
        assert "thisisnotasecret" not in json.dumps([name, repo.messages]) and not served.told
        for files in repo.commits.values():
            assert not [file for file, data in files.items() if b"thisisnotasecret" in data]


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Iterator[Run]:
    """dgq; afterwards no token is in anything that was said or written, and the artifacts are what they were."""
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file() and file.suffix != ".json"}
    said = []

    def dgq(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert isinstance(result.exception, SystemExit | None), result.exception
        said.append(result.output)
        return result

    yield dgq
    assert not [text for text in said if "thisisnotasecret" in text]
    for file in (*root.rglob("*"), *tmp_path.rglob("*")):
        if file.is_file():
            assert b"thisisnotasecret" not in file.read_bytes(), file
    assert all(file.read_bytes() == data for file, data in before.items())
    for name in ("bnb4", "gguf", "nvfp4"):
        assert CliRunner().invoke(main, ["verify", str(root / name)]).exit_code == 0


def words(root: Path, name: str = "bnb4") -> list[object]:
    return ["publish", root / name, "--repo", REPO, "--license", "apache-2.0", "--report", report(root, name)]


def test_publish_list_download_verify_run(root: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    result = run(*words(root), "--private")
    assert result.exit_code == 0, result.output
    repo = hub.repos[REPO]
    commit = repo.branches["main"]
    assert f"{REPO}@{commit}" in result.stdout and repo.private and len(repo.commits) == 2
    assert repo.messages[-1] == "dgq 0.1.0: bnb4 of source"
    files = repo.commits[commit]
    manifest = json.loads(files["manifest.json"])
    assert set(manifest["files"]) | {"manifest.json", ".gitattributes"} == set(files)
    for name, said in manifest["files"].items():
        assert said == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}, name
    assert str(root) not in "".join(data.decode("utf-8", "ignore") for data in files.values())
    assert b"private words" not in files["validation.json"]
    found = run("verify", REPO, "--revision", commit, "--against", root / "source", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["files"] == len(files) - 2 and told["revision"] == commit and len(told["compared"]) >= 8
    answer = run("run", REPO, "hello", "--max-new-tokens", "4", "--steps", "2", "--json")
    assert answer.exit_code == 0, answer.output
    local = run("run", root / "bnb4", "hello", "--max-new-tokens", "4", "--steps", "2", "--json")
    assert json.loads(answer.stdout)["tokens"] == json.loads(local.stdout)["tokens"]
    assert [asked.method for asked in hub.log if asked.path == "/api/validate-yaml"] == ["POST"]
    ModelCard.load(REPO, token=TOKEN).validate()
    shown = run("inspect", REPO, "--json")
    assert shown.exit_code == 0, shown.output
    here = json.loads(run("inspect", root / "bnb4", "--json").stdout)
    assert json.loads(shown.stdout) | {"path": 0, "file": 0} == here | {"path": 0, "file": 0} and here["provenance"]
    hub.log.clear()
    again = run(*words(root), "--private")
    assert again.exit_code == 0 and f"{REPO}@{commit}" in again.stdout and len(repo.commits) == 2
    assert not [asked for asked in hub.log if asked.method == "PUT"]


def test_what_was_published_and_then_changed_is_noticed(root: Path, hub: WritableHub, run: Run, tmp_path: Path) -> None:
    assert run(*words(root, "gguf")).exit_code == 0
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    for number, name in enumerate(("README.md", "manifest.json", "validation.json", "dgq.json", "new.txt", "LICENSE")):
        copy = tmp_path / str(number)
        copy.mkdir()
        (copy / ".cache").mkdir()
        for file, data in files.items():
            (copy / file).write_bytes(data)
        assert run("verify", copy).exit_code == 0
        (copy / name).write_bytes(files.get(name, b"") + b"\n")
        assert run("verify", copy).exit_code == 1, name
    (tmp_path / "0" / "README.md").unlink()
    assert "README.md: is missing" in run("verify", tmp_path / "0").stderr


def test_an_interrupted_upload_sends_only_what_is_missing(root: Path, hub: WritableHub, run: Run) -> None:
    large = hashlib.sha256(next((root / "bnb4").glob("*.safetensors")).read_bytes()).hexdigest()
    hub.faults = [Fault(f"/lfs/{large}", cut=1000)]
    broken = run(*words(root))
    assert broken.exit_code == 2 and "what arrived whole is not sent again" in broken.stderr, broken.stderr
    assert broken.stderr.strip().splitlines()[-1].startswith(f"dgq: error: {REPO}: ")
    assert len(hub.repos[REPO].commits) == 1, "nothing is visible of it"
    assert f"note: {REPO}: {next((root / 'bnb4').glob('*.safetensors')).name}, " in " ".join(broken.stderr.split())
    sent = set(hub.lfs)
    assert sent and large not in sent
    hub.faults, hub.log[:] = [], []
    assert run(*words(root)).exit_code == 0
    assert [asked.path for asked in hub.log if asked.method == "PUT"] == [f"/lfs/{large}"]
    assert run("verify", REPO).exit_code == 0


ERROR = b'{"error": "the Hub says why of hf_thisisnotasecret"}'


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("path", ["/api/repos/create", "/objects/batch", f"/api/models/{REPO}/commit/main"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=401, body=ERROR), "your token is not valid (any more)"),
        (Fault(status=403, body=ERROR), "check the rights of your token"),
        (Fault(status=409, body=ERROR), "somebody else changes it at this moment"),
        (Fault(status=429, body=ERROR, headers={"Retry-After": "1000"}), "wait 1000 seconds"),
        (Fault(status=503, body=ERROR), "the Hub is in trouble"),
        (Fault(cut=1), "cannot be reached"),
    ],
    ids=["401", "403", "409", "429", "503", "dropped"],
)
def test_failures_are_one_line(root: Path, hub: WritableHub, run: Run, path: str, fault: Fault, said: str) -> None:
    if path == "/api/repos/create" and fault.status == 409:
        said = "does not answer as the Hub does"  # it is there, and has no address
    hub.faults = [Fault(path, fault.status, fault.headers, fault.body, fault.cut)]
    result = run(*words(root))
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert result.exit_code == 2 and len(lines) == 1 and said in lines[0], result.stderr
    assert lines[0].startswith(f"dgq: error: {REPO}: ") and "Traceback" not in result.output
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


COMMITTED = f"/api/models/{REPO}/commit/main"
ABOUT = {"id": REPO, "sha": "0" * 40, "private": False, "siblings": []}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        (COMMITTED, {"commitOid": "../../x"}, "'../../x' as the commit"),
        (COMMITTED, {"commitOid": None}, "'None' as the commit"),
        (f"/api/models/{REPO}/revision/main", ABOUT | {"sha": "/tmp/x"}, "'/tmp/x' as the commit"),
        (f"/api/models/{REPO}/revision/main", ABOUT | {"siblings": [{"rfilename": ["x"]}]}, "as the file name"),
        (f"/api/models/{REPO}/revision/main",
         ABOUT | {"siblings": [{"rfilename": "manifest.json", "size": 9, "blobId": "/tmp/x"}, {"rfilename": "x"}]},
         "'/tmp/x' as the hash of manifest.json"),
    ],
    ids=["commit", "no commit", "sha", "name", "hash"],
)  # fmt: skip
def test_what_the_hub_gives_back_is_held_to_its_form(
    root: Path, hub: WritableHub, run: Run, path: str, body: dict[str, Any], what: str
) -> None:
    address = {"commitUrl": f"{hub.url}/{REPO}/commit/{'0' * 40}"}  # which the client reads before dgq does
    hub.faults = [Fault(path, 200, body=json.dumps(body | address).encode())]
    result = run(*words(root), "--revision", "main")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert result.exit_code == 2 and len(lines) == 1 and what in lines[0], result.output
    assert lines[0].startswith(f"dgq: error: {REPO}: the Hub gives ")


@pytest.mark.usefixtures("no_pictures")
def test_somebody_else_s_files_and_public_repositories_are_left_alone(root: Path, hub: WritableHub, run: Run) -> None:
    assert run(*words(root)).exit_code == 0
    repo = hub.repos[REPO]
    result = run(*words(root), "--private")
    assert result.exit_code == 2 and "is there already and public" in result.stderr
    repo.commit("main", repo.commits[repo.branches["main"]] | {"theirs.bin": b"x"}, "by hand")
    result = run(*words(root, "gguf"))
    assert result.exit_code == 2 and "theirs.bin that dgq did not put there" in result.stderr
    assert run(*words(root, "gguf"), "--force").exit_code == 0
    files = repo.commits[repo.branches["main"]]
    assert "theirs.bin" in files and not [name for name in files if name.endswith(".safetensors")], "the last one's go"
    assert run(*words(root), "--revision", "try", "--force").exit_code == 0
    assert (
        "model.safetensors.index.json" in repo.commits[repo.branches["try"]]
        or repo.branches["try"] != repo.branches["main"]
    )
    assert run(*words(root), "--revision", "0" * 40).exit_code == 2
    assert run(*words(root)[:2], "--repo", "someone/else/x").exit_code == 2


@pytest.mark.usefixtures("no_pictures")
def test_gates(root: Path, run: Run, tmp_path: Path) -> None:
    plain = ["publish", root / "bnb4", "--repo", REPO, "--dry-run"]
    good = ["--license", "apache-2.0", "--report", report(root, "bnb4")]
    for more, said in (
        (("--report", report(root, "bnb4")), "--license"),
        (("--license", "apache-2.0"), "validation: no report"),
        (("--license", "mit", "--report", report(root, "bnb4")), "--license-file"),
        (("--license", "apache-2.0", "--report", report(root, "bnb4", ok=False)), "the gate is broken: fixed.kl_mean"),
    ):
        stopped = run(*plain, *more)
        assert stopped.exit_code == 1 and said in stopped.stderr
        forced = run(*plain, *more, "--force")
        assert forced.exit_code == 0 and "Published with --force although" in forced.stdout
    fine = run(*plain, *good)
    assert fine.exit_code == 0 and "--force" not in fine.stdout and fine.stderr == ""
    assert fine.stdout == run(*plain, *good).stdout, "the same card"
    for name, said in json.loads(run(*plain, *good, "--json").stdout)["repositories"][0]["files"].items():
        assert re.search(rf"^{said['sha256']} +{said['bytes']:,}  {re.escape(name)}$", fine.stdout, re.M), name
    wrong = run("publish", root / "gguf", "--repo", REPO, "--dry-run", *good)
    assert wrong.exit_code == 2 and "none judges the files" in wrong.stderr
    damaged = shutil.copytree(root / "bnb4", tmp_path / "damaged")
    with next(damaged.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xa5")
    result = run("publish", damaged, "--repo", REPO, "--dry-run", *good, "--force")
    assert result.exit_code == 1 and "SHA-256 is not dgq.json's" in result.stderr


@pytest.mark.usefixtures("no_pictures")
def test_all_become_a_collection(root: Path, hub: WritableHub, run: Run) -> None:
    names = ("bnb4", "gguf", "nvfp4")
    paths = [root / name for name in names]
    more = ("--repo", REPO, "--license", "apache-2.0", "--report", report(root, *names))
    assert run("publish", *paths, *more).exit_code == 2
    result = run("publish", "--all", *paths, *more)
    assert result.exit_code == 0, result.output
    assert sorted(hub.repos) == sorted(hub.collections["someone/quant-1"]) and len(hub.repos) == 3
    tables = set()
    for name, repo in hub.repos.items():
        text = repo.commits[repo.branches["main"]]["README.md"].decode()
        table = text.split("## The same model in other formats")[1].split("##")[0]
        tables.add(re.sub(r"[\[\]*\\]|\(https[^)]*\)", "", table))
        assert run("verify", name).exit_code == 0
    assert len(tables) == 1 and all(name in next(iter(tables)) for name in hub.repos)


def test_the_source_s_hashes_are_asked_of_the_hub(root: Path, hub: WritableHub, run: Run) -> None:
    """An artifact of a Hub source: shards by SHA-256, copied files by git's; another template is noticed."""
    assert (
        run("publish", root / "bnb4", "--repo", "someone/source", "--license", "apache-2.0", "--force").exit_code == 0
    )
    repo = hub.repos["someone/source"]
    files = {file.name: file.read_bytes() for file in (root / "source").iterdir()}
    commit = repo.commit("main", files, "the source")
    made = root / "of-hub"
    result = run("convert", "someone/source", "--to", "bnb4", "--effort", "stock", "-o", made)
    assert result.exit_code == 0, result.output
    asked = ["publish", made, "--repo", REPO, "--license", "apache-2.0", "--report", report(root, "of-hub")]
    assert run(*asked).exit_code == 0
    card = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"].decode()
    assert "base_model: someone/source" in card and "base_model_relation: quantized" in card and commit in card
    for name in ("chat_template.jinja", next(name for name in files if name.endswith(".safetensors"))):
        repo.commits[commit] = files | {name: files[name] + b" "}
        result = run(*asked)
        assert result.exit_code == 1 and name in result.stderr, result.output
    shutil.rmtree(made)
