"""How far bfloat16 is from float32 on the second shape (tests/tools/second.py): the engine's passes, and transformers'.

    python tests/benchmarks/bench_bf16_parity.py [--path fast|plain] [--prompts 64] [--unrounded-scale] [--vocab 66048]

Each case is a model with random weights, transformers' own in float32 (the right values) and in bfloat16, and dgq's in
bfloat16 with the same weights, over the same prompts and canvases. Both windows, a plain BF16 table, a packed Q8_0 one
and, at a width of 768, a Q6_K one. "first" are the logits without self-conditioning, "again" those with it, conditioned
on the same logits. Figures are [ours, transformers']: the largest distance, the root of the mean square over all
logits, and the median of that of each position; `factor` is ours over transformers', and may be 1.25. The first two are
ruled by the few positions where a near-tie in a router falls the other way in bfloat16, so that they want many prompts.

--unrounded-scale: embeddings times sqrt(hidden) as it was before it was rounded as transformers rounds it, for the
record. --path: the kernels (a GPU, or Triton's interpreter with --vocab 256) or the reference's operations.
Ends in one JSON line; exit 1 if a factor is above 1.25.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from second import VOCAB, WINDOWS, in_transformers, second_config, second_tensors

from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.engine.plain import Plain
from dgq.runtime.model import layers, loading
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.session import Session
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.settings import SamplerConfig

MOST = 1.25
CASES = [(window, 352, table) for window in WINDOWS for table in ("bf16", "q8_0")] + [(WINDOWS[0], 768, "q6_k")]


@dataclass
class Case:
    """One model three times. table: the scheme of its embedding table."""

    config: ModelConfig
    weights: dict[str, Packed]
    exact: Any
    rounded: Any
    device: str


def made(window: int, hidden: int, table: str, vocab: int, device: str) -> Case:
    raw = second_config(window, vocab=vocab)
    raw["text_config"]["hidden_size"] = hidden
    raw.pop("vision_config", None)
    weights = {}
    for name, values in second_tensors(raw).items():
        scheme = SCHEMES[table if "embed_tokens" in name else "bf16"]
        weights[name] = Packed(scheme, tuple(values.shape), scheme.quantize(values))
    models = [transformers_model(raw, weights, dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    return Case(ModelConfig.from_json(raw, "config.json"), weights, *models, device)


def transformers_model(raw: dict[str, Any], weights: dict[str, Packed], dtype: torch.dtype, device: str) -> Any:
    """transformers' model with these weights, decoded."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        tensors = {name: weight.dequantize(torch.float32).clone() for name, weight in weights.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        eager = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
        return in_transformers(Path(folder), dtype, **eager).to(device)


def theirs(model: Any, prompt: Tensor, canvas: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (canvas, vocab) float32 of transformers' model, without and with self-conditioning, and what it was
    conditioned on: `given`, or else its first logits."""
    from transformers import DynamicCache

    cache, length = DynamicCache(config=model.config.get_text_config()), prompt.shape[1]
    with torch.no_grad():
        model.model.encoder(
            input_ids=prompt, attention_mask=torch.ones_like(prompt, dtype=torch.bool), past_key_values=cache,
            position_ids=torch.arange(length, device=prompt.device)[None],
        )  # fmt: skip
        places = torch.arange(length, length + canvas.shape[1], device=prompt.device)[None]
        step = {"decoder_input_ids": canvas, "past_key_values": cache, "decoder_position_ids": places}
        first = model(**step).logits.float()
        given = first if given is None else given
        again = model(**step, self_conditioning_logits=given).logits.float()
    return first[0], again[0], given


def ours(backend: Any, prompt: Tensor, canvas: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a backend of dgq's, conditioned on the head's products `raw` (canvas, vocab), neither capped nor
    divided by the temperature, which is 1."""
    config, device = backend.config, backend.device
    sampler = SamplerConfig(steps=2, t_min=1.0, t_max=1.0)
    session = Session(backend, 1, prompt.shape[1] + canvas.shape[1], sampler)
    session.start(prompt.tolist())
    state, view = session.state, session._view()
    first = torch.zeros(1, dtype=torch.int64, device=device)
    state.begin(CounterRandom(0, [0], config.canvas, config.vocab, device), first, 0)
    both = []
    for step in range(2):
        if step and isinstance(backend, Plain):
            capped = config.softcap * torch.tanh(raw.float() / config.softcap)
            state.soft.copy_(layers.soft_embed(capped[None], backend._model.table, backend.dtype))
        elif step:
            from dgq.runtime.kernels import fused

            fused.sample(state._all, raw[None], state._probabilities)
            state.soften()
        state.canvas.copy_(canvas)
        logits = backend.decode(state, view).float().view(config.canvas, -1)
        both.append(logits if isinstance(backend, Plain) else config.softcap * torch.tanh(logits / config.softcap))
    return both[0], both[1]


def backend_of(case: Case, path: str, unrounded: bool) -> Any:
    options = LoadOptions(kernels=path == "fast")
    model = Model(case.config, case.weights, case.device, torch.bfloat16, options=options)
    if path == "plain":
        return Plain(model)
    from dgq.runtime.engine.fast import Fast

    backend = Fast(model)
    backend.capturable = False
    if unrounded:
        backend._scale = case.config.hidden**0.5
    return backend


class Distance:
    """Of logits (canvas, vocab) from the right ones, of all canvases that are added."""

    def __init__(self) -> None:
        self._largest: list[float] = []
        self._squares: list[Tensor] = []

    def add(self, logits: Tensor, right: Tensor) -> None:
        gap = (logits - right).double()
        self._largest.append(float(gap.abs().max()))
        self._squares.append(gap.square().mean(-1).cpu())

    @property
    def figures(self) -> dict[str, float]:
        """The largest, the root of the mean square, and the median of that of each position."""
        each = torch.cat(self._squares)
        return {"max": max(self._largest), "rms": float(each.mean().sqrt()), "median": float(each.sqrt().median())}


def inputs(case: Case, prompts: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random prompts of one to five windows, and canvases."""
    generator = torch.Generator().manual_seed(seed)
    config = case.config
    for number in range(prompts):
        length = config.window * (1 + number % 5) + 3
        ids = torch.randint(5, config.vocab, (1, length + config.canvas), generator=generator).to(case.device)
        yield ids[:, :length], ids[:, length:]


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    backend, figures = backend_of(case, options.path, options.unrounded_scale), {}
    gaps = {(who, part): Distance() for who in ("ours", "transformers") for part in ("first", "again")}
    cap = case.config.softcap
    for prompt, canvas in inputs(case, options.prompts, options.seed):
        first, _, _ = theirs(case.exact, prompt, canvas, None)
        raw = (cap * torch.atanh((first / cap).clamp(-0.999, 0.999))).bfloat16()  # what the head's product would be
        given = (cap * torch.tanh(raw.float() / cap))[None]
        right = theirs(case.exact, prompt, canvas, given)
        for who, found in (
            ("ours", ours(backend, prompt, canvas, raw)),
            ("transformers", theirs(case.rounded, prompt, canvas, given)),
        ):
            for part, at in (("first", 0), ("again", 1)):
                gaps[who, part].add(found[at], right[at])
    for part in ("first", "again"):
        mine, other = gaps["ours", part].figures, gaps["transformers", part].figures
        figures[part] = {kind: [round(mine[kind], 6), round(other[kind], 6)] for kind in mine}
        figures[part]["factor"] = {kind: round(mine[kind] / other[kind], 3) for kind in mine}
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--path", choices=["fast", "plain"], default="fast" if device == "cuda" else "plain")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--unrounded-scale", action="store_true")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seed", type=int, default=0, help="Of prompts and canvases.")
    parser.add_argument("--cases", type=int, nargs="*", help="Numbers of cases, from 0. [default: all]")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    loading.decodes = lambda *_: False  # type: ignore[assignment]  # the table stays packed, as on a small card
    if options.unrounded_scale:
        layers.embedding_scale = lambda hidden, _: hidden**0.5  # type: ignore[assignment]
    results = {}
    for number in range(len(CASES)) if options.cases is None else options.cases:
        window, hidden, table = CASES[number]
        case = made(window, hidden, table, options.vocab, device)
        figures = measured(case, options)
        results[f"window {window}, hidden {hidden}, {table} table"] = figures
        for part, values in figures.items():
            print(f"window {window:2} hidden {hidden} {table:5} {part:5}", values, file=sys.stderr)
    every = [values["factor"] for figures in results.values() for values in figures.values()]
    worst = {kind: max(factor[kind] for factor in every) for kind in ("max", "rms", "median")}
    said = {"bench": "bf16_parity", "device": device, "path": options.path, "prompts": options.prompts}
    said |= {"unrounded_scale": options.unrounded_scale, "vocab": options.vocab, "worst_factor": worst}
    print(json.dumps({**said, "at_most": MOST, "cases": results}))
    return int(max(worst.values()) > MOST)


if __name__ == "__main__":
    sys.exit(main())
