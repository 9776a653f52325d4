"""Work of many hours in units: each unit's result is kept as soon as it is there, and is not computed twice.

    .NAME.WHAT/STAGE-00003.safetensors   the result of unit 3 of a stage, in a folder of unfinished work (folder.py)

WHAT is "validation" or "mix". Under torchrun units are dealt out to the processes. Each process keeps a folder of its
own, .NAME.WHAT-RANK, and gets the other processes' results at the end of a stage, so that what comes after is the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dgq.convert.resume import ranks
from dgq.convert.resume.folder import Refusals, WorkFolder, folder_of, replace
from dgq.convert.resume.identity import Identity

UnitResult = dict[str, Tensor]
UnitResults = Callable[[int], UnitResult]  # a unit's number -> its result, read from its file


class Work:
    """The units of one command. As a context it removes its folder when everything went well; otherwise it keeps the
    results that there are, and leaves nothing behind if there are none."""

    def __init__(
        self,
        out: Path,
        identity: Identity,
        advance: Callable[[int, int], None],
        notice: Callable[[str], None],
        what: str = "validation",
    ) -> None:
        """advance: called with units done and units in all. what: whose work it is. InputError if another command's
        unfinished work lies there, or another process is at it."""
        self.rank, self.world = ranks.rank(), ranks.world()
        path = folder_of(out, what + (f"-{self.rank}" if self.world > 1 else ""))
        refusals = Refusals(
            busy=f"{path}: another dgq is at it",
            other=lambda words: (
                f"{out}: an unfinished {what} lies in {path}, and {words}; repeat its command to finish"
                " it, or remove that directory"
            ),
        )
        self._folder = WorkFolder(path, identity, refusals)
        self._advance, self._done, self.total = advance, 0, 0
        if self._folder.resumed is not None:
            notice(f"going on with an unfinished {what}: {self._folder.resumed} results are there")

    @property
    def path(self) -> Path:
        """The folder, for files that are worth nothing without the results."""
        return self._folder.path

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            ranks.wait()  # another process may have to read its results yet
        if error is None or not self._folder.results():
            self._folder.remove()
        self._folder.close()

    def each(self, stage: str, count: int, do: Callable[[int], UnitResult]) -> UnitResults:
        """Do all units of a stage but those whose result is there. Every process has all results afterwards."""
        for unit in range(self.rank, count, self.world):
            if not self.has(stage, unit):
                tensors = {name: tensor.contiguous().cpu() for name, tensor in do(unit).items()}
                self._folder.store(_name(stage, unit), tensors)
            self._tick()
        if self.world > 1:
            self._share(stage, count)
        return lambda unit: load(self._file(stage, unit).read_bytes())

    def has(self, stage: str, unit: int) -> bool:
        """Whether a unit's result is there, and whole."""
        try:
            load(self._file(stage, unit).read_bytes())
        except (SafetensorError, OSError):
            return False
        return True

    def _share(self, stage: str, count: int) -> None:
        for unit in range(count):
            file, owner = self._file(stage, unit), unit % self.world
            parcel = ranks.sent(file.read_bytes() if owner == self.rank else b"", owner)
            if owner != self.rank:
                replace(file, parcel)

    def _tick(self) -> None:
        self._done += self.world
        self._advance(min(self._done, self.total), self.total)

    def _file(self, stage: str, unit: int) -> Path:
        return self._folder.file(_name(stage, unit))


def _name(stage: str, unit: int) -> str:
    return f"{stage}-{unit:05d}"


def numbers(**values: float) -> UnitResult:
    """Plain numbers as a result."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
