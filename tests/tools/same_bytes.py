"""Do two checkouts of dgq write the same artifacts? `tiny` in every recipe and effort, file by file.

    python tests/tools/same_bytes.py BEFORE AFTER [--quick] [--recipes R …] [--efforts E …] [--device cpu]
                                     [--folder DIR] [--stats FILE]

Each checkout's own code runs in processes of its own, through its command line: calibrate once (by BEFORE, unless
--stats gives a file), convert for each recipe and effort, and an imatrix conversion. Every file's SHA-256 is compared;
dgq.json without dgq's version, the versions of libraries, and its own hash. --quick calibrates one round on DOCUMENTS
prompts and takes 4 row groups instead of 64; the bytes differ from those of a full run, equally on both sides. Ends in
one JSON line and exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = {
    "nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "nvfp4-all": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4",
    "q4_k_m": "gguf", "q6_k": "gguf", "q8_0": "gguf",
}  # fmt: skip
DOCUMENTS = 12
EFFORTS = ("stock", "fast", "standard", "max")
QUICK = """
import importlib, sys
for name in ("dgq.quant.feedback.feedback", "dgq.quant.feedback"):
    try:
        module = importlib.import_module(name)
    except ImportError:
        continue
    if hasattr(module, "ROW_GROUPS"):
        module.ROW_GROUPS = 4
        break
else:
    raise SystemExit("ROW_GROUPS is nowhere")
"""
MAIN = """
import importlib
try:
    main = importlib.import_module("dgq.convert.cli.__main__").main
except ImportError:
    main = importlib.import_module("dgq.convert.cli").main
main()
"""


class Checkout:
    """A checkout whose rooms are put together as the package `dgq`."""

    def __init__(self, root: Path, folder: Path, quick: bool) -> None:
        package = folder / "dgq"
        package.mkdir(parents=True)
        for room in ("convert", "quant", "runtime", "recipes"):
            (package / room).symlink_to((root / room).resolve())
        self._folder, self._code = folder, (QUICK if quick else "") + MAIN

    def run(self, *arguments: object) -> None:
        paths = [str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", self._code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256, of dgq.json without what a checkout may change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "dgq.json":
                content = json.loads(data)
                for key in ("dgq", "sha256", "libraries"):
                    content.pop(key, None)
                data = json.dumps(content, sort_keys=True).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def compared(sides: dict[str, Checkout], folder: Path, name: str, arguments: list[object]) -> list[str]:
    """Files of one conversion that differ."""
    seen = {}
    for side, checkout in sides.items():
        out = folder / side / name
        checkout.run("convert", "tiny", *arguments, "-o", out)
        seen[side] = digests(out)
    before, after = seen.values()
    return sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--efforts", nargs="*", default=list(EFFORTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stats", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        folder = Path(scratch)
        roots = {"before": asked.before, "after": asked.after}
        sides = {side: Checkout(root, folder / f"code-{side}", asked.quick) for side, root in roots.items()}
        found = _all(sides, folder, asked)
    print(json.dumps(found))
    sys.exit(bool(found["differing"]))


def _all(sides: dict[str, Checkout], folder: Path, asked: argparse.Namespace) -> dict[str, object]:
    stats, imatrix = asked.stats or folder / "tiny.stats", folder / "tiny.imatrix.gguf"
    differing: dict[str, list[str]] = {}
    if asked.stats is None and {"standard", "max"} & set(asked.efforts):
        rounds: list[object] = []
        if asked.quick:
            lines = (asked.before / "recipes" / "prompts" / "calibration.jsonl").read_text("utf-8").splitlines()
            prompts = folder / "prompts.jsonl"
            prompts.write_text("\n".join(lines[:: len(lines) // DOCUMENTS]), "utf-8")
            rounds = ["--rounds", 1, "--prompts", prompts]
        for side, checkout in sides.items():
            stem = folder / side
            stem.mkdir()
            more = ["--imatrix", stem / "tiny.imatrix.gguf"]
            checkout.run("calibrate", "tiny", "-o", stem / "tiny.stats", "--device", asked.device, *rounds, *more)
        made = [digests(folder / side) for side in sides]
        print(f"calibrate: {len(made[0])} files", file=sys.stderr)
        differing["calibrate"] = sorted(file for file in made[0] if made[0][file] != made[1].get(file))
        stats, imatrix = folder / "before" / "tiny.stats", folder / "before" / "tiny.imatrix.gguf"
    count = 0
    for recipe in asked.recipes:
        for effort in asked.efforts:
            began = time.perf_counter()
            more = ["--stats", stats] if effort in ("standard", "max") else []
            arguments = ["--to", RECIPES[recipe], "--recipe", recipe, "--effort", effort, "--device", asked.device]
            differing[f"{recipe} {effort}"] = compared(sides, folder, f"{recipe}-{effort}", [*arguments, *more])
            count += 1
            seconds = time.perf_counter() - began
            print(f"{recipe} {effort}: {differing[f'{recipe} {effort}'] or 'equal'}, {seconds:.0f} s", file=sys.stderr)
    if imatrix.exists():
        arguments = ["--to", "gguf", "--imatrix", imatrix, "--device", asked.device]
        differing["q4_k_m imatrix"] = compared(sides, folder, "imatrix", arguments)
    found = {name: files for name, files in differing.items() if files}
    return {"compared": count, "differing": found, "quick": asked.quick, "device": asked.device}


if __name__ == "__main__":
    main()
