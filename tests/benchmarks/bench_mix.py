"""What `dgq mix` is worth on `tiny`: its recipes beside the stock ones, on texts and noise that it never saw.

    python tests/benchmarks/bench_mix.py [RECIPE.toml …] [--seeds 0 1] [--stats FILE]

Without a recipe, two are made: at Q4_K_M's bytes, and halfway from there to Q6_K's. Then these, q4_k_m and q6_k are
converted (effort fast; standard with --stats, made by `dgq calibrate tiny`) and measured as in bench_quality.py:
KL(BF16 || quant) over the 64 held-out texts at four noise levels, with and without self-conditioning, and its ratio to
q4_k_m's with what 95 % of resampled texts give. A table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_quality import fixed, interval, note, run_dgq, show, texts_of

from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.models import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the noise")
    parser.add_argument("--stats", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source, checkpoint = open_model("tiny"), open_source("tiny")
    sizes = [make_plan(checkpoint, find_recipe("gguf", name)).nbytes for name in ("q4_k_m", "q6_k")]
    more = ("--stats", options.stats) if options.stats else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in () if options.recipes else (sizes[0], sum(sizes) // 2):
            options.recipes.append(folder / f"mixed-{size}.toml")
            run_dgq("mix", "tiny", "--to", "gguf", "--bytes", f"{size}B", "-o", options.recipes[-1], "--device", "cpu")
            note(f"{options.recipes[-1].name} made")
        models, table = {}, {}
        for recipe in ("q4_k_m", "q6_k", *options.recipes):
            name = getattr(recipe, "stem", recipe)
            run_dgq(
                "convert", "tiny", "--to", "gguf", "--recipe", recipe, "-o", folder / name, "--device", "cpu", *more
            )
            artifact = open_model(str(folder / name))
            models[name] = artifact.load("cpu", torch.float32)
            table[name] = {"bytes": sum(weight.nbytes for weight in artifact.weights.everything().values())}
            note(f"{name} converted")
        ids, _ = texts_of(source, windows=False)
        measured = fixed(source.load("cpu", torch.float32), models, ids, source.config.vocab, options.seeds)
    base = measured["q4_k_m"][0].mean(0)
    for name, (kl, same) in measured.items():
        table[name] |= {"KL": round(float(kl.mean()), 6), "ratio": interval(kl.mean(0), base),
                        "top-1": round(float(same.mean()), 4)}  # fmt: skip
    show("recipe", table)
    print(json.dumps({"options": vars(options), "recipes": table}, default=str))


if __name__ == "__main__":
    main()
