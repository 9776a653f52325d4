"""What calibration's canvases are worth: error feedback on `tiny` with canvases that are noised, clean, unconditioned.

    python tests/benchmarks/bench_ablation.py [--arms noised clean plain trajectories] [--formats nvfp4] [--seed 0]
                                   [--device cpu|cuda] [--workers N] [--folder DIR]

    noised          as shipped: two noise levels a prompt, each canvas once plain and once on its own logits
    clean           canvases hold the true tokens, twice, on nothing
    plain           noised, each twice, on nothing
    trajectories    half of the canvases from the sampler's own steps

clean and plain never run the self-conditioning, whose parts then have nothing to be quantised by: formats that
quantise them are refused there. As many tokens in each. The meter is bench_quality.py's on all held-out documents; KL
as a ratio to --effort stock. Seconds are those of `dgq calibrate` and of `dgq convert --stats`, all arms at once.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_quality import RECIPES, convert, fixed, interval, note, run_dgq, show, texts_of

from dgq.convert.layerwise import passes, samples
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.source.models import open_model

ARMS = ("noised", "clean", "plain", "trajectories")


def patch(arm: str) -> None:
    chunk, conditioned = samples._chunk, samples.conditioned

    def clean(sequences: Any, *rest: Any) -> Chunk:
        made = chunk(sequences, *rest)
        truth = torch.stack([torch.tensor(sequences[owner][1]) for owner in made.owner])
        return replace(made, canvases=truth, kind=torch.ones_like(made.kind))

    if arm == "clean":
        samples._chunk = clean
    if arm in ("clean", "plain"):
        passes.conditioned = lambda chunk, soft: conditioned(chunk, torch.zeros_like(soft))


def make(arm: str, folder: Path, device: str, seed: str, formats: list[str]) -> None:
    """The child: STATS and an artifact of each format."""
    torch.set_num_threads(1)
    patch(arm)
    seconds, stats = {}, folder / f"{arm}.stats"
    more = ["--trajectories"] if arm == "trajectories" else []
    began = time.perf_counter()
    if not stats.exists():
        run_dgq("calibrate", "tiny", "--seed", seed, "--rounds", 1, "--device", device, "-o", stats, *more)
    seconds["calibrate"] = round(time.perf_counter() - began, 1)
    for to in formats:
        began = time.perf_counter()
        convert(to, folder / f"{arm}-{to}", "standard", device, "--stats", stats)
        seconds[to] = round(time.perf_counter() - began, 1)
    print(json.dumps(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--formats", nargs="+", choices=tuple(RECIPES), default=["nvfp4"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for calibrating and converting")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if {"clean", "plain"} & {*options.arms} and {*options.formats} != {"nvfp4"}:
        parser.error("clean and plain go with --formats nvfp4 alone: the others quantise the self-conditioning")
    torch.set_num_threads(1)
    source = open_model("tiny")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(exist_ok=True)
        common = [str(folder), options.device, str(options.seed), *options.formats]
        command = [sys.executable, __file__, "make"]
        children = {
            arm: subprocess.Popen([*command, arm, *common], stdout=subprocess.PIPE, text=True) for arm in options.arms
        }
        seconds = {}
        for arm, child in children.items():
            said, _ = child.communicate()
            assert child.returncode == 0, arm
            seconds[arm] = json.loads(said.splitlines()[-1])
            note(f"{arm}: {seconds[arm]}")
        models, stock = {}, {}
        for to in options.formats:
            stock[to] = convert(to, folder / f"stock-{to}", "stock", "cpu").load("cpu", torch.float32)
            for arm in options.arms:
                models[f"{to} {arm}"] = open_model(str(folder / f"{arm}-{to}")).load("cpu", torch.float32)
        reference, (ids, documents) = source.load("cpu", torch.float32), texts_of(source, windows=True)
        everybody = {**models, **{f"{to} stock": model for to, model in stock.items()}}
        measured = fixed(reference, everybody, ids, source.config.vocab, [options.seed], options.workers)
    rows = {}
    for arm in options.arms:
        rows[arm] = {}
        for to in options.formats:
            own, theirs = measured[f"{to} {arm}"][0].mean(0), measured[f"{to} stock"][0].mean(0)
            rows[arm][to] = interval(own, theirs, documents)
            rows[arm][f"{to} / {options.arms[0]}"] = interval(
                own, measured[f"{to} {options.arms[0]}"][0].mean(0), documents
            )
        rows[arm]["seconds"] = str(seconds[arm])
    show("KL to stock's", rows)
    print(json.dumps({"options": vars(options), "arms": rows, "seconds": seconds}, default=str))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:])
    else:
        main()
