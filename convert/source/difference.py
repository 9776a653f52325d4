"""What a fine-tune changed of its base: every weight of both compared, some rows at a time.

    two checkpoints  ──>  of each weight: equal bytes, or |w - w0| / |w0|, and how many experts differ
                     ──>  a table by part and one by layer
    the trainer's notes in the fine-tune's folder, and what changed beside the experts  ──>  warnings

The warnings are for merges that leave experts out without an error, as unsloth-zoo 779 tells: a LoRA on fused experts
whose merge fell back to the base in 57 of 60 weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.shape.names import layer_of, part_of

PIECE = 1 << 24  # elements compared at once
EXPERTS = "routed experts"
BESIDE = ("attention", "dense MLP", "router")  # parts whose change in every layer makes unchanged experts odd
# Files in which trainers note what they trained, and the keys that hold it.
NOTES = ("adapter_config.json", "args.json", "training_config.json", "train_config.json", "unsloth_config.json")
KEYS = ("target_modules", "target_parameters", "lora_target_modules", "lora_target", "lora_target_parameters")
_CLAIM = re.compile(r"experts|gate_up_proj", re.IGNORECASE)
Show = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Change:
    """A weight that differs. relative: |w - w0| / |w0| over all its values; experts: how many of them differ, of a
    fused expert weight; delta2, base2: the two sums of squares."""

    part: str
    layer: int | None
    relative: float
    delta2: float
    base2: float
    experts: int | None = None


@dataclass(frozen=True)
class Difference:
    """base: what it was compared with. counts: part -> weights of both that have one shape; changes: of those that
    differ, by canonical name; only_here, only_there, reshaped: names of weights that could not be compared; claims: a
    note of the fine-tune's folder that names experts, if one does; warnings: lines."""

    base: str
    counts: dict[str, int]
    changes: dict[str, Change]
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    claims: str | None = None
    warnings: tuple[str, ...] = field(default=())

    def by_part(self) -> dict[str, dict[str, Any]]:
        """Part -> weights, those that changed, layers of these, and their relative change together."""
        rows = {}
        for part, weights in self.counts.items():
            changed = [one for one in self.changes.values() if one.part == part]
            base2 = math.fsum(one.base2 for one in changed)
            rows[part] = {
                "weights": weights,
                "changed": len(changed),
                "layers": sorted({one.layer for one in changed if one.layer is not None}),
                "relative": math.sqrt(math.fsum(one.delta2 for one in changed) / base2) if base2 else 0.0,
            }
        return rows

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        changes = {
            name: {"part": one.part, "layer": one.layer, "relative": one.relative, "experts": one.experts}
            for name, one in self.changes.items()
        }
        kept = ("base", "only_here", "only_there", "reshaped", "claims", "warnings")
        return {key: getattr(self, key) for key in kept} | {"by_part": self.by_part(), "changed": changes}


def difference(source: Source, base: Source, show: Show | None = None) -> Difference:
    """Compare a checkpoint with its base. show is called with the bytes of the checkpoint that are done, those in all,
    and a weight's name. InputError if one of the two cannot be read."""
    ours, theirs = source.text | source.vision, base.text | base.vision
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    counts: dict[str, int] = {}
    changes: dict[str, Change] = {}
    done, total = 0, sum(ours[name].stop - ours[name].start for name in both)
    for name in both:
        counts[part_of(name)] = counts.get(part_of(name), 0) + 1
        if (change := _change(source, base, name)) is not None:
            changes[name] = change
        done += ours[name].stop - ours[name].start
        if show is not None:
            show(done, total, name)
    claims = _claims(source.path)
    return Difference(
        base.where.asked,
        counts,
        changes,
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
        tuple(name for name in ours if name in theirs and ours[name].shape != theirs[name].shape),
        claims,
        tuple(_warnings([name for name in both if part_of(name) == EXPERTS], source, changes, claims)),
    )


def _change(source: Source, base: Source, name: str) -> Change | None:
    """How a weight differs from the base's; None if it does not."""
    ours, theirs = ((one.text | one.vision)[name] for one in (source, base))
    shape = ours.shape
    at = [[(place.file.resolve(), place.start) for place in spec.places] for spec in (ours, theirs)]
    if at[0] == at[1] and not source.adapters and not base.adapters:
        return None
    if all(ours.dtype == theirs.dtype and torch.equal(*both) for both in _pairs(source, base, name, shape)):
        return None
    delta2 = base2 = 0.0
    different = 0
    for tuned, whole in _pairs(source, base, name, shape):
        whole = whole.float()
        delta = tuned.float() - whole
        base2 += float(whole.square().sum(dtype=torch.float64))
        delta2 += float(delta.square().sum(dtype=torch.float64))
        different += int((delta != 0).view(len(delta), -1).any(1).sum())
    if not different:  # another dtype, the same numbers
        return None
    relative = math.sqrt(delta2 / base2) if base2 else math.inf
    return Change(part_of(name), layer_of(name), relative, delta2, base2, different if len(shape) == 3 else None)


def _pairs(
    source: Source, base: Source, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some rows of the weight in both, of any float dtypes."""
    count = shape[0] if shape else 1
    step = max(1, PIECE * count // max(1, math.prod(shape)))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield source.rows(name, start, stop), base.rows(name, start, stop)


def _warnings(experts: list[str], source: Source, changes: dict[str, Change], claims: str | None) -> Iterator[str]:
    """Experts that are the base's where the folder's notes, or what else changed, let one expect otherwise. experts:
    names of their weights."""
    layers = {part: {one.layer for one in changes.values() if one.part == part} for part in (*BESIDE, EXPERTS)}
    trained = set().union(*layers.values())
    same = [name for name in experts if name not in changes]
    everywhere = [part for part in BESIDE if len(layers[part]) == len(source.config.layers)]
    if layers[EXPERTS] and any(layer_of(name) in trained for name in same):
        reason = f"and {len(experts) - len(same)} are not: did a merge fall back to the base for the others?"
    elif same and not layers[EXPERTS] and claims:
        reason = f"but {claims} names them as trained: was the adapter merged into them?"
    elif same and not layers[EXPERTS] and {"dense MLP", "router"} & set(everywhere):
        reason = f"while {' and '.join(everywhere)} changed in every layer: were they to be trained?"
    else:
        return
    yield (
        f"{len(same)} of {len(experts)} expert weights are the base's to the bit, {reason} Trainers save such a model"
        " without an error (unsloth-zoo 779); look at the adapter's targets, or convert the base with --adapter"
    )


def _claims(folder: Path) -> str | None:
    """The file, and what it says, by which experts were trained; None if none says so. What is not readable says
    nothing."""
    for name in NOTES:
        try:
            notes = read_json(folder / name)
        except InputError:
            continue
        for key in KEYS:
            if (value := notes.get(key)) is not None and _CLAIM.search(text := json.dumps(value)):
                return f"{name} ({key}: {text[:60]}{'…' if len(text) > 60 else ''})"
    return None
