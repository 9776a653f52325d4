"""`--ram` and `--vram`: what the user allows, or what is free, against what convert/layerwise/estimate.py counts."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dgq.convert.layerwise.estimate import Needs
from dgq.convert.source.sizes import shown
from dgq.quant.errors import InputError

SHARE = 0.8  # of the free memory is taken without a budget
SLICES = 410 << 20  # VRAM of a thread that converts without STATS: 1.6 GiB of four, on an H200
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True)
class Budget:
    """The bytes that --ram and --vram allow; None: SHARE of what is free."""

    ram: int | None = None
    vram: int | None = None

    def room(self, needs: Needs, device: str, work: str) -> int:
        """Bytes that are left for Hessians; those that are quantised together fit. InputError, which names the least
        that the work takes, if that is above the budget. work: what is to be done, for that line."""
        if device == "cuda":
            _fits("--ram", self.ram, free_ram(), needs.ram(), work)
        asked, free = (self.ram, free_ram()) if device == "cpu" else (self.vram, _free_vram())
        moments = needs.moments()
        worst = max(moments, key=lambda moment: sum(moments[moment].values()))
        limit = _fits("--ram" if device == "cpu" else "--vram", asked, free, moments[worst], f"{work} ({worst})")
        held = [moment for moment in moments.values() if "Hessians" in moment]
        room = min((limit - sum(m.values()) + m["Hessians"] for m in held), default=0)
        if device == "cpu" and (self.ram is not None or room < needs.hessians):
            _no_holes()
        return room

    def threads(self, wanted: int, base: int, each: int, device: str) -> int:
        """As many threads as the budget holds, up to those wanted. A thread takes `each` bytes of RAM, beside `base`
        for all, and SLICES bytes on a GPU. InputError if the budget holds none."""
        work, slices = "converting", "slices of a thread"
        limit = _fits("--ram", self.ram, free_ram(), {"libraries": base, slices: each}, work)
        wanted = min(wanted, (limit - base) // each)
        if device == "cuda":
            wanted = min(wanted, _fits("--vram", self.vram, _free_vram(), {slices: SLICES}, work) // SLICES)
        return wanted

    def enforce(self) -> None:
        """Let torch keep to --vram: what it caches beyond it is given back first."""
        if self.vram is not None and torch.cuda.is_available():
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.vram / total))


def _no_holes() -> None:
    """Let malloc ask the system for every large block and give it back. Otherwise blocks of up to 32 MiB lie in one
    heap, where the holes between Hessians took 2 GiB more. This costs page faults."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def free_ram() -> int:
    """Bytes that this process could take: what the system and its control group have available, shared among the
    processes of torchrun on this machine."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = _half_of_all()
    try:
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        used = int((group / "memory.current").read_text("utf-8")) - int(stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text("utf-8")) - used)
    except (OSError, KeyError, ValueError):
        pass  # no such group, or no limit
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _half_of_all() -> int:
    """Half of the machine's memory, in bytes; 4 GiB where the system does not tell how much that is."""
    if not hasattr(os, "sysconf"):  # Windows
        return 4 << 30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_vram() -> int:
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def _fits(option: str, asked: int | None, free: int, parts: dict[str, int], work: str) -> int:
    """The limit in bytes. InputError if the parts take more."""
    limit = int(SHARE * free) if asked is None else asked
    if sum(parts.values()) > limit:
        given = f"{option} {shown(asked)}" if asked is not None else f"{SHARE:.0%} of what is free, {shown(limit)}"
        most = ", ".join(f"{what} {shown(n)}" for what, n in sorted(parts.items(), key=lambda p: -p[1]) if n)
        other = "" if asked is not None else f"; free some, or give {option} to try all the same"
        raise InputError(f"{given}: {work} needs {shown(sum(parts.values()))} at least: {most}{other}")
    return limit


UNSAID = Budget()
