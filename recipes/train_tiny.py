"""Trains `tiny`: a 7.7 M parameter DiffusionGemma with every part of the 26B one, on one GPU in a few minutes.

    python -m dgq.recipes.tiny_data --work DIR                  # tokens, tokenizer, prompts
    python -m dgq.recipes.train_tiny --work DIR --out OUT       # trains

Two losses, as the model was built for: next token on the encoder, clean token at every canvas position on the decoder.
A canvas at noise level t has each token replaced, with probability t, by a uniformly random one; a sixth of the
canvases are pure noise, where generation starts. Half of the canvases get self-conditioning: the logits of an earlier,
noisier canvas, divided by a temperature that the sampler would use. A Switch balancing loss is taken apart for chats
and text, encoder and decoder, so that no expert starves in any of the four.

Uniform noise is not what a canvas looks like halfway through generation: there the wrong tokens are the model's own
plausible ones. With --own-errors part of each canvas is drawn from the model's earlier logits instead. Text is read
some twenty times over: dropout keeps the encoder from reciting it, which it did without (LOG.md).
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from dgq.recipes.tiny_forward import BOS, CANVAS, PAD, Routed, forward

TINY = Path(__file__).parent / "tiny"  # config.json there is the architecture
COPIED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
COPIED += ["special_tokens_map.json", "chat_template.jinja", "processor_config.json"]
TURN, TURN_END = 5, 6
LENGTH, VOCAB = 256, 2048
# Exact in bf16. The two sides differ, and both are far enough from 1 for a loader that forgets them to be found out.
DECODER_SCALARS = (0.8125, 0.875, 0.84375, 0.9375, 0.8125, 0.90625)
ENCODER_SCALARS = (1.1875, 1.125, 1.15625, 1.0625, 1.1875, 1.125)


def new_model(seed: int) -> Any:
    """Random weights at scales that train: unit-variance embeddings, unsharp attention, halved residual branches."""
    torch.manual_seed(seed)
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    config["dtype"] = config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "float32"
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(config))
    model.model.decoder.embed_tokens.padding_idx = None  # pad fills canvases: it needs an embedding as any token
    with torch.no_grad():
        nn.init.normal_(model.model.decoder.embed_tokens.weight, std=config["text_config"]["hidden_size"] ** -0.5)
        for name, p in model.named_parameters():
            if "vision" in name:
                continue
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(p.numel() ** -0.25)
            elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                p.fill_(0.5)
        for side, scalars in (
            (model.model.decoder, DECODER_SCALARS),
            (model.model.encoder.language_model, ENCODER_SCALARS),
        ):
            for layer, s in zip(side.layers, scalars, strict=True):
                layer.layer_scalar.fill_(s)
    return model


def balance(routed: Routed, groups: list[Tensor]) -> Tensor:
    """Switch loss: experts * sum(share of picks * mean probability), 1 when balanced, over layers and token groups."""
    terms = []
    for probs, chosen in routed:
        for group in groups:
            weight = (group / group.sum().clamp(min=1)).unsqueeze(-1)
            picks, mean = (chosen * weight).sum((0, 1)), (probs * weight).sum((0, 1))
            terms.append((picks * mean).sum() * probs.shape[-1] / picks.sum().clamp(min=1e-6))
    return torch.stack(terms).mean()


def loss_fn(
    model: Any,
    ids: Tensor,
    starts: Tensor,
    target: Tensor,
    canvases: list[Tensor],
    temperature: Tensor,
    keep: Tensor,
    weights: tuple[Tensor, Tensor],
    chat: Tensor,
    own: Tensor | None,
    drop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its three parts to print."""
    enc, dec, enc_routed, dec_routed = forward(model, ids, starts, canvases, temperature, keep, own, drop)
    enc_weight, dec_weight = (w.flatten() / w.sum() for w in weights)
    ar = (
        functional.cross_entropy(enc[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none") * enc_weight
    ).sum()
    ce = (functional.cross_entropy(dec.flatten(0, 1), target.flatten(), reduction="none") * dec_weight).sum()
    real, every = (ids != PAD).float(), torch.ones_like(target, dtype=torch.float32)
    even = balance(enc_routed, [real * chat, real * (1 - chat)])
    even = even + balance(dec_routed, [every * chat, every * (1 - chat)])
    return ce + 0.5 * ar + 0.1 * even, ce.detach(), ar.detach(), even.detach() / 2


class Data:
    """Tokens on the device; batches are cut there."""

    def __init__(self, file: Path, device: str, side: str = "train"):
        arrays = np.load(file)
        self.chats, self.text, lines = (
            torch.from_numpy(arrays[f"{side}_{name}"]).to(device) for name in ("chats", "text", "lines")
        )
        self.lines = lines[lines < len(self.text) - LENGTH].long()
        self.device = device

    def batch(self, chats: int, texts: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sequences, canvas starts, clean canvases, and 1 for the chat rows."""
        d = self.device
        rows = self.chats[torch.randint(len(self.chats), (chats,), device=d)].long()
        at = self.lines[torch.randint(len(self.lines), (texts,), device=d)]
        text = self.text[at[:, None] + torch.arange(LENGTH - 1, device=d)].long()
        ids = torch.cat([rows, functional.pad(text, (1, 0), value=BOS)])
        model_turn = (rows == TURN) & ((rows == TURN).cumsum(-1) % 2 == 0)  # its answer starts three tokens on
        answers = (model_turn * torch.rand(rows.shape, device=d)).topk(n).indices + 3
        answers = torch.where(model_turn.gather(1, answers - 3), answers, answers[:, :1])
        starts = torch.cat([answers, torch.randint(1, LENGTH - CANVAS, (texts, n), device=d)])
        index = (starts[:, :, None] + torch.arange(CANVAS, device=d)).clamp(max=LENGTH - 1)
        target = ids[:, None].expand(-1, n, -1).gather(2, index)
        end = (target == TURN_END).cumsum(-1)
        target = torch.where(end - (target == TURN_END).long() > 0, PAD, target).flatten(1)
        return ids, starts, target, (torch.arange(len(ids), device=d) < chats).float()[:, None]


def corrupt(target: Tensor, level: Tensor) -> Tensor:
    noise = torch.randint(VOCAB, target.shape, device=target.device)
    return torch.where(torch.rand(target.shape, device=target.device) < level, noise, target)


def training_batch(data: Data, opt: argparse.Namespace) -> dict[str, Any]:
    texts, n = round(opt.batch * opt.text_share), opt.canvases
    ids, starts, target, chat = data.batch(opt.batch - texts, texts, n)

    def per_canvas() -> Tensor:
        return torch.rand(target.shape[0], n, device=target.device).repeat_interleave(CANVAS, 1)

    level = per_canvas() * 1.2  # above 1, a sixth of the canvases, means pure noise
    answer = ((ids == TURN).cumsum(-1) % 2 == 0) & (ids != PAD)  # in text, every token
    return {
        "ids": ids,
        "starts": starts,
        "target": target,
        "canvases": [corrupt(target, level + per_canvas() * 0.5), corrupt(target, level)],
        "temperature": (0.4 + 0.6 * per_canvas()).unsqueeze(-1),
        "keep": (per_canvas() < 0.5).float().unsqueeze(-1),
        "weights": (
            (answer.float() * (1 + 2 * chat) + 0.05 * (ids != PAD))[:, 1:],
            torch.where(target == PAD, 0.5, 1 + 3 * chat),
        ),
        "chat": chat,
        "own": torch.rand(target.shape, device=target.device) < per_canvas() * opt.own_errors
        if opt.own_errors
        else None,
        "drop": (1 - chat).unsqueeze(-1) * opt.dropout
        if opt.dropout
        else None,  # tasks are new every time, text is not
    }


def write_checkpoint(model: nn.Module, out: Path) -> None:
    """The released layout: shared weights once, under the decoder; layer scalars twice; no head; bf16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in model.state_dict().items():
        twin = name.startswith("model.encoder.language_model.") and not name.endswith("layer_scalar")
        if name != "lm_head.weight" and not twin:
            state[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for file in COPIED:
        if out.resolve() != TINY.resolve():
            shutil.copy(TINY / file, out / file)


def train(model: nn.Module, data: Data, opt: argparse.Namespace) -> dict[str, float]:
    """AdamW, warm-up then linear decay to zero by the clock, so that a run ends on time whatever the machine."""
    trained = {n: p for n, p in model.named_parameters() if "vision" not in n}
    decay = [p for n, p in trained.items() if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in trained.items() if p.ndim < 2 or "embed" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=data.device == "cuda")

    def one(fn: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with torch.autocast(data.device, torch.bfloat16):
            return fn(model, **training_batch(data, opt))

    compiling = time.monotonic()
    step_fn: Callable[..., tuple[Tensor, ...]] = loss_fn
    if opt.compile:
        try:
            step_fn = torch.compile(loss_fn)
            one(step_fn)[0].backward()
        except Exception as error:  # a slower run beats none
            print(f"not compiled: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            step_fn = loss_fn
        adam.zero_grad(set_to_none=True)
        if data.device == "cuda":
            torch.cuda.synchronize()
    begun, told, step = time.monotonic(), 0.0, 0
    seconds = opt.minutes * 60 - (begun - compiling)
    print(f"compiled in {begun - compiling:.0f} s", flush=True)
    while (now := time.monotonic() - begun) < seconds and (not opt.steps or step < opt.steps):
        lr = opt.lr * min(1.0, (step + 1) / 200) * max(0.0, 1 - now / seconds)
        for group in adam.param_groups:
            group["lr"] = lr
        loss, ce, ar, even = one(step_fn)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        if now - told > 10 or step == 1:
            told = now
            print(
                f"{now:4.0f} s  step {step}  canvas {ce:.4f}  encoder {ar:.4f}  balance {even:.3f}  lr {lr:.5f}",
                flush=True,
            )
            if not math.isfinite(ce.item()):
                raise SystemExit("the loss is not finite")
    wall = time.monotonic() - begun
    return {"steps": step, "seconds": round(wall), "steps_per_second": round(step / wall, 2)}


def main() -> None:
    args = argparse.ArgumentParser(description="Trains the embedded `tiny` model.")
    args.add_argument("--work", type=Path, required=True, help="where tiny_data.py left tokens.npz")
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--minutes", type=float, default=7.9, help="of training, compilation included")
    args.add_argument("--batch", type=int, default=128)
    args.add_argument("--canvases", type=int, default=4)
    args.add_argument("--text-share", type=float, default=0.4)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--steps", type=int, default=0)
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--own-errors", type=float, default=0.5, help="largest share of a canvas drafted by the model")
    args.add_argument("--dropout", type=float, default=0.1, help="of what a layer adds, in text")
    args.add_argument("--no-compile", dest="compile", action="store_false")
    opt = args.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = new_model(opt.seed).to(device)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    print(f"{total:,} parameters, {routed / total:.1%} in routed experts, on {device}", flush=True)
    figures = train(model, Data(opt.work / "tokens.npz", device), opt)
    write_checkpoint(model, opt.out)
    print(figures, flush=True)


if __name__ == "__main__":
    main()
