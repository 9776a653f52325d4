"""Judges a `tiny` checkpoint on held-out data.

    python -m dgq.recipes.tiny_eval CHECKPOINT --work DIR [--out metrics.json]

The BF16 weights are read as they are on disk and computed in fp32, because the rounding is part of what is shipped.
Tasks and text go through transformers' own generate() with the settings of generation_config.json; the same is then
tried with one part taken away (self-conditioning, the decoder's or the encoder's layer scalars), since a part that can
go unnoticed tests nothing. Losses and expert counts come from the training forward.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

from dgq.recipes.tiny_data import words_of
from dgq.recipes.tiny_forward import CANVAS, PAD, forward
from dgq.recipes.train_tiny import Data, corrupt

PROMPTS = Path(__file__).parent / "prompts"
LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)
Stop = generation.StableAndConfidentStoppingCriteria


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


@contextmanager
def watched() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records, step by step, which canvases of a batch meet the stop rule, and their mean entropy."""
    seen: list[tuple[Tensor, Tensor]] = []
    stock = Stop.__call__

    def call(self: Any, canvas: Tensor, logits: Tensor, **kwargs: Any) -> Any:
        done = stock(self, canvas, logits, **kwargs)
        seen.append((done.cpu(), torch.distributions.Categorical(logits=logits).entropy().mean(-1).cpu()))
        return done

    Stop.__call__ = call
    try:
        yield seen
    finally:
        Stop.__call__ = stock


@contextmanager
def without(model: Any, part: str) -> Iterator[None]:
    """The model with one part taken away."""
    sides = {"decoder_scalars": model.model.decoder, "encoder_scalars": model.model.encoder.language_model}
    kept: list[Tensor] = []
    module = model.model.decoder.self_conditioning
    stock = module.forward
    if part == "self_conditioning":
        module.forward = lambda x, signal: stock(x, torch.zeros_like(signal))
    elif part in sides:
        kept = [layer.layer_scalar.clone() for layer in sides[part].layers]
        for layer in sides[part].layers:
            layer.layer_scalar.fill_(1)
    try:
        yield
    finally:
        module.forward = stock
        for layer, scalar in zip(sides[part].layers if kept else [], kept, strict=True):
            layer.layer_scalar.copy_(scalar)


def solve(model: Any, tok: Any, rows: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Exact answers, steps a canvas and early stops over the held-out tasks."""
    limit = model.generation_config.max_denoising_steps
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    steps: list[int] = []
    last: list[float] = []
    wrong: list[tuple[str, str, str]] = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        text = [tok.apply_chat_template(r["messages"], add_generation_prompt=True, tokenize=False) for r in part]
        enc = tok(text, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        torch.manual_seed(at)
        with watched() as seen:
            out = model.generate(input_ids=enc.input_ids, attention_mask=enc.attention_mask, max_new_tokens=CANVAS)
        done = torch.stack([d for d, _ in seen])
        entropy = torch.stack([e for _, e in seen])
        for i, row in enumerate(part):
            said = tok.decode(out.sequences[i, enc.input_ids.shape[1] :], skip_special_tokens=True)
            asked[row["task"]] += 1
            right[row["task"]] += said == row["answer"]
            if said != row["answer"]:
                wrong.append((row["messages"][0]["content"], row["answer"], said))
            hits = done[:, i].nonzero()
            steps.append(int(hits[0]) + 1 if len(hits) else limit + 1)
            last.append(round(entropy[min(steps[-1], len(entropy)) - 1, i].item(), 5))
    return {
        "exact": sum(right.values()) / len(rows),
        "by_task": {k: f"{right[k]}/{asked[k]}" for k in sorted(asked)},
        "stopped_before_limit": sum(s < limit for s in steps) / len(rows),
        "mean_steps": sum(min(s, limit) for s in steps) / len(rows),
        "steps_histogram": dict(sorted(Counter(min(s, limit) for s in steps).items())),
        "last_entropy_quantiles": torch.tensor(last).quantile(torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist(),
        "wrong": wrong[:12],
    }


def continue_text(model: Any, tok: Any, rows: list[dict[str, Any]], words: set[str], blocks: int) -> dict[str, Any]:
    """Continues held-out texts; how many of the printed words does the training text know?"""
    ids = torch.tensor([tok(r["text"]).input_ids[:63] for r in rows], device=model.device)
    ids = pad(ids, (1, 0), value=tok.bos_token_id)
    torch.manual_seed(0)
    with watched() as seen:
        out = model.generate(input_ids=ids, max_new_tokens=blocks * CANVAS).sequences[:, ids.shape[1] :]
    texts = [tok.decode(o, skip_special_tokens=True) for o in out]
    printed = [w for t in texts for w in words_of(t)[1:-1]]
    return {
        "words": len(printed),
        "words_known": sum(w in words for w in printed) / max(1, len(printed)),
        "distinct_words": len(set(printed)),
        "steps": len(seen),
        "samples": [
            {"prompt": tok.decode(i[-30:]), "text": t} for i, t in list(zip(ids.tolist(), texts, strict=True))[:6]
        ],
    }


def losses(model: Any, data: Data, device: str, rows: int) -> dict[str, dict[str, float]]:
    """Decoder loss by noise level for chats and text, with and without self-conditioning; and the encoder's.

    "drafted": half of the canvas comes from the model's own earlier logits, as halfway through generation.
    """
    out: dict[str, dict[str, float]] = {}
    for kind, (chats, texts) in {"chats": (rows, 0), "text": (0, rows)}.items():
        torch.manual_seed(0)
        ids, starts, target, _ = data.batch(chats, texts, 2)
        table = out.setdefault(kind, {})
        for level in LEVELS:
            at = torch.full((1, 1), level, device=device)
            earlier, noised = corrupt(target, (at + 0.25).clamp(max=1)), corrupt(target, at)
            half = torch.rand(target.shape, device=device) < 0.5
            for name, keep, own in (("", 1.0, None), (" without", 0.0, None), (" drafted", 1.0, half)):
                on, warm = torch.tensor(keep, device=device), torch.tensor(0.6, device=device)
                enc, dec, _, _ = forward(model, ids, starts, [earlier, noised], warm, on, own)
                table[f"{level}{name}"] = round(cross_entropy(dec.flatten(0, 1), target.flatten()).item(), 5)
        ar = cross_entropy(enc[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        table["encoder"] = round(ar.item(), 4)
    return out


def expert_counts(model: Any, data: Data, device: str, rows: int) -> dict[str, list[list[float]]]:
    """Smallest and largest share of an expert over its layer's mean, for each kind of token and all together."""
    torch.manual_seed(1)
    counts: dict[str, Tensor] = {}
    for kind, (chats, texts) in {"chats": (rows, 0), "text": (0, rows)}.items():
        ids, starts, target, _ = data.batch(chats, texts, 2)
        level = torch.rand(rows, 2, device=device).mul(1.2).repeat_interleave(CANVAS, 1)
        canvases = [corrupt(target, level + 0.25), corrupt(target, level)]
        one = torch.ones((), device=device)
        _, _, enc, dec = forward(model, ids, starts, canvases, one * 0.6, one)
        real = (ids != PAD).float()[..., None]
        counts[f"{kind}, encoder"] = torch.stack([(c * real).sum((0, 1)) for _, c in enc])
        counts[f"{kind}, decoder"] = torch.stack([c.sum((0, 1)) for _, c in dec])
    counts["all"] = torch.stack(list(counts.values())).sum(0)
    ratio = {k: c / c.mean(-1, keepdim=True) for k, c in counts.items()}
    return {k: [[round(x, 3) for x in (r.min().item(), r.max().item())] for r in table] for k, table in ratio.items()}


def main() -> None:
    args = argparse.ArgumentParser(description="Judges a `tiny` checkpoint on held-out data.")
    args.add_argument("checkpoint", type=Path)
    args.add_argument("--work", type=Path, required=True, help="where tiny_data.py left tokens.npz and words.json")
    args.add_argument("--out", type=Path)
    args.add_argument("--tasks", type=int, default=256)
    args.add_argument("--batch", type=int, default=256)
    args.add_argument("--texts", type=int, default=64)
    args.add_argument("--rows", type=int, default=128, help="sequences for losses and expert counts")
    args.add_argument("--no-ablations", dest="ablations", action="store_false")
    opt = args.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = AutoTokenizer.from_pretrained(opt.checkpoint)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        opt.checkpoint, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    )
    model = model.to(device).eval()
    texts = rows_of("heldout_text")[: opt.texts]
    data, tasks = Data(opt.work / "tokens.npz", device, "held"), rows_of("heldout_tasks")[: opt.tasks]
    words = set(json.loads((opt.work / "words.json").read_text("utf-8")))
    result: dict[str, Any] = {}

    def measure(name: str, fn: Callable[..., Any], *args: Any) -> None:
        begun = time.monotonic()
        with torch.no_grad():
            result[name] = fn(*args)
        print(f"{name} ({time.monotonic() - begun:.0f} s): {json.dumps(result[name], ensure_ascii=False)}", flush=True)
        if opt.out:
            opt.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")

    measure("tasks", solve, model, tok, tasks, opt.batch)
    measure("losses", losses, model, data, device, opt.rows)
    measure("experts", expert_counts, model, data, device, opt.rows)
    measure("text", continue_text, model, tok, texts, words, 3)
    for part in ("self_conditioning", "decoder_scalars", "encoder_scalars") if opt.ablations else ():
        with without(model, part):
            measure(f"tasks without {part}", solve, model, tok, tasks, opt.batch)
            measure(f"losses without {part}", losses, model, data, device, opt.rows)
            measure(f"text without {part}", continue_text, model, tok, texts, words, 3)


if __name__ == "__main__":
    main()
