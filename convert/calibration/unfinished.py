"""The folder of an unfinished `dgq calibrate`: hidden states, drafts, and a file of sums for each stage that is done.

    .NAME.calibration/identity.json     what is being done; another command into the same place is refused
                      lock              held while somebody is at it
                      STAGE.done        a stage's result: tensors by name

Of several processes the first one writes what all share; each has hidden states of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from dgq.convert.calibration.stats import read_samples, sample_tensors
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.samples import Document
from dgq.convert.resume.journal import lock
from dgq.convert.resume.work import difference
from dgq.quant.errors import InputError


def save(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, about)
    except SafetensorError as error:  # a full disk, to the library
        raise InputError(f"{path}: cannot be written ({error}); the same command goes on from there") from None


class Unfinished:
    """The folder of an unfinished survey. Of several processes the first one writes what all share."""

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int, notice: Callable[[str], None]) -> None:
        self._folder, self._rank = folder, rank
        self._lock: BinaryIO | None = None
        wrong = [self._opened(identity, notice) if rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(wrong)
        if wrong[0] is not None:
            self.__exit__()
            raise InputError(wrong[0])

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _opened(self, identity: dict[str, Any], notice: Callable[[str], None]) -> str | None:
        """Make the folder, or go on with it, and lock it. What is wrong, if it cannot be."""
        folder, path = self._folder, self._folder / "identity.json"
        text = json.dumps(identity, sort_keys=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("ab")  # as long as this process lives
            lock(self._lock, f"{folder}: another dgq calibrate is at it")
            count = len(list(folder.glob("*.done")))
            there = path.read_text("utf-8", "replace") if path.is_file() else ""
            if there != text and (there or count):
                return (f"{folder}: another calibration's unfinished work, {difference(there, identity)}; finish it, or"
                        " remove it")  # fmt: skip
            if there:
                notice(f"going on with {folder}: {count} stages are done")
            (folder / "new").write_text(text, "utf-8")
            (folder / "new").replace(path)
        except InputError as error:
            return str(error)
        except OSError as error:
            return f"{folder}: cannot be written ({error})"
        return None

    def file(self, name: str) -> Any:
        path = self._folder / name
        return path.open("r+b" if path.exists() else "x+b", buffering=0)

    def has(self, name: str) -> bool:
        found = (self._folder / f"{name}.done").is_file()
        self._wait()
        return found

    def note(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._wait()  # until every process has its hidden states on the disk
        if self._rank == 0:
            save(tensors, self._folder / "new")
            with (self._folder / "new").open("rb") as file:
                os.fsync(file.fileno())
            (self._folder / "new").replace(self._folder / f"{name}.done")
        self._wait()

    def read(self, name: str) -> dict[str, Tensor]:
        file = self._folder / f"{name}.done"
        try:
            found: dict[str, Tensor] = load_file(file)
        except (SafetensorError, OSError) as error:  # hidden states have gone on from there
            raise InputError(f"{file}: damaged ({error}); remove {self._folder} and begin anew") from None
        return found

    def drafts(self, make: Callable[[], list[Document]], found: list[Document]) -> list[Document]:
        if not any(document.open for document in found):
            return found
        if not self.has("drafts"):
            done = make()
            self.note("drafts", {str(i): torch.tensor(d.ids) for i, d in enumerate(done)})
        ids = self.read("drafts")
        return [Document(tuple(ids[str(i)].tolist()), d.first, d.chat) for i, d in enumerate(found)]

    def walked(
        self, turn: int, new: list[Chunk], make: Callable[..., list[Chunk]], step: Callable[[], None]
    ) -> list[Chunk]:
        """`new` with the sampler's canvases. Every process makes all of them, each for itself."""
        name = f"{turn}-walked"
        if not self.has(name):
            with self.file(f"walks-{self._rank}") as file:
                self.note(name, sample_tensors(make(file, step)))
        return read_samples(self.read(name))

    def _wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()
