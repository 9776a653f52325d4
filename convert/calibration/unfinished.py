"""The folder of an unfinished `dgq calibrate`.

    .NAME.calibration/identity.json, lock         as in every folder of unfinished work (resume/folder.py)
                      drafts.safetensors          what the model wrote behind open documents
                      0-walked.safetensors        round 0's chunks, with canvases of the sampler
                      0-first.safetensors         empty: round 0's first pass is done
                      0-STAGE.safetensors         round 0's sums of a stage: enter, a layer's number, leave
                      states-RANK-N, walks-RANK   hidden states of one process

Of several processes the first one writes the results, which all of them read. Each has hidden states of its own. A
damaged result is an error: the hidden states have gone on from there, and cannot make it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgq.convert.calibration.samples_file import read_samples, sample_tensors
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import Document
from dgq.convert.resume import ranks
from dgq.convert.resume.folder import Refusals, WorkFolder, folder_of
from dgq.convert.resume.identity import Identity
from dgq.quant.errors import InputError


def calibration_folder(out: Path) -> Path:
    """Where the unfinished calibration of the STATS `out` lies."""
    return folder_of(out, "calibration")


class Unfinished:
    """The results of an unfinished calibration; a context that holds the folder's lock."""

    def __init__(self, out: Path, identity: Identity, notice: Callable[[str], None]) -> None:
        """Begin, or go on. InputError if another calibration's unfinished work lies there, or another process is at it;
        in every process if the first one meets it."""
        self.path = calibration_folder(out)
        self._folder: WorkFolder | None = None
        wrong = ranks.sent(self._open(identity, notice) if ranks.rank() == 0 else None)
        if wrong is not None:
            self._close()
            raise InputError(wrong)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def _open(self, identity: Identity, notice: Callable[[str], None]) -> str | None:
        """Open the folder; what is wrong, if it cannot be opened."""
        refusals = Refusals(
            busy=f"{self.path}: another dgq calibrate is at it",
            other=lambda words: f"{self.path}: another calibration's unfinished work, {words}; finish it, or remove it",
        )
        try:
            self._folder = WorkFolder(self.path, identity, refusals)
        except InputError as error:
            return str(error)
        except OSError as error:
            return f"{self.path}: cannot be written ({error})"
        if self._folder.resumed is not None:
            notice(f"going on with {self.path}: {self._folder.resumed} stages are done")
        return None

    def states_file(self, name: str) -> BinaryIO:
        """A file for hidden states, open for reading and writing, unbuffered; an earlier run's if it left one."""
        path = self.path / name
        return cast(BinaryIO, path.open("r+b" if path.exists() else "x+b", buffering=0))

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        there = (self.path / f"{name}.safetensors").is_file()
        ranks.wait()  # before a process that is ahead writes it
        return there

    def store(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a result of the first process, once every process has its hidden states on the disk."""
        ranks.wait()
        if self._folder is not None:
            self._folder.store(name, tensors)
        ranks.wait()

    def read(self, name: str) -> dict[str, Tensor]:
        """A result. InputError if it is damaged."""
        file = self.path / f"{name}.safetensors"
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged ({error}); remove {self.path} and begin anew") from None
        return tensors

    def drafts(self, make: Callable[[], list[Document]], documents: list[Document]) -> list[Document]:
        """The documents, the open ones continued; made by `make` unless they are there."""
        if not any(document.open for document in documents):
            return documents
        if not self.has("drafts"):
            self.store("drafts", {str(i): torch.tensor(d.ids) for i, d in enumerate(make())})
        ids = self.read("drafts")
        return [Document(tuple(ids[str(i)].tolist()), d.first, d.chat) for i, d in enumerate(documents)]

    def walked(self, turn: int, make: Callable[[BinaryIO], list[Chunk]]) -> list[Chunk]:
        """Round `turn`'s chunks with canvases of the sampler; made by `make`, which is given a file for hidden states,
        unless they are there. Every process makes all of them, each for itself."""
        name = f"{turn}-walked"
        if not self.has(name):
            with self.states_file(f"walks-{ranks.rank()}") as file:
                self.store(name, sample_tensors(make(file)))
        return read_samples(self.read(name))

    def remove(self) -> None:
        """Remove everything, once every process is done with it."""
        ranks.wait()
        if self._folder is not None:
            self._folder.remove()
