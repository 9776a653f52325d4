"""What a quantised `tiny` lost against BF16, on held-out text and tasks: a first, simple meter.

    python tests/benchmarks/bench_tiny.py [ARTIFACT …] [--tasks 256] [--texts 64] [--device cpu|cuda]

Without an artifact, `tiny` is converted to NVFP4, bitsandbytes 4-bit and GGUF Q4_K_M first. An artifact with input
scales (W4A4) is measured twice: weight-only, and with its experts' inputs rounded as a W4A4 kernel does. Two kinds of
figures, the same for every model:

    fixed canvases   prompt, then a canvas of the true next 64 tokens, each replaced by a random one with probability
                     .25/.5/.75/1; once without self-conditioning and once on BF16's own logits of that canvas.
                     KL(BF16 || model) in nats a position, share of positions with the same top token.
    free running     held-out tasks, answered with the released sampler settings: exact answers, steps a canvas,
                     canvases that stopped before the last step.

Prints a table and ends in one JSON line. Deterministic: prompts, noise and seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from dgq.convert.cli.__main__ import main as cli
from dgq.convert.source.models import open_model
from dgq.quant.schemes.registry import SCHEMES
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import Model

LEVELS = (0.25, 0.5, 0.75, 1.0)
ROWS = 16
PREFIX = 96  # tokens of a held-out text before its canvas: past the sliding window


def read(name: str) -> list[dict[str, Any]]:
    lines = files("dgq.recipes").joinpath("prompts", name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def fixed_canvases(artifact: Artifact, texts: int, tasks: int) -> Iterator[tuple[list[list[int]], torch.Tensor]]:
    """Batches of prompts and their true canvases (rows, canvas)."""
    tokenizer, length = artifact.tokenizer, artifact.config.canvas
    pairs: list[tuple[list[int], list[int]]] = []
    for item in read("heldout_text.jsonl")[:texts]:
        ids = tokenizer.encode(item["text"])[: PREFIX + length]
        pairs.append((ids[:-length], ids[-length:]))
    for item in read("heldout_tasks.jsonl")[:tasks]:
        prompt = tokenizer.chat(item["messages"])
        chat = [*item["messages"], {"role": "assistant", "content": item["answer"]}]
        answer = tokenizer.chat(chat, add_generation_prompt=False)[len(prompt) :]
        answer = answer[: answer.index(tokenizer.token_id("<turn|>")) + 1]
        pairs.append((prompt, (answer + [artifact.generation.pad_id] * length)[:length]))
    for start in range(0, len(pairs), ROWS):
        batch = pairs[start : start + ROWS]
        yield [prompt for prompt, _ in batch], torch.tensor([canvas for _, canvas in batch])


def logits_of(
    model: Model, prompts: list[list[int]], canvas: torch.Tensor, given: torch.Tensor | None, pad: int
) -> torch.Tensor:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    padding = torch.tensor([[True] * (longest - len(prompt)) + [False] * len(prompt) for prompt in prompts])
    cache = model.new_cache(len(prompts))
    model.encode(ids.to(model.device), cache, padding=padding.to(model.device))
    return model.decode(canvas.to(model.device), cache, given)


def compare(reference: Model, models: dict[str, Model], artifact: Artifact, texts: int, tasks: int) -> dict[str, Any]:
    """KL and top-1 agreement of each model with the reference, by noise level and self-conditioning."""
    generator = torch.Generator().manual_seed(20)
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for prompts, clean in fixed_canvases(artifact, texts, tasks):
        for level in LEVELS:
            noisy = torch.rand(clean.shape, generator=generator) < level
            canvas = torch.where(
                noisy, torch.randint(0, artifact.config.vocab, clean.shape, generator=generator), clean
            )
            pad = artifact.generation.pad_id
            plain = logits_of(reference, prompts, canvas, None, pad)
            for given, suffix in ((None, ""), (plain, " sc")):
                wanted = plain if given is None else logits_of(reference, prompts, canvas, given, pad)
                log_p = wanted.log_softmax(-1)
                for name, model in models.items():
                    found = logits_of(model, prompts, canvas, given, pad)
                    kl = (log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1)
                    same = (wanted.argmax(-1) == found.argmax(-1)).float()
                    kept = sums[name].setdefault(f"{level}{suffix}", [0.0, 0.0, 0])
                    for i, value in enumerate((float(kl.sum()), float(same.sum()), kl.numel())):
                        kept[i] += value
    return {
        name: {
            "kl": {key: round(kl / n, 6) for key, (kl, _, n) in levels.items()},
            "top1": {key: round(same / n, 5) for key, (_, same, n) in levels.items()},
            "mean_kl": round(statistics.mean(kl / n for kl, _, n in levels.values()), 6),
            "mean_top1": round(statistics.mean(same / n for _, same, n in levels.values()), 5),
        }
        for name, levels in sums.items()
    }


def solve(model: Model, artifact: Artifact, tasks: int) -> dict[str, Any]:
    """Exact answers, steps a canvas and early stops over the held-out tasks."""
    items = read("heldout_tasks.jsonl")[:tasks]
    right, steps, early = 0, [], []
    by_task: dict[str, list[int]] = {}
    for start in range(0, len(items), ROWS):
        batch = items[start : start + ROWS]
        prompts = [artifact.tokenizer.chat(item["messages"]) for item in batch]
        result = generate(model, Request(prompts, artifact.generation, artifact.config.canvas, seed=start))
        for item, tokens, took, stopped in zip(batch, result.tokens, result.steps, result.stopped_early, strict=True):
            correct = artifact.tokenizer.decode(tokens).strip() == item["answer"]
            right += correct
            by_task.setdefault(item["task"], []).append(correct)
            steps += took
            early += stopped
    return {
        "score": round(right / len(items), 4),
        "by_task": {task: round(statistics.mean(found), 3) for task, found in sorted(by_task.items())},
        "steps": round(statistics.mean(steps), 3),
        "early": round(statistics.mean(early), 4),
        "canvases": len(steps),
    }


def size_of(artifact: Artifact) -> dict[str, Any]:
    """Bytes of the tensors on disk, and the share of their elements in fewer than 16 bits."""
    stored = artifact.weights.everything().values()
    below = sum(weight.numel for weight in stored if SCHEMES[weight.scheme].bits < 16)
    share = below / sum(weight.numel for weight in stored)
    return {"bytes": sum(weight.nbytes for weight in stored), "share": round(share, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="*")
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.artifacts:
            for to in ("nvfp4", "bnb4", "gguf"):
                out = str(Path(folder) / to)
                result = CliRunner().invoke(
                    cli, ["convert", "tiny", "--to", to, "--effort", "stock", "-o", out, "--device", "cpu"]
                )
                assert result.exit_code == 0, result.output
                options.artifacts.append(out)
        base = open_model("tiny")
        opened = {Path(name).name: open_model(name) for name in options.artifacts}
        reference = base.load(options.device, torch.float32)
        models = {name: artifact.load(options.device, torch.float32) for name, artifact in opened.items()}
        for name, artifact in list(opened.items()):
            if any("input_scale" in weight.parts for weight in artifact.weights.values()):
                opened[f"{name} W4A4"] = artifact
                models[f"{name} W4A4"] = artifact.load(options.device, torch.float32, "nvfp4")
        report: dict[str, Any] = {"bf16": size_of(base)}
        report["bf16"] |= solve(reference, base, options.tasks)
        for name, figures in compare(reference, models, base, options.texts, options.tasks).items():
            report[name] = {**size_of(opened[name]), **figures, **solve(models[name], base, options.tasks)}
    for name, row in report.items():
        free = f"score {row['score']:.1%}  steps {row['steps']:.2f}  stopped early {row['early']:.1%}"
        print(f"{name}: {row['bytes'] / 1e6:.2f} MB, {row['share']:.2%} quantised  {free}")
        if "kl" in row:
            levels = "  ".join(f"{key}: {value:.5f}" for key, value in row["kl"].items())
            print(f"    mean KL {row['mean_kl']:.5f}  top-1 {row['mean_top1']:.2%}  by level  {levels}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
