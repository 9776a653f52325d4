"""Conversions that are killed, or run out of disk, and go on: does the artifact ever differ from an uninterrupted one?

    python tests/tools/faults.py [--moments 30] [--recipes nvfp4 bnb4-dq …] [--folder DIR] [--seed 0]

Makes a random checkpoint of about 80 MB and converts it to each recipe once, uninterrupted. Then, a recipe:

    SIGKILL     at `moments` moments spread over the bytes that are written, on a disk made slow and synced every
                0.1 s; the command again; every fifth is killed once more on its second run
    full disk   a file system of its own (tmpfs; mounting needs root) that a ballast file fills to several degrees while
                the conversion writes; ballast away, the command again

Every file of every artifact is compared. Prints a table, and one JSON line last. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from micro import micro_config, write_micro

from dgq.convert.resume.journal import paths

CODE = """
import os, time
import dgq.convert.resume.journal as journal, dgq.convert.write.slices as slices
from dgq.convert.cli.__main__ import main

journal.SYNC_SECONDS, slices.SLICE["cpu"] = 0.1, 1 << 19
pwrite = os.pwrite
os.pwrite = lambda file, data, at: time.sleep(len(data) / 40e6) or pwrite(file, data, at)  # a disk of 40 MB/s
main()
"""
RECIPES = {
    "nvfp4": ("--to", "nvfp4", "--input-scale", "0.01"),
    "nvfp4-w4a16": ("--to", "nvfp4", "--recipe", "nvfp4-w4a16"),
    "bnb4": ("--to", "bnb4"),
    "bnb4-dq": ("--to", "bnb4", "--recipe", "bnb4-dq"),
    "q4_k_m": ("--to", "gguf"),
}
DEGREES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95)  # of the artifact that the disk has room for
KILLED_TWICE = 5  # one of so many
ROOM = 66 << 20  # what a conversion wants free besides the artifact, and a little more
COLUMNS = ("runs", "killed", "partial", "resumed", "killed twice", "disk full", "mismatches")


@dataclass(frozen=True)
class Baseline:
    """An uninterrupted conversion: its command but for -o, every file's SHA-256, bytes."""

    command: list[str]
    files: dict[str, str]
    size: int


def write_checkpoint(path: Path) -> Path:
    """Three layers of 32 experts, 512 wide."""
    from dgq.runtime.shape.config import ModelConfig
    from dgq.runtime.shape.names import expected_tensors

    config = micro_config()
    config["text_config"] |= {
        "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 32,
        "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "head_dim": 64, "global_head_dim": 128,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(ModelConfig.from_json(config, "config.json"))
    tensors = {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()}
    return write_micro(path, config, tensors, shards=3)


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def start(command: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=600)[1]
    assert "Traceback" not in said, said
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], pattern: str, folder: Path) -> None:
    """Until a path is there, or the process has ended."""
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.001)


def uninterrupted(recipe: str, source: Path, folder: Path) -> Baseline:
    command = [
        sys.executable,
        "-c",
        CODE,
        "convert",
        str(source),
        *RECIPES[recipe],
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    out = folder / "whole"
    code, said = finish(start(command, out))
    assert code == 0, said
    found = Baseline(command, digests(out), sum(file.stat().st_size for file in out.iterdir()))
    shutil.rmtree(out)
    return found


def kill_at(base: Baseline, out: Path, fraction: float) -> tuple[bool, bool]:
    """Start the conversion, and kill it when this part of what was missing is written.

    Was it killed, and did it say that it went on with something?
    """
    already = written(out)
    process = start(base.command, out)
    wait_until_locked(process, out)
    while process.poll() is None and written(out) - already <= fraction * (base.size - already):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    code, said = finish(process)
    return code == -signal.SIGKILL, "going on" in said


def wait_until_locked(process: subprocess.Popen[str], out: Path) -> None:
    path = paths(out)[1]
    while process.poll() is None and not (
        path.exists() and f":{path.stat().st_ino} " in Path("/proc/locks").read_text()
    ):
        time.sleep(0.001)


def written(out: Path) -> int:
    """Bytes of the partial directory that have a place on the disk."""
    try:
        return sum(512 * file.stat().st_blocks for file in paths(out)[0].iterdir())
    except FileNotFoundError:  # not yet there, or renamed already
        return 0


def settle(base: Baseline, out: Path, counts: Counter[str]) -> None:
    """The command again, unless the conversion was through; compare, and remove."""
    if not out.exists():
        code, said = finish(start(base.command, out))
        assert code == 0, said
        counts["resumed"] += "going on" in said
    counts["mismatches"] += digests(out) != base.files
    shutil.rmtree(out)
    paths(out)[1].unlink(missing_ok=True)  # left by a kill between the rename and its removal
    assert not any(out.parent.glob(f".{out.name}*")), list(out.parent.iterdir())


def killed_at(base: Baseline, out: Path, fraction: float, again: float | None, counts: Counter[str]) -> None:
    counts["runs"] += 1
    killed, _ = kill_at(base, out, fraction)
    counts["killed"] += killed
    counts["partial"] += paths(out)[0].is_dir() and not out.exists()
    if again is not None and paths(out)[0].is_dir():
        twice, resumed = kill_at(base, out, again)
        counts["killed twice"] += twice and resumed
    settle(base, out, counts)


def filled_to(base: Baseline, out: Path, degree: float, counts: Counter[str]) -> None:
    """Convert with a ballast file that leaves room for this part of the artifact."""
    counts["runs"] += 1
    ballast = out.parent / "ballast"
    process = start(base.command, out)
    wait_for(process, f"{paths(out)[0].name}/*.*", out.parent)
    process.send_signal(signal.SIGSTOP)
    with ballast.open("wb") as file:
        room = shutil.disk_usage(out.parent).free - int(degree * base.size)
        os.posix_fallocate(file.fileno(), 0, max(1, room - room % 4096))
    process.send_signal(signal.SIGCONT)
    code, said = finish(process)
    full = code == 2 and "No space left on device" in said and said.count("dgq: error") == 1
    counts["disk full"] += full
    counts["partial"] += paths(out)[0].is_dir()
    ballast.unlink()
    settle(base, out, counts)


@contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A mounted tmpfs of so many bytes; None, and why, if that is not allowed."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "dgq-faults", folder]
        try:
            done = subprocess.run(mount, capture_output=True, text=True)
            why = done.stderr.strip() if done.returncode else ""
        except OSError as error:
            why = str(error)
        if why:
            print(f"full disk: skipped, no file system could be mounted ({why})")
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def recipe_faults(recipe: str, source: Path, folder: Path, moments: int, rng: random.Random) -> Counter[str]:
    base = uninterrupted(recipe, source, folder)
    counts: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0))
    print(f"{recipe}: {base.size / 1e6:.1f} MB", flush=True)
    for moment in range(moments):
        fraction = (moment + rng.random()) / moments
        again = rng.random() if moment % KILLED_TWICE == 0 else None
        killed_at(base, folder / "out", fraction, again, counts)
    with small_disk(base.size + ROOM) as disk:
        for degree in DEGREES if disk is not None else ():
            assert disk is not None
            filled_to(base, disk / "out", degree, counts)
    print("  ".join(f"{name} {counts[name]}" for name in COLUMNS), flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, help="where to write, about 300 MB [default: a temporary one]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = write_checkpoint(folder / "source")
        print(f"source: {sum(file.stat().st_size for file in source.iterdir()) / 1e6:.1f} MB", flush=True)
        found = {recipe: recipe_faults(recipe, source, folder, arguments.moments, rng) for recipe in arguments.recipes}
    table(found)
    total = {name: sum(counts[name] for counts in found.values()) for name in COLUMNS}
    print(json.dumps({"recipes": {recipe: dict(counts) for recipe, counts in found.items()}, "total": total}))
    sys.exit(1 if total["mismatches"] else 0)


def table(found: dict[str, Counter[str]]) -> None:
    print("| recipe | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for recipe, counts in found.items():
        print(f"| {recipe} | " + " | ".join(str(counts[name]) for name in COLUMNS) + " |")


if __name__ == "__main__":
    main()
