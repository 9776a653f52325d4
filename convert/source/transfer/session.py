"""The client of the Hub as dgq uses it, and its errors as one line: what happened, and what to do about it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NoReturn
from urllib.parse import unquote

from dgq.convert.source.transfer.answers import AnswerError, hold, hold_request
from dgq.quant.errors import InputError

TIMEOUT = 10  # seconds of silence; model_info has no limit of its own
PATIENCE = 10  # seconds; if the Hub wants a longer wait, dgq does not wait and says so


def tame(silence: float = TIMEOUT) -> None:
    """Make huggingface_hub quiet, since dgq reports errors itself, in one line: no log of its retries, none of its long
    waits, no progress bars in a log file. Every answer is held to its form. silence: seconds that one may take."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status

    def no_long_wait(response: Any) -> None:
        if response.status_code >= 400 and (_wait(response) or 0) > PATIENCE:
            hf_raise_for_status(response)

    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    plain = huggingface_hub.get_session()
    hooks = {"request": [*plain.event_hooks["request"], hold_request], "response": [hold, no_long_wait]}
    headers = {"Accept-Encoding": "identity"}  # What is packed could become of any size.
    huggingface_hub.set_client_factory(
        lambda: type(plain)(event_hooks=hooks, headers=headers, follow_redirects=True, timeout=silence)
    )


def _wait(response: Any) -> int | None:
    """Seconds until the Hub wants to be asked again, if it says so."""
    spent = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    match = spent or re.fullmatch(r"\s*(\d+)\s*", response.headers.get("Retry-After", ""))
    return int(match[1]) if match else None


def is_unreachable(error: Exception) -> bool:
    """Whether no answer came: a broken connection, a name that is not known, a long silence."""
    return type(error).__module__.startswith("http") and not hasattr(error, "response")


def reason(error: Exception) -> str:
    """An exception's class and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _words(error: Any) -> str:
    """The Hub's message about an error; a token in it is made unreadable."""
    return re.sub(r"hf_\w+", "hf_…", error.server_message or "")[:300]


def refuse(repo: str, error: Exception, file: str | None = None) -> NoReturn:
    """Turn an exception of huggingface_hub or of its transport into an InputError, and raise any other again.

    file: the one that was asked for, where the address may not name it (large files lie elsewhere).
    """
    from huggingface_hub import constants, errors

    if isinstance(error, InputError):
        raise (InputError(f"{repo}: {error}") if isinstance(error, AnswerError) else error) from None
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what happened; that the cache does not help either goes without saying
    if isinstance(error, errors.HfHubHTTPError):
        raise InputError(f"{repo}: {_answer(repo, error, file)}") from None
    strange = (errors.FileMetadataError, json.JSONDecodeError, KeyError, TypeError)
    not_hub = f"{constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}); a proxy or a login page?"
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (errors.HFValidationError, "is no valid Hub id (USER/NAME)"),
        (strange, f"{not_hub} check the network and HF_ENDPOINT"),
    )
    for kind, text in kinds:
        if isinstance(error, kind):
            raise InputError(f"{repo}: {text}") from None
    if type(error).__module__.startswith("http"):  # the client library of the day
        raise InputError(
            f"{repo}: {constants.ENDPOINT} cannot be reached ({reason(error)}); check the network and HF_ENDPOINT"
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
