"""Where a SRC lies: the embedded `tiny`, a local directory, or a Hub id.

A Hub id is pinned to the commit it resolved to; that commit goes into every artifact made from it. Without a network,
or with HF_HUB_OFFLINE, it is the commit to which the cache says that the branch led. How files come here, and what is
checked of them, is in convert/source/transfer.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from dgq.convert.source.transfer.answers import RemoteFile, commit_of, files_of, is_commit, names_of
from dgq.convert.source.transfer.download import fetch, folder_of, note_revision
from dgq.convert.source.transfer.headers import header_start
from dgq.convert.source.transfer.session import TIMEOUT, is_unreachable, refuse, tame
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import INDEX, SINGLE, Elsewhere, read_json
from dgq.quant.types import Spec
from dgq.runtime.files.canonical import stored_tensors

TINY = "tiny"
SMALL = ("*.json", "*.jinja", "tokenizer.model", "LICENSE", "NOTICE")
WANTED = (*SMALL, "*.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PROVENANCE = "dgq.json"  # the file that makes a directory an artifact of dgq; convert/write/provenance.py writes it
NOTICES = logging.getLogger("dgq")  # lines for the user; the command line shows them as notes
MAIN = "main"  # the branch of a Hub id that is given without --revision


@dataclass(frozen=True)
class Located:
    """Where a SRC lies. asked: what the user wrote; repo, revision (a commit hash): of a Hub source only; listing: of
    the files that may be wanted, where the Hub gave one."""

    asked: str
    path: Path
    repo: str | None = None
    revision: str | None = None
    listing: tuple[RemoteFile, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """The model's name: the repository's, the directory's or the embedded model's."""
        return self.repo.split("/")[-1] if self.repo else self.asked if self.asked == TINY else self.path.resolve().name


def is_hub_id(asked: str) -> bool:
    """Whether it has the form USER/NAME and is no path that exists."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", asked) is not None and not Path(asked).exists()


def locate(asked: str, revision: str | None = None, *, weights: bool = True) -> Located:
    """Find or fetch SRC. weights=False: of a Hub id fetch only the small files, which are enough for a plan.
    InputError, one line, for what is not there and for whatever the Hub or the network says."""
    if asked == TINY:
        path = Path(str(files("dgq.recipes").joinpath("tiny")))
        return Located(asked, path)
    if revision is not None and not is_hub_id(asked):
        raise InputError(f"--revision goes with a Hub id, and {asked} is a local path")
    if is_hub_id(asked):
        return _fetch(asked, revision, WANTED if weights else SMALL)
    path = Path(asked).expanduser()
    if not path.exists():
        raise InputError(f"{asked}: no such directory, and no Hub id (USER/NAME) or `tiny` either")
    if not path.is_dir():
        raise InputError(f"{asked}: is a file; SRC is a checkpoint directory, a Hub id or `tiny`")
    return Located(asked, path)


def fetch_artifact(repo: str, revision: str | None = None) -> Located:
    """Fetch every file of an artifact's repository into the Hub's cache, where they are links to its blobs."""
    return _fetch(repo, revision, ("*",))


def fetch_adapter(repo: str) -> Path:
    """Fetch the two files of a LoRA adapter's repository."""
    return _fetch(repo, None, ADAPTER).path


def remote_specs(where: Located) -> dict[str, Spec]:
    """The header entry of every tensor of a Hub source that was located without its weights. Headers are fetched by
    ranged requests, and no other byte of the weights; without a network the weights must be in the cache."""
    repo, commit = str(where.repo), str(where.revision)
    if not where.listing:
        return stored_tensors(_cached(repo, commit, WANTED, "the Hub was not asked").path)
    remote = {file.name: file for file in where.listing}

    def start(name: str) -> bytes:
        try:
            return header_start(repo, commit, remote[name])
        except Exception as error:  # every failure of the network or the Hub becomes one line
            refuse(repo, error, name)

    return stored_tensors(where.path, Elsewhere({name: file.size for name, file in remote.items()}, start))


def _fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Located:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    if huggingface_hub.is_offline_mode():
        return _cached(repo, revision, patterns, "HF_HUB_OFFLINE is set")
    tame()
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        commit, listed = commit_of(info.sha), {*names_of(info)}
        known = set(filter_repo_objects(listed, allow_patterns=[*WANTED, *patterns]))
        listing = files_of(file for file in info.siblings or () if file.rfilename in known)
        wanted = set(filter_repo_objects(known, allow_patterns=[*patterns]))
        path = fetch(repo, commit, [file for file in listing if file.name in wanted])
    except Exception as error:  # every failure of the network or the Hub becomes one line
        if is_unreachable(error) and folder_of(repo).is_dir():
            return _cached(repo, revision, patterns, f"{huggingface_hub.constants.ENDPOINT} cannot be reached")
        refuse(repo, error)
    note_revision(repo, revision or MAIN, commit)
    return Located(repo, path, repo, commit, listing=listing)


def _cached(repo: str, revision: str | None, patterns: tuple[str, ...], why: str) -> Located:
    """The snapshot of a commit in the cache, or of the commit to which a branch or a tag led, without the network.
    why: there is none. InputError if it is not there, or not whole."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    revision = revision or MAIN
    what = f"{'commit' if is_commit(revision) else 'revision'} {revision}"
    absent = f"{repo}: {what} is not, or not wholly, in the cache, and {why}; %s to fetch what is missing"
    absent %= "unset it" if "HF_HUB_OFFLINE" in why else "connect"
    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=[*patterns], local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputError(absent) from None
    if not is_commit(path.name):
        raise InputError(f"{folder_of(repo) / 'refs' / revision}: holds no commit; remove it")
    if not _is_whole(path, patterns):
        raise InputError(absent)
    if revision != path.name:
        NOTICES.warning("%s: %s; the cache's commit of %s, %s, is used", repo, why, revision, path.name)
    return Located(repo, path, repo, path.name)


def _is_whole(path: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a snapshot holds what an artifact's dgq.json or a checkpoint's index lists of the files asked for."""
    if patterns == SMALL:
        return (path / "config.json").exists() or (path / PROVENANCE).exists()
    if patterns == ADAPTER:
        return all((path / name).exists() for name in ADAPTER)
    if (path / PROVENANCE).exists():
        listed = read_json(path / PROVENANCE).get("files")
    elif (path / INDEX).exists():
        shards = read_json(path / INDEX).get("weight_map")
        listed = {file: None for file in shards.values() if isinstance(file, str)} if isinstance(shards, dict) else None
    else:
        listed = {SINGLE: None}
    return isinstance(listed, dict) and all((path / name).exists() for name in listed)
