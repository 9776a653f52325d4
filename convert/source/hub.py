"""Where a SRC lies: the embedded `tiny`, a local directory, or a Hub id fetched through huggingface_hub.

A Hub id is pinned to the commit it resolved to; that commit goes into every artifact made from it.

    model_info       one request: the commit, every file's size, the SHA-256 of the large ones
    large files      into the Hub's cache as HASH.incomplete, continued where an earlier run broke off, then checked
    the rest         snapshot_download, which finds the large ones in the cache

huggingface_hub alone would start a broken file over, and wait for as long as the Hub asks. dgq continues the file, and
reports a long wait in place of waiting.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import unquote

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_index
from dgq.quant.types import Spec

TINY = "tiny"
SMALL = ("*.json", "*.jinja", "tokenizer.model", "LICENSE", "NOTICE")
WANTED = (*SMALL, "*.safetensors")
TIMEOUT = 10  # seconds of silence; model_info has no limit of its own
PATIENCE = 10  # seconds; if the Hub wants a longer wait, dgq does not wait and says so


@dataclass(frozen=True)
class Located:
    """Where a SRC lies. asked: what the user wrote; repo, revision (a commit hash): of a Hub source only."""

    asked: str
    path: Path
    repo: str | None = None
    revision: str | None = None

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
    return _fetch(repo, None, ("adapter_config.json", "adapter_model.safetensors")).path


def _fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Located:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    if huggingface_hub.is_offline_mode():
        return Located(repo, _cached(repo, revision, patterns), repo, revision)
    tame()
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        if not is_commit(info.sha):
            raise KeyError("sha")  # to download without a commit would be to follow a branch
        wanted = list(filter_repo_objects(info.siblings, allow_patterns=list(patterns), key=lambda f: f.rfilename))
        for file in wanted:
            if file.lfs is not None:
                _fetch_large(repo, info.sha, file)
        path = Path(huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=list(patterns)))
    except Exception as error:  # every failure of the network or the Hub becomes one line
        refuse(repo, error)
    for file in wanted:
        size = (path / file.rfilename).stat().st_size
        if file.size not in (None, size):
            raise InputError(
                f"{path / file.rfilename}: the cached copy has {size} bytes, the Hub's {file.size};"
                f" remove {(path / file.rfilename).resolve()} and run the command again"
            )
    return Located(repo, path, repo, info.sha)


def _fetch_large(repo: str, commit: str, file: Any) -> None:
    """Put one LFS file among the cache's blobs, where snapshot_download looks before it downloads."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    cache, folder = Path(constants.HF_HUB_CACHE), f"models--{repo.replace('/', '--')}"
    blob = cache / folder / "blobs" / file.lfs.sha256
    part = blob.with_name(f"{blob.name}.incomplete")
    lock = cache / ".locks" / folder / f"{blob.name}.lock"  # the library's own
    if blob.exists() or (cache / folder / "snapshots" / commit / file.rfilename).exists():
        return
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # the Hub serves such files by Xet only; the library speaks that, and starts over if it breaks
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock), part.open("ab") as out:
        if blob.exists():  # another process was faster
            part.unlink()
            return
        _download(repo, commit, file, out)
        with part.open("rb") as done:
            right = hashlib.file_digest(done, "sha256").hexdigest() == blob.name
        if not right:
            part.unlink()
            raise InputError(
                f"{repo}: {file.rfilename} arrived damaged ({out.tell()} of {file.size} bytes, its SHA-256 is not the"
                " Hub's); run the command again to fetch it anew"
            )
        part.replace(blob)


def _download(repo: str, commit: str, file: Any, out: BinaryIO) -> None:
    """Append to `out` what it lacks of a file. InputError if the Hub refuses, or the download breaks off."""
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name, size = file.rfilename, file.size
    try:
        if out.tell() < size:
            url = hf_hub_url(repo, name, revision=commit)
            http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), displayed_filename=name)
    except errors.HTTPError as error:
        if hasattr(error, "response"):  # an answer of the Hub, not a broken connection
            refuse(repo, error, name)
        out.flush()
        raise InputError(
            f"{repo}: the download of {name} broke off at {Path(out.name).stat().st_size} of {size} bytes"
            f" ({_reason(error)}); run the command again to continue it"
        ) from None
    out.flush()


def _cached(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The snapshot of a commit in the cache, without the network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not is_commit(revision):
        raise InputError(
            f"{repo}: HF_HUB_OFFLINE is set; unset it, or name a cached commit with --revision (40 hex digits)"
        )
    wanted = list(patterns)
    try:
        path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True)
    except LocalEntryNotFoundError:
        raise InputError(
            f"{repo}: commit {revision} is not, or not wholly, in the cache, and HF_HUB_OFFLINE is set;"
            " unset it to fetch what is missing"
        ) from None
    return Path(path)


def remote_specs(repo: str, commit: str) -> dict[str, Spec]:
    """The header entry of every tensor of a Hub repository. Headers are fetched by ranged requests, and no other byte
    of the weights."""
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return read_index(_cached(repo, commit, WANTED))
    try:
        metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=commit)
    except Exception as error:
        refuse(repo, error)
    return {
        name: Spec(name, tuple(tensor.shape), tensor.dtype, Path(file), *tensor.data_offsets)
        for file, entry in metadata.files_metadata.items()
        for name, tensor in entry.tensors.items()
    }


def is_commit(revision: str | None) -> bool:
    """Whether it is a whole commit hash."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def tame(silence: float = TIMEOUT) -> None:
    """Make huggingface_hub quiet, since dgq reports errors itself, in one line: no log of its retries, none of its long
    waits, no progress bars in a log file. silence: seconds that an answer may take."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status

    def no_long_wait(response: Any) -> None:
        if response.status_code >= 400 and (_wait(response) or 0) > PATIENCE:
            hf_raise_for_status(response)

    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    plain = huggingface_hub.get_session()
    hooks = {"request": plain.event_hooks["request"], "response": [no_long_wait]}
    huggingface_hub.set_client_factory(lambda: type(plain)(event_hooks=hooks, follow_redirects=True, timeout=silence))


def _wait(response: Any) -> int | None:
    """Seconds until the Hub wants to be asked again, if it says so."""
    spent = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    match = spent or re.fullmatch(r"\s*(\d+)\s*", response.headers.get("Retry-After", ""))
    return int(match[1]) if match else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _words(error: Any) -> str:
    """The Hub's message about an error; a token in it is made unreadable."""
    return re.sub(r"hf_\w+", "hf_…", error.server_message or "")


def refuse(repo: str, error: Exception, file: str | None = None) -> NoReturn:
    """Turn an exception of huggingface_hub or of its transport into an InputError, and raise any other again.

    file: the one that was asked for, where the address may not name it (large files lie elsewhere).
    """
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what happened; that the cache does not help either goes without saying
    if isinstance(error, errors.HfHubHTTPError):
        raise InputError(f"{repo}: {_answer(repo, error, file)}") from None
    strange = (errors.FileMetadataError, json.JSONDecodeError, KeyError, TypeError)
    not_hub = f"{constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}); a proxy or a login page?"
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (errors.HFValidationError, "is no valid Hub id (USER/NAME)"),
        (errors.NotASafetensorsRepoError, "holds no model.safetensors or its index"),
        (errors.SafetensorsParsingError, "holds a safetensors file whose header is unreadable"),
        (strange, f"{not_hub} check the network and HF_ENDPOINT"),
    )
    for kind, text in kinds:
        if isinstance(error, kind):
            raise InputError(f"{repo}: {text}") from None
    if type(error).__module__.startswith("http"):  # the client library of the day
        raise InputError(
            f"{repo}: {constants.ENDPOINT} cannot be reached ({_reason(error)}); check the network and HF_ENDPOINT"
        ) from None
    if isinstance(error, (OSError, ValueError)):  # the disk; a file too large for plain HTTP and no hf_xet
        raise InputError(f"{repo}: {error}") from None
    raise error


def _answer(repo: str, error: Any, file: str | None) -> str:
    """What an error status of the Hub means, and what to do about it."""
    from huggingface_hub import constants, errors

    response, status, wait = error.response, error.response.status_code, _wait(error.response)
    request = (response.history or [response])[0].request  # before it was sent on to where large files lie
    about = re.search(r"/(?:revision|resolve)/([^/]+)(?:/(.+))?$", unquote(request.url.path))
    revision, file = (about[1], file or about[2]) if about else (None, file)
    if isinstance(error, errors.GatedRepoError):
        text = f"it is gated; accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
    elif status == 401 and "Authorization" in request.headers:
        text = "your token is not valid (any more); log in with `hf auth login`, or correct HF_TOKEN"
    elif status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        text = "it is not on the Hub, or private; check the name, log in with `hf auth login`"
    elif status == 403:
        text = f"{_words(error) or 'forbidden'}; check the rights of your token on the Hub"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"it has no revision {revision}; check --revision"
    elif isinstance(error, errors.EntryNotFoundError):
        text = "the file is listed, but not there; take another --revision, or tell the model's owner"
    elif status in (409, 412):
        text = f"{_words(error) or 'conflict'}; somebody else changes it at this moment, run the command again"
    elif status == 429:
        text = f"too many requests; wait {f'{wait} seconds' if wait else 'some minutes'} and run the command again"
    elif status >= 500:
        text = f"the Hub is in trouble; run the command again in {f'{wait} seconds' if wait else 'some minutes'}"
    else:
        text = _words(error) or "dgq does not know why; run the command again later"
    return f"the Hub answered {status}{f' for {file}' if file else ''}: {text}"
