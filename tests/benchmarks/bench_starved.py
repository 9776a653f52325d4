"""Experts starved on purpose: `tiny` calibrated on a few dictionary texts, and what leaning on the layer is worth.

    python tests/benchmarks/bench_starved.py [--seeds 0 1] [--texts 64] [--recipe nvfp4-w4a16] [--documents 1]

Calibration gets the first few dictionary texts of `tiny`'s calibration prompts and nothing else, so that even its four
times as many rounds leave experts short of tokens. Each STATS is used twice, at effort standard: as dgq does, every
expert leaning on its layer by refine.LEAN tokens; and pooled, every expert by the layer's statistics alone. The meter
is bench_quality.py's: KL(BF16 || quant) on fixed canvases of held-out texts, each seed's calibration on the noise of
every seed; 95 % of the ratio of both means by resampling texts. Ends in one JSON line; exit code 1 if no expert is
starved, STATS, artifact and dgq's notes do not name the same ones, or the ratio is above 1 beyond its interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from bench_quality import RECIPES, fixed, interval, note, read, texts_of
from click.testing import CliRunner

from dgq.convert.calibration.stats import read_stats
from dgq.convert.cli.__main__ import main as dgq
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.models import open_model
from dgq.convert.write import refine
from dgq.runtime.model.model import Model

POOLED = 1e12  # tokens of the average expert beside which no expert's own count


def dictionary(number: int) -> list[str]:
    """The first texts whose every line is "word: meaning"."""
    found = [item["text"] for item in read("calibration.jsonl") if "text" in item]
    found = [text for text in found if all(": " in line[:40] for line in text.splitlines()[:-1])]
    return found[:number]


def converted(to: str, recipe: str, stats: Path, out: Path, lean: float) -> tuple[Model, dict[str, int]]:
    """The artifact, opened, and which experts its dgq.json says were starved."""
    arguments = ("convert", "tiny", "--to", to, "--recipe", recipe, "--stats", stats, "-o", out, "--device", "cpu")
    with mock.patch.object(refine, "LEAN", lean):
        result = CliRunner().invoke(dgq, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    about = json.loads((out / "dgq.json").read_text())["calibration"]
    return open_model(str(out)).load("cpu", torch.float32), about["starved"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--texts", type=int, default=64, choices=range(1, 65), metavar="N")
    parser.add_argument("--recipe", choices=tuple(RECIPES.values()), default="nvfp4-w4a16")
    parser.add_argument("--documents", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_model("tiny")
    to = next(to for to, name in RECIPES.items() if name == options.recipe)
    models: dict[str, Model] = {}
    named, tokens, good = [], [], True
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        lines = [json.dumps({"text": text}) for text in dictionary(options.documents)]
        (folder / "narrow.jsonl").write_text("\n".join(lines))
        for seed in options.seeds:
            stats = folder / f"stats{seed}"
            prompts = ("--prompts", folder / "narrow.jsonl", "--rounds", 1, "--seed", seed)
            command = ("calibrate", "tiny", *prompts, "-o", stats, "--device", "cpu")
            result = CliRunner().invoke(dgq, [str(argument) for argument in command])
            assert result.exit_code == 0, result.output
            read_back = read_stats(stats, open_source("tiny"))
            wanted = read_back.starved()
            named.append(len(wanted))
            tokens.append(read_back.about["tokens"])
            good &= bool(wanted) and all(
                f"{name} ({seen})" in result.stderr.replace("\n", " ") for name, seen in wanted.items()
            )
            unseen = sum(not seen for seen in wanted.values())
            note(f"seed {seed}: {tokens[-1]} tokens, {named[-1]} experts starved, {unseen} of them unseen")
            for arm, lean in (("leaning", refine.LEAN), ("pooled", POOLED)):
                models[f"{arm} {seed}"], starved = converted(to, options.recipe, stats, folder / f"{arm}{seed}", lean)
                good &= starved == wanted
                note(f"{arm} {seed} converted")
        ids = texts_of(source, windows=False)[0][: options.texts]
        measured = fixed(source.load("cpu", torch.float32), models, ids, source.config.vocab, options.seeds)
    each = {arm: [measured[f"{arm} {seed}"][0].mean(0) for seed in options.seeds] for arm in ("leaning", "pooled")}
    mean = {arm: torch.stack(found).mean(0) for arm, found in each.items()}
    ratio = interval(mean["leaning"], mean["pooled"])
    report = {
        "recipe": options.recipe, "tokens": tokens, "experts starved": named, "named alike": good,
        "KL": {arm: interval(kl) for arm, kl in mean.items()}, "leaning / pooled": ratio,
        "each calibration": [
            round(float(a.mean() / b.mean()), 4) for a, b in zip(each["leaning"], each["pooled"], strict=True)
        ],
    }  # fmt: skip
    print(json.dumps(report))
    sys.exit(not good or ratio[1] > 1)


if __name__ == "__main__":
    main()
