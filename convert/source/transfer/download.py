"""Files of a listing, into the cache that huggingface_hub and the programs on it share.

    models--USER--NAME/blobs/HASH.incomplete       continued where an earlier run broke off, checked by its hash, then
                       blobs/HASH
                       snapshots/COMMIT/NAME       a link to it; the file itself where links are not allowed
                       refs/main                   the commit that was asked for by that name

The bytes come by huggingface_hub's http_get. Its hf_hub_download would start a broken file over (2.4 keeps no part of
it), checks no hash, and makes a path of what a server gives as ETag. It serves for files above 50 GB, which the Hub
has by Xet only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from dgq.convert.source.transfer.answers import AnswerError, Bounded, RemoteFile, relative
from dgq.convert.source.transfer.session import reason, refuse
from dgq.quant.errors import InputError
from dgq.quant.files.places import free_bytes


def folder_of(repo: str) -> Path:
    """Where the cache holds a repository of models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def fetch(repo: str, commit: str, files: Sequence[RemoteFile]) -> Path:
    """Fetch what the cache lacks of these files, and return the snapshot's folder. InputError, one line, if the Hub
    refuses, the download breaks off, a file is damaged, or the disk has no room for what was announced."""
    snapshot = folder_of(repo) / "snapshots" / commit
    missing = [file for file in files if not (snapshot / file.name).exists()]
    snapshot.mkdir(parents=True, exist_ok=True)
    _check_room(repo, snapshot, sum(file.size for file in missing))
    for file in missing:
        link = _inside(snapshot, file.name)
        _link(_fetch_blob(repo, commit, file), link)
    for file in files:
        path = snapshot / file.name
        if (size := path.stat().st_size) != file.size:
            raise InputError(
                f"{path}: the cached copy has {size} bytes, the Hub's {file.size};"
                f" remove {path.resolve()} and run the command again"
            )
    return snapshot


def note_revision(repo: str, revision: str, commit: str) -> None:
    """Remember for offline use to which commit a branch or a tag led. A cache that cannot be written is left alone."""
    try:
        ref = _inside(folder_of(repo) / "refs", relative(revision))
        if not ref.is_file() or ref.read_text(encoding="ascii") != commit:
            ref.write_text(commit, encoding="ascii")
    except (OSError, ValueError, AnswerError):
        return


def _inside(folder: Path, name: str) -> Path:
    """The place of a file in a folder, which is made. AnswerError if links lead out of the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise AnswerError(f"{path}: its folder lies outside of {folder}")
    return path


def _check_room(repo: str, folder: Path, size: int) -> None:
    free = free_bytes(folder)
    if size > free:
        raise InputError(f"{repo}: {size} bytes are to be fetched, and {folder} has room for {free}; set HF_HOME")


def _fetch_blob(repo: str, commit: str, file: RemoteFile) -> Path:
    """One file among the cache's blobs, fetched if it is not there."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    blob = _inside(folder_of(repo) / "blobs", file.digest)
    part = blob.with_name(f"{blob.name}.incomplete")
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"  # the library's own
    if blob.exists():
        return blob
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        path = Path(hf_hub_download(repo, file.name, revision=commit))
        _check(repo, file, path, path.resolve())
        return path.resolve()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock), part.open("ab") as out:
        if blob.exists():  # another process was faster
            part.unlink()
            return blob
        try:
            _download(repo, commit, file, out)
        except AnswerError as error:  # What came of it is not of the file.
            out.close()
            part.unlink()
            raise InputError(f"{repo}: {file.name}: {error}") from None
        out.close()
        _check(repo, file, part, part)
        part.replace(blob)
    return blob


def _check(repo: str, file: RemoteFile, path: Path, real: Path) -> None:
    """InputError, and the file is removed, if it is not the one whose hash the Hub gave."""
    size = path.stat().st_size
    sha = hashlib.sha256() if file.is_large else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as done:
        while piece := done.read(1 << 20):
            sha.update(piece)
    if sha.hexdigest() != file.digest:
        real.unlink()
        raise InputError(
            f"{repo}: {file.name} arrived damaged ({size} of {file.size} bytes, its hash is not the Hub's); run the"
            " command again to fetch it anew"
        )


def _download(repo: str, commit: str, file: RemoteFile, out: BinaryIO) -> None:
    """Append to `out` what it lacks of a file. InputError if the Hub refuses, sends too much, or breaks off."""
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name, begun = file.name, out.tell()
    bounded = cast(Any, Bounded(out, file.size))
    try:
        if begun < file.size:
            url = hf_hub_url(repo, name, revision=commit)
            http_get(url, bounded, resume_size=begun, headers=build_hf_headers(), displayed_filename=name)
    except errors.HTTPError as error:
        if hasattr(error, "response"):  # an answer of the Hub, not a broken connection
            refuse(repo, error, name)
        out.flush()
        raise InputError(
            f"{repo}: the download of {name} broke off at {Path(out.name).stat().st_size} of {file.size} bytes"
            f" ({reason(error)}); run the command again to continue it"
        ) from None
    out.flush()


def _link(blob: Path, link: Path) -> None:
    """Make the snapshot's entry of a blob. Where links need a right (Windows) or are not known, the file moves."""
    if link.exists():
        return
    link.unlink(missing_ok=True)  # it led to a blob that is gone
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:
        blob.replace(link)
