"""What quantised `tiny` lost beside the reference quantisers' own work: the meter of calibration and error feedback.

    python tests/bench_quality.py [--seeds 0 1] [--formats nvfp4 bnb4 gguf] [--efforts fast standard] [--free 512]
                                  [--stats FILE …] [--rounds N] [--texts 64] [--device cpu|cuda]

    fixed canvases   a held-out text's first 96 tokens, then a canvas of its next 64, each replaced by a random one with
                     probability .25/.5/.75/1; without self-conditioning and on BF16's own logits of that canvas.
                     KL(BF16 || quant) in nats a position, mean over these 8 conditions, for each text. Every artifact,
                     made with each calibration seed, on the noise of every seed; texts are pooled over both and
                     resampled: 95 % of the ratio to the peer's mean.
    free running     held-out tasks, and held-out texts continued, with the same random numbers as BF16: steps a canvas
                     and share of canvases that stop early as ratios to BF16's (canvases resampled); share of tokens
                     equal to BF16's in a prompt's first canvas, up to where both have ended (prompts resampled).

Peers, by their own code, in float32 as dgq's artifacts: modelopt's export (weight-only), decoded here; bitsandbytes'
quantize_4bit and dequantize_4bit; ggml's quantize_chunk in libgguf's build at Q4_K_M's types, decoded by gguf-py,
without and with an imatrix of the encoder on clean text, as llama-imatrix counts. All but that are held to stock's.

--stats: files of `dgq calibrate tiny --seed S`, one a seed, which are made otherwise. Tables, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_tiny import LEVELS, PREFIX, read
from click.testing import CliRunner
from torch import Tensor

from dgq.convert.cli import main as dgq
from dgq.convert.generate import open_model
from dgq.convert.plan import PlannedTensor, make_plan
from dgq.convert.recipes import find_recipe
from dgq.convert.source import open_source
from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.artifact import Artifact
from dgq.runtime.engine import generate
from dgq.runtime.model import Model

ROWS, FREE_ROWS = 16, 8  # of a batch; a free-running one waits for its slowest row
RECIPES = {"nvfp4": "nvfp4-w4a16", "bnb4": "bnb4", "gguf": "q4_k_m"}
PEERS = {"nvfp4": ("modelopt",), "bnb4": ("bitsandbytes",), "gguf": ("ggml", "ggml imatrix")}
LIMITS = {"modelopt": {"fast": 0.85, "standard": 0.6}, "bitsandbytes": {"fast": 0.95, "standard": 0.38},
          "ggml": {"fast": 1.0, "standard": 0.42}, "ggml imatrix": {"standard": 0.65}}  # fmt: skip
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Weights = dict[str, Tensor]
Table = dict[str, dict[str, Any]]
# steps of a canvas and whether it stopped early (prompts * blocks,), NaN where a row had ended; first canvases, as
# committed (prompts, canvas)
Free = tuple[Tensor, Tensor, Tensor]
Sides = dict[tuple[str, str], list[str]]  # format, effort -> artifacts: one a calibration seed, or one if without data


def modelopt(source: Artifact, folder: Path) -> Weights:
    """Everything in its export, experts decoded and fused again."""
    from safetensors.torch import load_file

    oracle = Path(__file__).parent / "oracle_modelopt.py"
    command = [sys.executable, str(oracle), str(source.path), str(folder / "modelopt"), "nvfp4-w4a16"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    stored: Weights = load_file(folder / "modelopt" / "model.safetensors")

    def decoded(base: str) -> Tensor:
        packed = stored[base + ".weight"]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
        scale = stored[base + ".weight_scale"].float() * stored[base + ".weight_scale_2"]
        return E2M1[codes] * scale.repeat_interleave(16, dim=1)

    found = {}
    for name in source.weights:
        owner, _, projection = name.rpartition(".")
        if not owner.endswith(".experts"):
            found[name] = stored[name].float()
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
        each = [[decoded(f"{owner}.{e}.{part}") for part in parts] for e in range(source.config.experts)]
        found[name] = torch.stack([torch.cat(pieces) for pieces in each])
    return found


def bitsandbytes(source: Artifact, planned: Mapping[str, PlannedTensor]) -> Weights:
    from bitsandbytes import functional

    found = {}
    for name, weight in source.weights.items():
        found[name] = weight.dequantize()
        if planned[name].scheme.name == "nf4":
            packed, state = functional.quantize_4bit(weight.parts[""], quant_type="nf4", blocksize=64)
            state.dtype = torch.float32  # what it decodes to, and does not round to BF16
            found[name] = functional.dequantize_4bit(packed, state).view(weight.shape)
    return found


def ggml(source: Artifact, planned: Mapping[str, PlannedTensor], importance: Weights) -> Weights:
    """importance: canonical name -> (in,), or (E, in); what has none is quantised without, as by llama-quantize."""
    import gguf
    import libgguf

    found = {}
    for name, weight in source.weights.items():
        kind = gguf.GGMLQuantizationType[planned[name].scheme.name.upper()]
        found[name] = weight.dequantize()
        if SCHEMES[planned[name].scheme.name].bits >= 16:
            assert kind == gguf.GGMLQuantizationType.F32
            continue
        matrices = found[name].view(-1, *weight.shape[-2:])
        columns = importance.get(name)
        each = [None] * len(matrices) if columns is None else list(columns.view(len(matrices), -1).numpy())
        packed = [
            np.asarray(libgguf.quantize_rows(matrix.contiguous().numpy(), kind, imatrix=column)).view(np.uint8)
            for matrix, column in zip(matrices, each, strict=True)
        ]
        rows = [gguf.quants.dequantize(made.reshape(weight.shape[-2], -1), kind) for made in packed]
        found[name] = torch.from_numpy(np.stack(rows)).view(weight.shape)
    return found


def clean_text_importance(source: Artifact, planned: Mapping[str, PlannedTensor]) -> Weights:
    """Mean of x² a column, and a column of each expert; 1 for experts without a token. Within the layers only, as
    llama-imatrix: the embedding has none, and no encoder runs the self-conditioning."""
    sums: dict[tuple[str, int | None], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    counts: dict[tuple[str, int | None], int] = defaultdict(int)

    def watch(name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).double()
        sums[name, expert] = sums[name, expert] + rows.square().sum(0)
        counts[name, expert] += len(rows)
        return y

    model = Model(source.config, source.weights, "cpu", torch.float32, observe=watch)
    for item in read("calibration.jsonl"):
        if "text" in item:
            model.encode(torch.tensor([source.tokenizer.encode(item["text"])]), model.new_cache(1))
    found = {}
    for name in {name for name, _ in sums}:
        experts: list[int | None] = list(range(source.config.experts)) if ".experts." in name else [None]
        ones = torch.ones(planned[name].shape[-1], dtype=torch.float64)
        means = [sums[name, e] / counts[name, e] if counts[name, e] else ones for e in experts]
        found[name] = (torch.stack(means) if len(means) > 1 else means[0]).float()
    quantised = {n for n, t in planned.items() if t.scheme.bits < 16 and ".layers." in n}
    assert quantised <= found.keys(), f"nobody watched {min(quantised - found.keys())}"
    return found


def note(text: str) -> None:
    print(f"{time.process_time():6.0f} s of CPU  {text}", flush=True)


def run_dgq(*arguments: object) -> None:
    result = CliRunner().invoke(dgq, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)


def convert(to: str, out: Path, effort: str, device: str, *more: object) -> Artifact:
    run_dgq("convert", "tiny", "--to", to, "--recipe", RECIPES[to], "-o", out, "--effort", effort, "--device", device,
            "--threads", 1, *more)  # fmt: skip
    return open_model(str(out))


def peers(to: str, source: Artifact, folder: Path) -> dict[str, Weights]:
    planned = {t.source: t for t in make_plan(open_source("tiny"), find_recipe(to, RECIPES[to])).weights if t.source}
    if to == "nvfp4":
        return {"modelopt": modelopt(source, folder)}
    if to == "bnb4":
        return {"bitsandbytes": bitsandbytes(source, planned)}
    importance = clean_text_importance(source, planned)
    return {"ggml": ggml(source, planned, {}), "ggml imatrix": ggml(source, planned, importance)}


def calibrated(options: argparse.Namespace, folder: Path) -> dict[int, Path]:
    if options.stats or "standard" not in options.efforts:
        return dict(zip(options.seeds, options.stats, strict=True)) if options.stats else {}
    more = ("--device", options.device, *(("--rounds", options.rounds) if options.rounds else ()))
    for seed in options.seeds:
        run_dgq("calibrate", "tiny", "--seed", seed, "-o", folder / f"{seed}", *more)
        note(f"calibrated with seed {seed}")
    return {seed: folder / f"{seed}" for seed in options.seeds}


def build(options: argparse.Namespace, source: Artifact, folder: Path) -> tuple[dict[str, Model], Sides]:
    """Every model by name, and which are dgq's. The peers' weights are held to --effort stock."""
    models: dict[str, Model] = {}
    sides: Sides = {}
    stats = calibrated(options, folder)
    for to in options.formats:
        stock = convert(to, folder / f"{to}-stock", "stock", "cpu").weights
        for name, found in peers(to, source, folder).items():
            differ = [n for n, weight in found.items() if not torch.equal(weight, stock[n].dequantize())]
            note(f"{name}: {len(differ)} of {len(found)} weights differ from {to} --effort stock")
            assert name == "ggml imatrix" or not differ, differ[0]
            packed = {n: Packed(SCHEMES["f32"], tuple(weight.shape), {"": weight}) for n, weight in found.items()}
            models[name] = Model(source.config, packed, options.device, torch.float32)
        for effort in options.efforts:
            made = {f"{to} {effort} {seed}": ("--stats", file) for seed, file in stats.items()}
            for name, more in made.items() if effort == "standard" else ((f"{to} {effort}", ()),):
                artifact = convert(to, folder / name.replace(" ", "-"), effort, options.device, *more)
                models[name] = artifact.load(options.device, torch.float32)
                sides.setdefault((to, effort), []).append(name)
                note(f"{name} converted")
    return models, sides


def texts_of(source: Artifact) -> Tensor:
    """(texts, prefix + canvas) token ids; all held-out texts are longer."""
    length = PREFIX + source.config.canvas
    return torch.tensor([source.tokenizer.encode(item["text"])[:length] for item in read("heldout_text.jsonl")])


def noised(clean: Tensor, seed: int, vocab: int) -> Tensor:
    """(texts, levels, canvas): noise of all texts is drawn, however many are measured."""
    generator, levels = torch.Generator().manual_seed(seed), []
    for level in LEVELS:
        replaced = torch.rand(clean.shape, generator=generator) < level
        levels.append(torch.where(replaced, torch.randint(0, vocab, clean.shape, generator=generator), clean))
    return torch.stack(levels, 1)


def fixed(
    reference: Model, models: Mapping[str, Model], source: Artifact, seeds: list[int], texts: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """KL and top-1 agreement (seeds, texts) of each model, means over levels and self-conditioning."""
    ids, device = texts_of(source), reference.device
    canvases = [noised(ids[:, PREFIX:], seed, source.config.vocab) for seed in seeds]
    sums = {name: (torch.zeros(len(seeds), texts), torch.zeros(len(seeds), texts)) for name in models}
    for start in range(0, texts, ROWS):
        own = slice(start, min(start + ROWS, texts))
        prompts = ids[own, :PREFIX].to(device)
        caches = {}
        for model in (reference, *models.values()):
            caches[model] = model.new_cache(len(prompts))
            model.encode(prompts, caches[model])
        for number, level in product(range(len(seeds)), range(len(LEVELS))):
            canvas = canvases[number][own, level].to(device)
            plain = reference.decode(canvas, caches[reference])
            for given in (None, plain):
                wanted = plain if given is None else reference.decode(canvas, caches[reference], given)
                log_p = wanted.log_softmax(-1)
                p, best = log_p.exp(), wanted.argmax(-1)
                for name, model in models.items():
                    found = model.decode(canvas, caches[model], given)
                    kl = (p * (log_p - found.log_softmax(-1))).sum(-1).mean(-1)
                    same = (best == found.argmax(-1)).float().mean(-1)
                    for kept, value in zip(sums[name], (kl, same), strict=True):
                        kept[number, own] += value.cpu() / (2 * len(LEVELS))
    return sums


def interval(a: Tensor, b: Tensor | None = None, resamples: int = 2000) -> list[float]:
    """Mean of a, or mean of a over mean of b, and between what bounds 95 % of it lie when both are resampled together;
    NaN is no value."""

    def figure(picks: Tensor) -> Tensor:
        mean = a[picks].nanmean(-1)
        return mean if b is None else mean / b[picks].nanmean(-1)

    picks = torch.randint(0, len(a), (resamples, len(a)), generator=torch.Generator().manual_seed(0))
    bounds = figure(picks).quantile(torch.tensor([0.025, 0.975]))
    return [round(float(value), 5) for value in (figure(torch.arange(len(a))), *bounds)]


def show(title: str, rows: Table) -> None:
    """A table of what the JSON line has."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})" if len(value) == 3 else str(value)
        return "" if value is None else str(value)

    lines = [[title, *next(iter(rows.values()))], *([name, *map(cell, row.values())] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def report_fixed(measured: Mapping[str, tuple[Tensor, Tensor]], sides: Sides) -> tuple[Table, Table]:
    means, ratios = {}, {}
    for name, (kl, same) in measured.items():
        means[name] = {"mean KL": round(float(kl.mean()), 6), "top-1": round(float(same.mean()), 5)}
    for (to, effort), names in sides.items():
        each = torch.stack([measured[name][0].mean(0) for name in names])
        for peer in PEERS[to]:
            theirs, limit = measured[peer][0].mean(0), LIMITS[peer].get(effort)
            ratio = interval(each.mean(0), theirs)
            ratios[f"{to} {effort} / {peer}"] = {
                "KL ratio (95 % of texts)": ratio, "limit": limit, "held": limit and ratio[2] <= limit,
                "each calibration": str([round(float(kl.mean() / theirs.mean()), 3) for kl in each]),
            }  # fmt: skip
    return means, ratios


def free_run(model: Model, source: Artifact, tasks: list[list[int]], texts: list[list[int]], blocks: int) -> Free:
    """A canvas for each task, `blocks` for each text."""
    steps = torch.full((len(tasks) + len(texts), blocks), torch.nan)
    early, first = steps.clone(), []
    for prompts, length, base in ((tasks, 1, 0), (texts, blocks, len(tasks))):
        for start in range(0, len(prompts), FREE_ROWS):
            batch = prompts[start : start + FREE_ROWS]
            rows = range(base + start, base + start + len(batch))
            tokens = length * source.config.canvas
            result = generate(model, batch, source.generation, tokens, seed=0, rows=rows)
            first.append(result.canvases[:, : source.config.canvas])
            for row, took, stopped in zip(rows, result.steps, result.stopped_early, strict=True):
                steps[row, : len(took)] = torch.tensor(took).float()
                early[row, : len(took)] = torch.tensor(stopped).float()
    return steps.flatten(), early.flatten(), torch.cat(first)


def agreement(a: Tensor, b: Tensor, pad: int) -> Tensor:
    """Canvases (prompts, canvas) -> share of equal tokens (prompts,) where not both have ended."""
    counted = (a != pad) | (b != pad)
    return ((a == b) & counted).sum(-1) / counted.sum(-1)


def free(
    reference: Model, models: Mapping[str, Model], source: Artifact, wanted: int, texts: int, peer_of: dict[str, str]
) -> Table:
    """Half tasks (256 at most), the rest texts, continued until BF16 has made enough canvases."""
    tasks = [source.tokenizer.chat(item["messages"]) for item in read("heldout_tasks.jsonl")[: max(1, wanted // 2)]]
    prompts = texts_of(source)[:texts, :PREFIX].tolist()
    blocks, made = -(-(wanted - len(tasks)) // len(prompts)) - 1, 0
    while made < wanted and PREFIX + (blocks + 1) * source.config.canvas <= source.config.context:
        blocks += 1
        base = free_run(reference, source, tasks, prompts, blocks)
        made = int((~base[0].isnan()).sum())
    note(f"BF16 wrote {made} canvases: {len(tasks)} tasks, {len(prompts)} texts of {blocks}")
    rows, agreed = Table(), Weights()
    for name, model in {"bf16": reference, **models}.items():
        steps, early, first = base if model is reference else free_run(model, source, tasks, prompts, blocks)
        agreed[name] = same = agreement(first, base[2], source.generation.pad_id)
        rows[name] = {
            "canvases": int((~steps.isnan()).sum()),
            "steps": round(float(steps.nanmean()), 3),
            "ratio to BF16's": interval(steps, base[0]),
            "stop early": round(float(early.nanmean()), 4),
            "ratio to it": interval(early, base[1]),
            "equal tokens": interval(same),
            "of tasks": interval(same[: len(tasks)]),
            "of texts": interval(same[len(tasks) :]),
            "minus the peer's": interval(same - agreed[peer_of[name]]) if name in peer_of else None,
        }
        note(f"{name} wrote")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the noise, and of calibration")
    parser.add_argument("--formats", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--efforts", nargs="*", choices=("fast", "standard"), default=["fast", "standard"])
    parser.add_argument("--free", type=int, default=512, metavar="N", help="canvases to write freely; 0: none")
    parser.add_argument("--stats", type=Path, nargs="+", help="made by dgq calibrate, one a seed")
    parser.add_argument("--rounds", type=int, help="of calibration")
    parser.add_argument("--texts", type=int, default=64, choices=range(1, 65), metavar="N", help="the first ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_model("tiny")
    reference = source.load(options.device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        models, sides = build(options, source, Path(folder))
        measured = fixed(reference, models, source, options.seeds, options.texts)
    note("fixed canvases measured")
    report = dict(zip(("fixed", "ratios"), report_fixed(measured, sides), strict=True))
    show("fixed canvases", report["fixed"])
    show("against the peer", report["ratios"])
    if options.free:
        peer_of = {name: PEERS[to][-1] for (to, _), names in sides.items() for name in names}
        report["free running"] = free(reference, models, source, options.free, options.texts, peer_of)
        show("free running", report["free running"])
    print(json.dumps({"options": vars(options), **report}, default=str))


if __name__ == "__main__":
    main()
