"""What quantised `tiny` lost beside the reference quantisers' own work: the meter of calibration and error feedback.

    python tests/benchmarks/bench_quality.py [--seeds 0 1] [--formats nvfp4 bnb4 gguf] [--efforts fast standard]
                                  [--free 512] [--stats FILE …] [--rounds N] [--texts 64 | --windows]
                                  [--device cpu|cuda] [--draws 1] [--workers N] [--folder DIR] [--peers own|stock]

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

--windows: instead of the 64 texts, all held-out documents cut into 296 pieces (tests/golden/heldout_windows.jsonl, by
recipes/tiny_data.py); then documents are resampled, not pieces. --draws: so many series of random numbers continue each
prompt. --folder: keeps what is made, and takes what is there. --peers stock: modelopt and bitsandbytes are not
asked, as stock's bytes are theirs (which a run without this option holds). --stats: files of `dgq calibrate tiny --seed
S`, one a seed, which are made otherwise. Tables, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_tiny import LEVELS, PREFIX, read
from click.testing import CliRunner
from torch import Tensor

from dgq.convert.cli.__main__ import main as dgq
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.models import open_model
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model

ROWS = 16  # of a batch
RECIPES = {"nvfp4": "nvfp4-w4a16", "bnb4": "bnb4", "gguf": "q4_k_m"}
PEERS = {"nvfp4": ("modelopt",), "bnb4": ("bitsandbytes",), "gguf": ("ggml", "ggml imatrix")}
LIMITS = {"modelopt": {"fast": 0.85, "standard": 0.6}, "bitsandbytes": {"fast": 0.95, "standard": 0.38},
          "ggml": {"fast": 1.0, "standard": 0.42}, "ggml imatrix": {"standard": 0.65}}  # fmt: skip
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
WINDOWS = Path(__file__).parent.parent / "golden/heldout_windows.jsonl"
Weights = dict[str, Tensor]
Table = dict[str, dict[str, Any]]
# steps of a canvas and whether it stopped early (prompts, draws * blocks), NaN where a row had ended; first canvases,
# as committed (prompts, draws, canvas)
Free = tuple[Tensor, Tensor, Tensor]
Sides = dict[tuple[str, str], list[str]]  # format, effort -> artifacts: one a calibration seed, or one if without data


def modelopt(source: Artifact, folder: Path) -> Weights:
    """Everything in its export, experts decoded and fused again."""
    from safetensors.torch import load_file

    oracle = Path(__file__).parent.parent / "tools" / "oracle_modelopt.py"
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
    if not out.exists():
        run_dgq("convert", "tiny", "--to", to, "--recipe", RECIPES[to], "-o", out, "--effort", effort,
                "--device", device, "--threads", 1, *more)  # fmt: skip
    return open_model(str(out))


def peers(to: str, source: Artifact, folder: Path, stock: Weights | None) -> dict[str, Weights]:
    """stock: taken for what modelopt and bitsandbytes write."""
    planned = {t.source: t for t in make_plan(open_source("tiny"), find_recipe(to, RECIPES[to])).weights if t.source}
    if to == "nvfp4":
        return {"modelopt": stock or modelopt(source, folder)}
    if to == "bnb4":
        return {"bitsandbytes": stock or bitsandbytes(source, planned)}
    importance = clean_text_importance(source, planned)
    return {"ggml": ggml(source, planned, {}), "ggml imatrix": ggml(source, planned, importance)}


def calibrated(options: argparse.Namespace, folder: Path) -> dict[int, Path]:
    if options.stats or "standard" not in options.efforts:
        return dict(zip(options.seeds, options.stats, strict=True)) if options.stats else {}
    more = ("--device", options.device, *(("--rounds", options.rounds) if options.rounds else ()))
    for seed in options.seeds:
        if not (folder / f"{seed}").exists():
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
        decoded = {n: weight.dequantize() for n, weight in stock.items()}
        for name, found in peers(to, source, folder, decoded if options.peers == "stock" else None).items():
            differ = [n for n, weight in found.items() if not torch.equal(weight, decoded[n])]
            note(f"{name}: {len(differ)} of {len(found)} weights differ from {to} --effort stock")
            assert name == "ggml imatrix" or not differ, differ[0]
            packed = {n: Packed(SCHEMES["f32"], tuple(weight.shape), {"": weight}) for n, weight in found.items()}
            models[name] = Model(source.config, packed, options.measure or options.device, torch.float32)
        for effort in options.efforts:
            made = {f"{to} {effort} {seed}": ("--stats", file) for seed, file in stats.items()}
            for name, more in made.items() if effort == "standard" else ((f"{to} {effort}", ()),):
                artifact = convert(to, folder / name.replace(" ", "-"), effort, options.device, *more)
                models[name] = artifact.load(options.measure or options.device, torch.float32)
                sides.setdefault((to, effort), []).append(name)
                note(f"{name} converted")
    return models, sides


def texts_of(source: Artifact, windows: bool) -> tuple[Tensor, Tensor]:
    """(texts, prefix + canvas) token ids; all are longer. And the number of the document that each is from."""
    length = PREFIX + source.config.canvas
    items = read("heldout_text.jsonl")
    if windows:
        items = [json.loads(line) for line in WINDOWS.read_text("utf-8").splitlines()]
    ids = torch.tensor([source.tokenizer.encode(item["text"])[:length] for item in items])
    return ids, torch.tensor([item.get("document", number) for number, item in enumerate(items)])


def noised(clean: Tensor, seed: int, vocab: int) -> Tensor:
    """(texts, levels, canvas): noise of all texts is drawn, however many are measured."""
    generator, levels = torch.Generator().manual_seed(seed), []
    for level in LEVELS:
        replaced = torch.rand(clean.shape, generator=generator) < level
        levels.append(torch.where(replaced, torch.randint(0, vocab, clean.shape, generator=generator), clean))
    return torch.stack(levels, 1)


def fixed(
    reference: Model, models: Mapping[str, Model], ids: Tensor, vocab: int, seeds: list[int], workers: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """KL and top-1 agreement (seeds, texts) of each model on texts (texts, prefix + canvas), means over levels and
    self-conditioning."""
    device = reference.device
    canvases = [noised(ids[:, PREFIX:], seed, vocab) for seed in seeds]
    sums = {name: (torch.zeros(len(seeds), len(ids)), torch.zeros(len(seeds), len(ids))) for name in models}

    def some(start: int) -> dict[str, tuple[Tensor, Tensor]]:
        own = slice(start, min(start + ROWS, len(ids)))
        found = {name: (kl[:, own].clone(), same[:, own].clone()) for name, (kl, same) in sums.items()}
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
                    logits = model.decode(canvas, caches[model], given)
                    kl = (p * (log_p - logits.log_softmax(-1))).sum(-1).mean(-1)
                    same = (best == logits.argmax(-1)).float().mean(-1)
                    for kept, value in zip(found[name], (kl, same), strict=True):
                        kept[number] += value.cpu() / (2 * len(LEVELS))
        return found

    starts = range(0, len(ids), ROWS)
    for start, found in zip(starts, spread(some, starts, workers), strict=True):
        for name, both in found.items():
            for kept, value in zip(sums[name], both, strict=True):
                kept[:, start : start + ROWS] = value
    return sums


def spread(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """work of each, in order; by forked processes, if there are to be several."""
    if workers == 1:
        yield from map(work, items)
        return
    global _work
    _work = work
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_worked, items)


def _worked(item: Any) -> Any:
    return _work(item)


def interval(a: Tensor, b: Tensor | None = None, group: Tensor | None = None, resamples: int = 2000) -> list[float]:
    """Mean of a (rows, …), or mean of a over mean of b, and between what bounds 95 % of it lie when both are resampled
    together, by rows, or by groups (rows,) of them; NaN is no value."""
    group = torch.arange(len(a)) if group is None else group.unique(return_inverse=True)[1]

    def sums(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(len(x), -1).double()
        zeros = x.new_zeros(int(group.max()) + 1)
        return zeros.index_add(0, group, x.nansum(-1)), zeros.index_add(0, group, (~x.isnan()).sum(-1).double())

    parts = [sums(x) for x in ([a] if b is None else [a, b])]

    def figure(picks: Tensor) -> Tensor:
        means = [total[picks].sum(-1) / count[picks].sum(-1) for total, count in parts]
        return means[0] if b is None else means[0] / means[1]

    groups = len(parts[0][0])
    picks = torch.randint(0, groups, (resamples, groups), generator=torch.Generator().manual_seed(0))
    bounds = figure(picks).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(value), 5) for value in (figure(torch.arange(groups)), *bounds)]


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


def report_fixed(measured: Mapping[str, tuple[Tensor, Tensor]], sides: Sides, documents: Tensor) -> tuple[Table, Table]:
    means, ratios = {}, {}
    for name, (kl, same) in measured.items():
        means[name] = {"mean KL": round(float(kl.mean()), 6), "top-1": round(float(same.mean()), 5)}
    for (to, effort), names in sides.items():
        each = torch.stack([measured[name][0].mean(0) for name in names])
        for peer in PEERS[to]:
            theirs, limit = measured[peer][0].mean(0), LIMITS[peer].get(effort)
            ratio = interval(each.mean(0), theirs, documents)
            ratios[f"{to} {effort} / {peer}"] = {
                "KL ratio (95 % of documents)": ratio, "limit": limit, "held": limit and ratio[2] <= limit,
                "each calibration": str([round(float(kl.mean() / theirs.mean()), 3) for kl in each]),
            }  # fmt: skip
    return means, ratios


def free_run(model: Model, source: Artifact, parts: list[tuple[list[list[int]], int]], draws: int, size: int) -> Free:
    """parts: prompts, and how many canvases each is continued by; size: rows of a batch. The same random numbers for
    every model, whatever the size."""
    steps, early, first = [], [], []
    base, most = 0, max(blocks for _, blocks in parts)
    for prompts, blocks in parts:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            rows = range(base + start, base + start + len(batch))
            taken = torch.full((2, len(batch), draws, most), torch.nan)
            canvases = []
            for draw in range(draws):
                tokens = blocks * source.config.canvas
                result = generate(model, Request(batch, source.generation, tokens, seed=draw, rows=rows))
                canvases.append(result.canvases[:, : source.config.canvas])
                for i, (took, stopped) in enumerate(zip(result.steps, result.stopped_early, strict=True)):
                    taken[:, i, draw, : len(took)] = torch.tensor([[float(n) for n in took], stopped])
            steps.append(taken[0].flatten(1))
            early.append(taken[1].flatten(1))
            first.append(torch.stack(canvases, 1))
        base += len(prompts)
    return torch.cat(steps), torch.cat(early), torch.cat(first)


def agreement(a: Tensor, b: Tensor, pad: int) -> Tensor:
    """Canvases (prompts, draws, canvas) -> share of equal tokens (prompts, draws) where not both have ended."""
    counted = (a != pad) | (b != pad)
    return ((a == b) & counted).sum(-1) / counted.sum(-1)


def free(
    reference: Model, models: Mapping[str, Model], source: Artifact, texts: tuple[Tensor, Tensor],
    options: argparse.Namespace, peer_of: dict[str, str],
) -> Table:  # fmt: skip
    """Half tasks (256 at most), the rest texts, continued until there is room for enough canvases."""
    wanted, draws = options.free, options.draws
    tasks = [source.tokenizer.chat(item["messages"]) for item in read("heldout_tasks.jsonl")[: max(1, wanted // 2)]]
    prompts = texts[0][:, :PREFIX].tolist()
    blocks = -(-(wanted // draws - len(tasks)) // len(prompts)) if options.blocks is None else options.blocks
    parts = [(tasks, 1), (prompts, max(1, blocks))]
    documents = torch.cat((-1 - torch.arange(len(tasks)), texts[1]))
    everybody = {"bf16": reference, **models}
    run = partial(free_run, source=source, parts=parts, draws=draws, size=options.free_rows)
    done = spread(lambda name: run(everybody[name]), everybody, options.workers)
    rows, agreed = Table(), Weights()
    for name, (steps, early, first) in zip(everybody, done, strict=True):
        if name == "bf16":
            base = steps, early, first
            note(f"BF16 wrote {int((~steps.isnan()).sum())} canvases: {len(tasks)} tasks, {len(prompts)} texts")
        agreed[name] = same = agreement(first, base[2], source.generation.pad_id)
        peer = same - agreed[peer_of[name]] if name in peer_of else None
        of_texts = slice(len(tasks), None)
        rows[name] = {
            "canvases": int((~steps.isnan()).sum()),
            "steps": round(float(steps.nanmean()), 3),
            "ratio to BF16's": interval(steps, base[0], documents),
            "stop early": round(float(early.nanmean()), 4),
            "ratio to it": interval(early, base[1], documents),
            "equal tokens": interval(same, group=documents),
            "of tasks": interval(same[: len(tasks)]),
            "of texts": interval(same[of_texts], group=documents[of_texts]),
            "of texts, minus the peer's":
                None if peer is None else interval(peer[of_texts], group=documents[of_texts]),
        }  # fmt: skip
        note(f"{name} wrote")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the noise, and of calibration")
    parser.add_argument("--formats", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--efforts", nargs="*", choices=("fast", "standard"), default=["fast", "standard"])
    parser.add_argument("--free", type=int, default=512, metavar="N", help="canvases to write freely; 0: none")
    parser.add_argument("--blocks", type=int, help="canvases a text")
    parser.add_argument("--draws", type=int, default=1, help="series of random numbers a prompt")
    parser.add_argument("--free-rows", type=int, default=8, help="of a batch, which waits for its slowest; GPU: 128")
    parser.add_argument("--stats", type=Path, nargs="+", help="made by dgq calibrate, one a seed")
    parser.add_argument("--rounds", type=int, help="of calibration")
    parser.add_argument("--texts", type=int, default=64, choices=range(1, 65), metavar="N", help="the first ones")
    parser.add_argument("--windows", action="store_true", help="all held-out documents")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for making artifacts; and measuring")
    parser.add_argument("--measure", choices=("cpu", "cuda"), help="other device for measuring")
    parser.add_argument("--peers", choices=("own", "stock"), default="own")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure on a CPU")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_model("tiny")
    texts = texts_of(source, options.windows)
    if not options.windows:
        texts = texts[0][: options.texts], texts[1][: options.texts]
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        models, sides = build(options, source, folder)
        reference = source.load(options.measure or options.device, torch.float32)
        measured = fixed(reference, models, texts[0], source.config.vocab, options.seeds, options.workers)
    note("fixed canvases measured")
    report = dict(zip(("fixed", "ratios"), report_fixed(measured, sides, texts[1]), strict=True))
    show("fixed canvases", report["fixed"])
    show("against the peer", report["ratios"])
    if options.free:
        peer_of = {name: PEERS[to][-1] for (to, _), names in sides.items() for name in names}
        report["free running"] = free(reference, models, source, texts, options, peer_of)
        show("free running", report["free running"])
    print(json.dumps({"options": vars(options), **report}, default=str))


if __name__ == "__main__":
    main()
