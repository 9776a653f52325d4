"""Sends what is ready to the Hub, through its own client: large files one by one, then everything in one commit.

    create repository, branch  ->  what is there  ->  large file, large file, …  ->  one commit  ->  its pinned id

Nothing is visible before the commit. The Hub knows a large file that arrived whole by its SHA-256, so that it is not
sent again when the command is run again after an interruption. The client sends through Xet where hf_xet is installed,
as the Hub itself wants it (chunks that arrived are not sent again either); HF_HUB_DISABLE_XET=1 makes it plain LFS, for
other hubs. The client finds the token; dgq never reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgq.convert.publication.prepare import Ready
from dgq.convert.source.transfer.answers import (
    AnswerError,
    RemoteFile,
    commit_of,
    files_of,
    is_commit,
    names_of,
    relative,
)
from dgq.convert.source.transfer.download import fetch
from dgq.convert.source.transfer.session import refuse, tame
from dgq.convert.verification.files import MANIFEST
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json

Json = dict[str, Any]
SILENCE = 120  # seconds that the Hub may take for an answer to a commit
LARGE = 10 << 20  # bytes from which on a file is sent by itself
HUBS = (".gitattributes",)  # made by the Hub in every repository
COPIED = ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")  # verbatim


def upstream(ready: Ready) -> list[str]:
    """A line for each thing that the Hub knows of the source and that is not as dgq.json says: the SHA-256 of its
    shards at its commit, and the files that were copied verbatim, by the git hash of their bytes. Sources that are not
    on the Hub are not asked for."""
    import huggingface_hub
    from huggingface_hub import errors

    source = ready.document["source"]
    repo, revision = source["repository"], source["revision"]
    if repo is None:
        return []
    tame()
    with _one_line(repo):
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=SILENCE)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return [f"source: {repo} at {revision} is not on the Hub (any more): its hashes cannot be compared"]
        compared = {*source["files"], *COPIED} & {*names_of(info)}
        there = {file.name: file for file in files_of(one for one in info.siblings if one.rfilename in compared)}
    return [*_shards(source["files"], there, repo), *_copies(ready, there, repo)]


def _shards(mine: Json, there: dict[str, RemoteFile], repo: str) -> Iterator[str]:
    for name, entry in mine.items():
        theirs = there.get(name)
        if theirs is None or not theirs.is_large:
            yield f"source: {repo} has no large file {name}, from which the artifact says it was made"
        elif theirs.digest != entry["sha256"]:
            yield f"source: {name} of {repo} is another file than the one that the artifact was made from"


def _copies(ready: Ready, there: dict[str, RemoteFile], repo: str) -> Iterator[str]:
    for name in COPIED:
        file, theirs = ready.contents.get(name), there.get(name)
        if theirs is None or not isinstance(file, Path):
            if theirs is not None or file is not None:
                yield f"{name}: is {'not' if theirs is None else 'only'} in {repo}"
            continue
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if theirs.digest != (ready.files[name]["sha256"] if theirs.is_large else git):
            yield f"{name}: is not that of {repo}, which the artifact names as its source"


def upload(
    ready: Ready, private: bool, revision: str | None, force: bool, notice: Callable[[str], None]
) -> str:  # fmt: skip
    """Send everything in one commit, and return its id. revision: the branch, None for main; notice is called with a
    line for each large file. Files that an earlier `dgq publish` left and that are no longer part of it are deleted;
    those of others stop it, unless forced. InputError, one line, for whatever the Hub or the network says."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if is_commit(revision):
        raise InputError(f"--revision {revision}: is a commit; name a branch to commit to")
    repo, files = ready.repo, ready.files
    tame(SILENCE)
    api = HfApi(library_name="dgq")
    with _one_line(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=SILENCE)
        if private and info.private is False:
            raise InputError(
                f"{repo}: is there already and public; nothing was sent. Leave --private out, or make it private"
            )
        commit = commit_of(info.sha)
        old = _stale(info, repo, set(files), force)
        adds = [CommitOperationAdd(name, str(data) if isinstance(data, Path) else data)
                for name, data in ready.contents.items()]  # fmt: skip
        for add in adds:
            add.upload_info.sha256 = bytes.fromhex(files[add.path_in_repo]["sha256"])  # `verify` has just read it all
        for add in sorted(adds, key=lambda one: files[one.path_in_repo]["bytes"]):
            size = files[add.path_in_repo]["bytes"]
            if size >= LARGE:
                notice(f"{repo}: {add.path_in_repo}, {size / 1e9:.2f} GB")
                api.preupload_lfs_files(repo, [add], revision=revision, free_memory=False)
        message = f"dgq {ready.document['dgq']}: {ready.document['recipe']} of {ready.document['source']['name']}"
        done = api.create_commit(
            repo, [*adds, *(CommitOperationDelete(name) for name in old)], commit_message=printable(message),
            revision=revision, parent_commit=commit,
        )  # fmt: skip
        return commit_of(done.oid)


def _stale(info: Any, repo: str, mine: set[str], force: bool) -> list[str]:
    """The files of the repository's last publication that this one has not. InputError if there are somebody else's."""
    names = {*names_of(info)}
    there = names - mine - set(HUBS)
    listed: set[str] = set()
    if there and MANIFEST in names:
        manifest = files_of(one for one in info.siblings if one.rfilename == MANIFEST)
        files = read_json(fetch(repo, commit_of(info.sha), manifest) / MANIFEST).get("files")
        listed = set(files) if isinstance(files, dict) else set()
    if (others := sorted(there - listed)) and not force:
        more = f" and {len(others) - 1} more files" if others[1:] else ""
        raise InputError(
            f"{repo}: holds {others[0]}{more} that dgq did not put there;"
            " choose another --repo, or --force to leave them beside it"
        )
    return sorted(map(relative, there & listed))


def collect(several: Sequence[Ready], repo: str, private: bool) -> str:
    """Make or complete a collection of the published repositories, and return its address on the Hub."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="dgq")
    owner, title = repo.split("/")
    with _one_line(repo):
        made = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        if not isinstance(made.slug, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", made.slug, re.ASCII):
            raise AnswerError(f"the Hub gives {str(made.slug)[:80]!r} as the collection's address")
        for one in several:
            note = f"{one.data['recipe']['name']}, {one.data['gigabytes']} GB"
            api.add_collection_item(made.slug, one.repo, "model", note=note, exists_ok=True)
    return str(made.slug)


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """InputError, one line, for failures of the Hub, of the network and of the client's own threads."""
    try:
        yield
    except AnswerError as error:
        refuse(repo, error)
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__
        if isinstance(error, RuntimeError) and isinstance(cause, Exception):  # "Error while uploading …", from
            error = cause
        try:
            refuse(repo, error)
        except InputError as line:
            raise InputError(f"{line}; what arrived whole is not sent again") from None
        except Exception as error:  # hf_xet's, mostly
            reason = printable(str(error))[:300] or type(error).__name__
            raise InputError(f"{repo}: not published ({reason}); run the command again") from None
