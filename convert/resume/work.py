"""Work of many hours in units: each one's result is a file as soon as it is done, and is not computed twice.

    .NAME.WHAT/identity.json             what is being done; another command into the same place is refused
    .NAME.WHAT/STAGE-00003.safetensors   a unit's result: tensors by name
    .NAME.WHAT/lock                      held while somebody is at it

WHAT is "validation" or "mix".

Under torchrun units are dealt out to the processes, each of which keeps a folder of its own, and every one of them has
all results in the end: what comes after is the same everywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from dgq.convert.resume.journal import lock
from dgq.quant.errors import InputError

Found = dict[str, Tensor]
Results = Callable[[int], Found]  # a unit's number -> its result, read from its file


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Work:
    """The folder of one command. advance(units done, units in all) is called as they are done. what: "validation", or
    whose work it is."""

    def __init__(
        self,
        out: Path,
        identity: dict[str, object],
        advance: Callable[[int, int], None],
        notice: Callable[[str], None],
        what: str = "validation",
    ) -> None:
        """InputError if another command's unfinished work lies there, or another process is at it."""
        self.rank, self.world = rank_and_world()
        name = f".{out.name[:200]}.{what}" + (f"-{self.rank}" if self.world > 1 else "")
        self.folder = out.absolute().parent / name
        self._advance, self._done, self.total = advance, 0, 0
        file = self.folder / "identity.json"
        text = json.dumps(identity, sort_keys=True, default=str)
        if file.is_file() and (there := file.read_text()) != text:
            differ = difference(there, identity)
            raise InputError(
                f"{out}: an unfinished {what} lies in {self.folder}, and {differ}; repeat its command to finish"
                " it, or remove that directory"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("ab")
        # the process's, as this object may be there still when a command has failed and is called again
        lock(self._lock, f"{self.folder}: another dgq is at it", process=True)
        if file.is_file():
            count = sum(1 for _ in self.folder.glob("*.safetensors"))
            notice(f"going on with an unfinished {what}: {count} results are there")
        _write(file, text.encode())

    def each(self, stage: str, count: int, do: Callable[[int], Found]) -> Results:
        """Do all units of a stage; those whose file is there are done. Every process has all results afterwards."""
        for unit in range(self.rank, count, self.world):
            if not self.has(stage, unit):
                found = {name: tensor.contiguous().cpu() for name, tensor in do(unit).items()}
                _write(self._file(stage, unit), save(found))
            self._tick()
        if self.world > 1:
            self._share(stage, count)
        return lambda unit: load(self._file(stage, unit).read_bytes())

    def holds(self, stage: str, count: int) -> bool:
        """Whether this process has nothing left to do in a stage."""
        return all(self.has(stage, unit) for unit in range(self.rank, count, self.world))

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def remove_if_empty(self) -> None:
        """After bad input: nothing is left behind, unless it is worth going on with."""
        if not any(self.folder.glob("*.safetensors")):
            self.remove()

    def _share(self, stage: str, count: int) -> None:
        for unit in range(count):
            owner = unit % self.world
            parcel = [self._file(stage, unit).read_bytes() if owner == self.rank else b""]
            dist.broadcast_object_list(parcel, src=owner)
            if owner != self.rank:
                _write(self._file(stage, unit), parcel[0])

    def _tick(self) -> None:
        self._done += self.world
        self._advance(min(self._done, self.total), self.total)

    def has(self, stage: str, unit: int) -> bool:
        """Whether a unit's result is there."""
        file = self._file(stage, unit)
        if not file.is_file():
            return False
        try:
            load(file.read_bytes())
        except (SafetensorError, OSError):
            return False
        return True

    def _file(self, stage: str, unit: int) -> Path:
        return self.folder / f"{stage}-{unit:05d}.safetensors"


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(file)


def difference(there: str, here: dict[str, object]) -> str:
    try:
        was = json.loads(there)
        now = json.loads(json.dumps(here, default=str))
        key = next(key for key in now | was if was.get(key) != now.get(key))
        return f"its {key} was {str(was.get(key))[:60]}, not {str(now.get(key))[:60]}"
    except (ValueError, AttributeError, StopIteration):
        return "it is damaged"


def numbers(**values: float) -> Found:
    """Plain numbers as a result."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
