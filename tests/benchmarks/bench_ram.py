"""`--ram` on a model larger than it: peak memory of `dgq calibrate` and `convert --stats` at the real widths, on a CPU.

    python tests/benchmarks/bench_ram.py [--layers 5] [--ram 8GiB] [--recipes nvfp4 …] [--folder DIR] [--documents 1]
        [--same]               converts once more without the option and compares every byte
        [--recipes q4_k-first]     the first layer's experts alone: all layers gone back through, one quantised
        [--row-groups 64]      fewer: sooner done, not so well, in a little more memory
        [--source DIR]         a checkpoint made before

Makes a random checkpoint (bench_convert.py: hidden 2816, 128 experts of 704, vocabulary 262,144), calibrates it
on a few documents, one round, and converts it, each command in a process of its own. Prints for each: seconds, VmHWM
(all pages, those of mapped files too), the most RssAnon of one look every 20 ms, and the floor by moments as estimated.
Ends in one JSON line; exit code 1 if a peak was
above the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench_convert import digests, peak_rss, write_checkpoint

RECIPES = {"nvfp4": ["--to", "nvfp4"], "bnb4": ["--to", "bnb4"], "q4_k_m": ["--to", "gguf"]}
FIRST = """name = "q4_k-first"
format = "gguf"
label = "Q4_K"
description = "the first layer's experts in 4 and 5 bits"
max_16bit_share = 1
[[rule]]
match = "blk.0.ffn_gate_up_exps.weight"
scheme = "q4_k"
[[rule]]
match = "blk.0.ffn_down_exps.weight"
scheme = "q5_0"
[[rule]]
match = "*"
scheme = "bf16"
"""
TEXT = "In the beginning was the word, and the king went down to the river with seven ships of corn and wine. "


def anonymous() -> float:
    said = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(said["RssAnon"].split()[0]) / 2**20


def command_here(row_groups: str, *arguments: str) -> None:
    """The child: one dgq command, its cost as JSON on the last line."""
    from click.testing import CliRunner

    from dgq.convert.calibration import calibrate
    from dgq.convert.cli.__main__ import main
    from dgq.convert.layerwise import estimate
    from dgq.quant.feedback import feedback

    feedback.ROW_GROUPS = int(row_groups)

    calibrate.MORE = 1  # or experts that saw few tokens would make it four rounds
    most, done = [0.0], threading.Event()
    estimates: list[dict[str, int]] = []
    moments = estimate.Needs.moments

    def noted(self: Any) -> Any:
        found = moments(self)
        estimates.append({moment: sum(parts.values()) for moment, parts in found.items()})
        return found

    estimate.Needs.moments = noted  # type: ignore[method-assign]

    def look() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    result = CliRunner().invoke(main, [*arguments, "--json"])
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if result.exit_code:
        raise SystemExit(result.output)
    floor = {moment: round(n / 2**30, 2) for moment, n in estimates[-1].items()}
    print(json.dumps({
        "seconds": round(seconds, 1), "vmhwm_gib": peak_rss(), "rss_anon_gib": round(most[0], 3), "floor_gib": floor,
    }))  # fmt: skip


def child(row_groups: int, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "command", str(row_groups), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-500:]}{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--recipes", nargs="*", default=["nvfp4"])
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--row-groups", type=int, default=64)
    parser.add_argument("--folder")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--same", action="store_true")
    options = parser.parse_args()
    from dgq.convert.cli.terminal.sizes import Size

    report: dict[str, Any] = {"layers": options.layers, "ram": options.ram, "documents": options.documents,
                              "row_groups": options.row_groups}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, prompts = options.source or Path(folder) / "source", Path(folder) / "prompts.jsonl"
        if options.source is None:
            write_checkpoint(source, options.layers, vision=False)
        prompts.write_text("\n".join(json.dumps({"text": TEXT * 12}) for _ in range(options.documents)))
        report["source_gib"] = round(sum(file.stat().st_size for file in source.iterdir()) / 2**30, 2)
        print(f"checkpoint: {report['source_gib']} GiB", flush=True)
        stats, first = Path(folder) / "stats", Path(folder) / "first.toml"
        first.write_text(FIRST)
        recipes = RECIPES | {"q4_k-first": ["--to", "gguf", "--recipe", str(first)]}
        common = ("calibrate", source, "--prompts", prompts, "--rounds", 1, "--device", "cpu", "-o", stats)
        row = child(options.row_groups, *common, "--ram", options.ram)
        rows = {"calibrate": row}
        print("calibrate", row, flush=True)
        for recipe in options.recipes:
            common = ("convert", source, *recipes[recipe], "--stats", stats, "--device", "cpu", "-o")
            out = Path(folder) / recipe
            row = rows[recipe] = child(options.row_groups, *common, out, "--ram", options.ram)
            if options.same:
                other = child(options.row_groups, *common, Path(folder) / "other")
                row |= {"unlimited": other, "same_bytes": digests(out) == digests(Path(folder) / "other")}
                shutil.rmtree(Path(folder) / "other")
            shutil.rmtree(out)
            print(recipe, row, flush=True)
    limit = Size().convert(options.ram, None, None) / 2**30
    held = all(row["vmhwm_gib"] <= limit for row in rows.values())
    print(json.dumps(report | {"commands": rows, "held": held}))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["command"]:
        command_here(*sys.argv[2:])
    else:
        main()
