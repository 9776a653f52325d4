"""Where a SRC lies: the embedded `tiny`, a local directory, or a Hub id fetched through huggingface_hub.

A Hub id is pinned to the commit it resolved to; that commit goes into every artifact made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from dgq.quant.errors import InputError
from dgq.quant.types import Spec

TINY = "tiny"
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
SMALL = ("*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Located:
    """asked: what the user wrote. repo and revision (a commit hash) are set for Hub sources only."""

    asked: str
    path: Path
    repo: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What to call the model: the repository's, directory's or embedded model's name."""
        return self.repo.split("/")[-1] if self.repo else self.asked if self.asked == TINY else self.path.resolve().name


def is_hub_id(asked: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", asked) is not None and not Path(asked).exists()


def locate(asked: str, revision: str | None = None, *, weights: bool = True) -> Located:
    """Find or fetch SRC. weights=False fetches only the small files of a Hub id (enough for a plan)."""
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


def _fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Located:
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(repo, revision=revision).sha
        path = huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=list(patterns))
    except Exception as error:  # every failure of the network or the Hub becomes one line
        refuse(repo, error)
    return Located(repo, Path(path), repo, commit)


def remote_specs(repo: str, commit: str) -> dict[str, Spec]:
    """Every tensor's header entry of a Hub repository, by ranged requests: no other byte of the weights is fetched."""
    import huggingface_hub

    try:
        metadata = huggingface_hub.HfApi().get_safetensors_metadata(repo, revision=commit)
    except Exception as error:
        refuse(repo, error)
    return {
        name: Spec(name, tuple(tensor.shape), tensor.dtype, Path(file), *tensor.data_offsets)
        for file, entry in metadata.files_metadata.items()
        for name, tensor in entry.tensors.items()
    }


def refuse(repo: str, error: Exception) -> NoReturn:
    """Turn an exception of huggingface_hub or its transport into an InputError; re-raise what is none of theirs."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (errors.GatedRepoError, "is gated; accept its terms on the Hub, then log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "has no such revision"),
        (errors.RepositoryNotFoundError, "is not on the Hub, or private: check the name, log in with `hf auth login`"),
        (errors.LocalEntryNotFoundError, "cannot be reached and is not in the local cache; check the network"),
        (errors.NotASafetensorsRepoError, "holds no model.safetensors or its index"),
        (errors.SafetensorsParsingError, "holds a safetensors file whose header is unreadable"),
        (errors.HfHubHTTPError, f"the Hub answered {status}; try again later"),
        ((OSError, errors.OfflineModeIsEnabled), "cannot be reached; check the network"),
    )
    for kind, text in kinds:
        if isinstance(error, kind):
            raise InputError(f"{repo}: {text}") from None
    if type(error).__module__.startswith(("http", "requests", "urllib3")):  # the client library of the day
        raise InputError(f"{repo}: cannot be reached ({type(error).__name__}); check the network") from None
    raise error
