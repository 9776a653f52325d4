"""`dgq mix`: a recipe for a number of bytes, by what each part of this model loses in each scheme.

    parts x schemes ──> trials: KL(BF16 || that part alone in that scheme)  ──┐
                        mix/trials.py                                         ├──> choice ──> recipe.toml
    --bytes - what is not up for choice  ─────────────────────────────────────┘

A part is a kind of matrix in some layers that follow each other, the self-conditioning, or the embedding. Losses are
added up; the whole loses less than that (on `tiny` the sum is 2.7 times as much), so it is measured in the end, beside
the format's default recipe. Rows that a scheme does not divide take another of about as many bits.

Losses lie in .NAME.mix until the recipe is written. The same command goes on from there and ends in the same bytes; so
does one that differs in --bytes, by what the parts lose as far as that was measured.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from dgq.convert.layerwise.budget import UNSAID, Budget
from dgq.convert.layerwise.samples import chunks, documents
from dgq.convert.mixture.trials import Meter, Trial, batches
from dgq.convert.plans.plan import Plan, PlannedTensor, layout_of, make_plan
from dgq.convert.plans.recipe import Recipe, Rule
from dgq.convert.plans.recipes import DEFAULTS, find_recipe
from dgq.convert.resume.journal import check_target
from dgq.convert.resume.work import Found, Work
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import dgq_version
from dgq.quant.errors import InputError, printable
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme
from dgq.runtime.shape.names import EMBEDDING, gguf_name, layer_of

Format = Literal["gguf", "nvfp4", "bnb4"]
BF16 = "bf16"
LADDERS = {"gguf": ("q4_k", "q5_0", "q6_k", "q8_0"), "nvfp4": ("nvfp4", "q8_0"), "bnb4": ("nf4",)}
OTHERWISE = {"q4_k": "q5_0", "q6_k": "q8_0"}
ROUTER = {"gguf": "*.ffn_gate_inp.weight", "nvfp4": "*.router.*", "bnb4": "*.router.*"}
FILE_TYPES = {"q4_k": 15, "q5_0": 8, "q6_k": 18, "q8_0": 7, "bf16": 32}  # llama.cpp's LLAMA_FTYPE_MOSTLY_…
EACH_LAYER, GROUPS = 8, 5  # layers up to which each is a group of its own; groups of more
STATES = 1 << 15  # beginnings of a choice that are kept


class Option(NamedTuple):
    """A part in a scheme: what it takes and what it loses."""

    scheme: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Part:
    """Weights that are decided on together. trials: scheme, or "a/b" of two -> each weight's; sizes: the same -> bytes,
    with BF16's."""

    name: str
    weights: tuple[str, ...]
    trials: dict[str, Trial]
    sizes: dict[str, int]


def mix(
    source: Source, to: Format, budget: int, out: Path, prompts: Path | None, seed: int, groups: int | None, count: int,
    device: str, threads: int, advance: Callable[[int, int], None], notice: Callable[[str], None],
    memory: Budget = UNSAID,
) -> dict[str, Any]:  # fmt: skip
    """Write the recipe `out` for `budget` bytes of tensors; what it says about itself. count: chunks of samples.
    InputError for a budget that no choice keeps, or that BF16 keeps; for too little memory."""
    began = time.perf_counter()
    check_target(out)
    if out.suffix != ".toml":
        raise InputError(f"-o {out}: a recipe's name ends in .toml")
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: there is no directory {out.absolute().parent}")
    layers = len(source.config.layers)
    groups = min(groups or (layers if layers <= EACH_LAYER else GROUPS), layers)
    several = parts(source, to, groups)
    least = _assigned(several, [min(part.sizes, key=part.sizes.__getitem__) for part in several])
    smallest = make_plan(source, recipe(to, least))
    fixed = smallest.nbytes - sum(min(part.sizes.values()) for part in several)
    whole = fixed + sum(part.sizes[BF16] for part in several)
    if budget < smallest.nbytes:
        raise InputError(f"--bytes {budget:,}: {to} takes {smallest.nbytes:,} at least, everything in its fewest bits")
    if budget >= whole:
        raise InputError(f"--bytes {budget:,}: {whole:,} hold everything in BF16; there is nothing to choose")
    found, data = documents(source, prompts)
    found = [document for document in found if not document.open]
    if not found:
        raise InputError(
            f"{prompts}: holds no text and no chat with an answer, and nothing else has a canvas to measure on"
        )
    made = chunks(found, seed, 0, source)[:count]
    trials = [trial for part in several for trial in part.trials.values()]
    stock = _stock(source, to)
    others = [stock] if stock else []
    identity = {
        "dgq": dgq_version(), "weights": source.digest(), "data": data, "seed": seed, "chunks": count,
        "format": to, "groups": groups, "device": device,
    }  # fmt: skip
    work = Work(out, identity, lambda *_: None, notice, "mix")
    try:
        with Meter(smallest, made, work.folder, device, threads, memory) as meter:
            together = batches(trials)
            left = [trials[i] for unit, own in enumerate(together) if not work.has("trials", unit) for i in own]
            done, total = 0, (2 + len(others) + 1) * layers + meter.steps(left)

            def step() -> None:
                nonlocal done
                done += 1
                advance(done, total)

            notice(f"{len(trials)} trials of {len(several)} parts: as much work as {total / layers:.0f} passes of"
                   f" {meter.tokens:,} tokens through the model")  # fmt: skip
            meter.prepare(step)
            results = work.each(
                "trials", len(together), lambda n: _found(meter, [trials[i] for i in together[n]], step)
            )
            losses = {
                i: float(kl) for n, own in enumerate(together) for i, kl in zip(own, results(n)["kl"], strict=True)
            }
            lost = iter(losses[i] for i in range(len(trials)))
            options = [
                [*(Option(s, part.sizes[s], next(lost)) for s in part.trials), Option(BF16, part.sizes[BF16], 0.0)]
                for part in several
            ]
            picked = [each[i] for each, i in zip(options, choose(options, budget - fixed), strict=True)]
            chosen = _assigned(several, [option.scheme for option in picked])
            planned = make_plan(source, recipe(to, chosen))
            planned = replace(
                planned, recipe=planned.recipe.model_copy(update={"label": f"mixed-{_bits(planned):.2f}bpw"})
            )
            both = [_quantised(one) for one in (planned, *others)]
            measured = work.each(f"whole-{budget}", 1, lambda _: _found(meter, both, step))(0)["kl"].tolist()
    except BaseException:
        work.remove_if_empty()
        raise
    about = {
        "output": str(out), "format": to, "budget": budget, "bytes": planned.nbytes, "bits_per_weight": _bits(planned),
        "kl": {"predicted": sum(option.kl for option in picked), "measured": measured[0]},
        "default": stock and {"recipe": DEFAULTS[to], "bytes": stock.nbytes, "kl": measured[1]},
        "data": data, "seed": seed, "tokens": sum(chunk.tokens for chunk in made), "trials": len(trials),
        "parts": [
            {"part": part.name, "chosen": pick.scheme, "weights": list(part.weights),
             "options": [option._asdict() for option in each]}
            for part, pick, each in zip(several, picked, options, strict=True)
        ],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    try:
        new = work.folder / "recipe"
        new.write_text(text(planned.recipe, about), "utf-8")
        new.replace(out)  # never a part of it
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from None
    work.remove()
    return about


def _found(meter: Meter, trials: Sequence[Trial], step: Callable[[], None]) -> Found:
    return {"kl": torch.tensor(meter.kl(trials, step), dtype=torch.float64)}


def parts(source: Source, to: Format, groups: int) -> list[Part]:
    """What of a model a format can quantise, with what."""
    layers = len(source.config.layers)
    found: dict[str, list[str]] = {}
    for name, spec in source.text.items():
        if len(spec.shape) < 2 or ".router." in name:
            continue
        index = layer_of(name)
        if index is None:
            part = "embedding" if name == EMBEDDING else "self-conditioning"
        else:
            own = [i for i in range(layers) if i * groups // layers == index * groups // layers]
            part = f"{_kind(name)} {own[0]}" + (f"-{own[-1]}" if len(own) > 1 else "")
        found.setdefault(part, []).append(name)
    made = [_part(part, names, source, to) for part, names in found.items()]
    return [part for part in made if part.trials]


def _part(name: str, weights: list[str], source: Source, to: Format) -> Part:
    trials: dict[str, Trial] = {}
    sizes = {BF16: sum(2 * math.prod(source.text[weight].shape) for weight in weights)}
    for scheme in LADDERS[to]:
        each = [_placed(to, w, source.text[w].shape, s) for w in weights for s in (scheme, OTHERWISE.get(scheme))]
        placed = {one.name: one for one in reversed(each) if one is not None}  # the scheme itself before the other one
        trial = {weight: placed[weight].scheme for weight in weights if weight in placed}
        if len(trial) == len(weights) and trial not in trials.values():
            label = "/".join(sorted({one.name for one in trial.values()}))
            trials[label] = trial
            sizes[label] = sum(one.nbytes for one in placed.values())
    return Part(name, tuple(weights), trials, sizes)


def _placed(to: Format, name: str, shape: tuple[int, ...], scheme: str | None) -> PlannedTensor | None:
    """The weight as the format stores it in a scheme, if it can."""
    if scheme is None or shape[-1] % SCHEMES[scheme].block:
        return None
    if to == "gguf":
        return PlannedTensor(name, name, shape, SCHEMES[scheme])
    layout = layout_of(recipe(to, {name: SCHEMES[scheme]}), {name: SCHEMES[scheme]})
    held = layout.holds(name, shape)
    return PlannedTensor(name, name, shape, SCHEMES[scheme], layout.entries(name, shape)) if held else None


def _assigned(several: Sequence[Part], schemes: Sequence[str]) -> dict[str, Scheme]:
    return {
        weight: SCHEMES[BF16] if scheme == BF16 else part.trials[scheme][weight]
        for part, scheme in zip(several, schemes, strict=True)
        for weight in part.weights
    }


def choose(options: Sequence[Sequence[Option]], room: int) -> list[int]:
    """Of each part the option, so that all lose least within `room` bytes, which hold the smallest ones. Exact while no
    more than STATES beginnings are worth going on with; beyond, of those alike in bytes the best one is."""
    ends = [sum(min(option.bytes for option in each) for each in options[i + 1 :]) for i in range(len(options))]
    size, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail = []
    for each, end in zip(options, ends, strict=True):
        sizes = (size[:, None] + torch.tensor([option.bytes for option in each])).flatten()
        losses = (loss[:, None] + torch.tensor([option.kl for option in each], dtype=torch.float64)).flatten()
        order = losses.argsort(stable=True)
        order = order[sizes[order].argsort(stable=True)]
        order = order[sizes[order] <= room - end]
        best = losses[order].cummin(0).values
        order = order[torch.cat((torch.ones(1, dtype=torch.bool), losses[order][1:] < best[:-1]))]
        if len(order) > STATES:
            cell = sizes[order] * STATES // room
            order = order[torch.cat((cell[1:] != cell[:-1], torch.ones(1, dtype=torch.bool)))]
        trail.append((order // len(each), order % len(each)))
        size, loss = sizes[order], losses[order]
    picked, at = [], len(size) - 1
    for before, option in reversed(trail):
        picked.append(int(option[at]))
        at = int(before[at])
    return picked[::-1]


def recipe(to: Format, schemes: dict[str, Scheme]) -> Recipe:
    """That gives these weights (canonical names) these schemes, and leaves the rest as it is."""
    plain = "f32" if to == "gguf" else BF16
    own = {(gguf_name(name) or name) if to == "gguf" else name: scheme.name for name, scheme in schemes.items()}
    found = [Rule(match="*", scheme=plain, max_dims=1), Rule(match=ROUTER[to], scheme=plain)]
    kinds: dict[str, dict[str, str]] = {}
    for name, scheme in own.items():
        kinds.setdefault(_pattern(name), {})[name] = scheme
    for pattern, several in kinds.items():
        usual = Counter(several.values()).most_common(1)[0][0]
        found += [Rule(match=name, scheme=scheme) for name, scheme in several.items() if scheme != usual]
        found.append(Rule(match=pattern, scheme=usual))
    found.append(Rule(match="*", scheme=BF16))
    most = Counter(own.values()).most_common(1)[0][0]
    return Recipe(
        name="mixed", format=to, layout="dgq" if to == "nvfp4" else None, label="mixed",
        description="mixed by measured loss", file_type=FILE_TYPES[most] if to == "gguf" else 0, max_16bit_share=1,
        rule=tuple(found),
    )  # fmt: skip


def _kind(name: str) -> str:
    return name.split(".layers.")[1].split(".", 1)[1].removesuffix(".weight")


def _pattern(name: str) -> str:
    """The shell pattern of the same weight in any layer."""
    return re.sub(r"^(blk|.*\.layers)\.\d+\.", r"\1.*.", name)


def _bits(plan: Plan) -> float:
    return round(8 * plan.nbytes / plan.params, 4)


def _quantised(plan: Plan) -> dict[str, Scheme]:
    return {t.source: t.scheme for t in plan.weights if t.source and t.scheme.bits < 16 and not t.vision}


def _stock(source: Source, to: Format) -> Plan | None:
    """By the format's default recipe, if that fits the model."""
    try:
        return make_plan(source, find_recipe(to))
    except InputError:
        return None


def text(found: Recipe, about: dict[str, Any]) -> str:
    """The recipe's file: what was measured in comments, then the rules."""
    kl, stock = about["kl"], about["default"]
    beside = f"; {stock['recipe']}: {stock['bytes']:,} bytes, {stock['kl']:.3g}" if stock else ""
    lines = [
        f"# Made by dgq mix for {about['budget']:,} bytes: {about['bytes']:,} bytes of tensors.",
        f"# KL(BF16 || it), nats a position: {kl['predicted']:.3g} as the sum of its parts', {kl['measured']:.3g}"
        f" measured{beside}.",
        f"# On {about['tokens']:,} tokens of {printable(about['data']['name'])} ({about['data']['sha256'][:12]}), seed"
        f" {about['seed']}. Each part alone in each scheme, bytes and KL; * is what was chosen:",
    ]  # fmt: skip
    for part in about["parts"]:
        each = [f"{'*' if o['scheme'] == part['chosen'] else ''}{o['scheme']} {o['bytes']:,} {o['kl']:.2e}"
                for o in part["options"]]  # fmt: skip
        lines.append(f"#   {part['part']}: {', '.join(each)}")
    lines.append("")
    for key in ("name", "format", "layout", "label", "description", "file_type", "max_16bit_share"):
        if value := getattr(found, key):
            lines.append(f"{key} = {json.dumps(value)}")
    for rule in found.rule:
        lines += ["", "[[rule]]", *([f"max_dims = {rule.max_dims}"] if rule.max_dims else [])]
        lines += [f"match = {json.dumps(rule.match)}", f"scheme = {json.dumps(rule.scheme)}"]
    return "\n".join(lines) + "\n"
