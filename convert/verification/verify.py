"""`dgq verify`: whether an artifact is what its dgq.json says it is.

DIR or USER/NAME ── every byte of its files (files.py) ── with SRC: some weights quantised again (against.py)
                                                                └──> VerifyResult
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.hub import fetch_artifact, is_hub_id
from dgq.convert.verification.against import Sample, check_weights, source_revision
from dgq.convert.verification.files import Progress, check_files, total_bytes

Bar = Callable[[str, int], AbstractContextManager[Progress]]  # what is done, its bytes -> whom to tell of progress


@dataclass(frozen=True)
class VerifyOptions:
    """What `dgq verify` can be asked for.

    threads: files hashed at once, None for the CPU's cores. against: SRC, from which some weights are quantised again;
    adapters: directories of adapters to merge into it; sample: how many weights; seed: which ones. recipe: to hold the
    artifact to, None for dgq's own of its name or the rules in dgq.json. imatrix: the file that it was made with.
    revision: of the artifact on the Hub, else of SRC, which is otherwise taken at the commit that dgq.json names.
    """

    threads: int | None = None
    against: str | None = None
    sample: int = 8
    seed: int = 0
    recipe: str | None = None
    imatrix: Path | None = None
    revision: str | None = None
    adapters: Sequence[AdapterLike] = ()


@dataclass(frozen=True)
class VerifyResult:
    """problems: a line for each thing that is wrong; files, bytes: that were checked; revision: the commit, of an
    artifact on the Hub; compared: weights that were quantised again, left_out: kinds of tensors that cannot be; both
    None where no source was given, or the files were wrong already."""

    ok: bool
    problems: tuple[str, ...]
    files: int
    bytes: int
    revision: str | None = None
    compared: tuple[str, ...] | None = None
    left_out: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """What --json prints: no key for what is None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Progress]:
    """A progress bar that shows nothing."""
    yield lambda nbytes, name: None


def verify(artifact: str | Path, options: VerifyOptions | None = None, bar: Bar = no_bar) -> VerifyResult:
    """Check every byte of an artifact, a directory or USER/NAME on the Hub, and a sample of its weights if a source is
    given. InputError for what is no artifact, and for one that --against cannot prove."""
    options, published = options or VerifyOptions(), is_hub_id(str(artifact))
    where = fetch_artifact(str(artifact), options.revision) if published else None
    path = where.path if where else Path(artifact)
    threads = options.threads or os.cpu_count() or 1
    with bar("verifying", total_bytes(path)) as progress:
        checked = check_files(path, threads, progress, links=published)
    revision = where.revision if where else None
    if options.against is None or not checked.ok:
        return VerifyResult(checked.ok, checked.problems, checked.files, checked.bytes, revision)
    pinned = options.revision
    if published or pinned is None:
        pinned = source_revision(path, options.against)
    source = open_source(options.against, pinned, adapters=options.adapters)
    sample = Sample(options.sample, options.seed, options.recipe, options.imatrix, threads)
    weights = check_weights(path, source, sample)
    return VerifyResult(
        not weights.problems, weights.problems, checked.files, checked.bytes, revision, weights.compared,
        weights.left_out,
    )  # fmt: skip
