"""What is kept of the reference model, so that its 52 GB need not be where an artifact is judged.

    questions    ids, canvases, answers, the seed of the noise
    states.N     what the reference's head was given at batch N (see convert/validation/fixed.py)
    table        the head's table, to make logits of them
    free.*       what the reference wrote, and in how many steps
    config, sampler, cost    of the reference

One safetensors file; its header's metadata is a JSON text under "dgq".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgq.convert.layerwise.measure import Head
from dgq.convert.validation.questions import Question, batches
from dgq.quant.errors import InputError
from dgq.quant.schemes.dense import BF16, F16, F32
from dgq.quant.types import Packed
from dgq.runtime.model.layers import head

KIND = "dgq validation reference 1"
_PLAIN = {scheme.dtype: scheme for scheme in (BF16, F16, F32)}


@dataclass(frozen=True)
class KeptReference:
    """What judging needs of the reference.

    about: what it was made of and how, as JSON; table (vocab, hidden): of its head; free: canvases int64 (questions
    run, tokens), steps int64 (questions run, blocks), seconds (batches,); states: number of a batch -> (levels, 2,
    rows, canvas, hidden) in the model's dtype.
    """

    about: dict[str, Any]
    questions: list[Question]
    table: Packed
    free: dict[str, Tensor]
    states: Callable[[int], Tensor]

    @property
    def batches(self) -> list[range]:
        config = self.about["config"]
        return batches(len(self.questions), config["canvas"], config["vocab"])

    def head(self, device: torch.device) -> Head:
        """The function from the reference's states to its logits."""
        table, softcap = self.table.to(device), float(self.about["config"]["softcap"])
        return lambda hidden: head(hidden, table, softcap)

    def save(self, file: Path) -> None:
        """Write it as one file, whole or not at all."""
        tensors = {"table": self.table.parts[""].contiguous()}
        tensors |= {f"free.{name}": tensor.contiguous() for name, tensor in self.free.items()}
        for number in range(len(self.batches)):
            tensors[f"states.{number}"] = self.states(number).contiguous()
        about = {"kind": KIND, **self.about, "questions": [question.to_json() for question in self.questions]}
        partial = file.with_name(f".{file.name[:200]}.partial")
        try:
            save_file(tensors, partial, {"dgq": json.dumps(about)})
            partial.chmod(0o644)  # safetensors keeps it to its owner
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def read_reference(file: Path) -> KeptReference:
    """Open what save() wrote; the states stay in the file until they are asked for. InputError if it is no such file,
    or damaged."""
    try:
        opened: Any = safe_open(file, "pt")
        about = json.loads((opened.metadata() or {})["dgq"])
        if about.pop("kind") != KIND:
            raise ValueError("of another version of dgq")
        questions = [Question.from_json(raw) for raw in about.pop("questions")]
        names = set(opened.keys())
        free = {name.removeprefix("free."): opened.get_tensor(name) for name in names if name.startswith("free.")}
        table = opened.get_tensor("table")
        packed = Packed(_PLAIN[table.dtype], tuple(table.shape), {"": table})
        kept = KeptReference(about, questions, packed, free, lambda number: opened.get_tensor(f"states.{number}"))
        _check(kept, names, opened)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: no reference of dgq validate, or damaged ({error}); delete it, and it is made anew"
                         ) from None  # fmt: skip
    return kept


def _check(kept: KeptReference, names: set[str], opened: Any) -> None:
    """ValueError or KeyError for what does not fit together."""
    config, sampler = kept.about["config"], kept.about["generation"]["sampler"]
    if tuple(kept.table.shape) != (config["vocab"], config["hidden"]):
        raise ValueError("its table is not (vocabulary, hidden)")
    for key in ("seed", "quick", "weights", "prompts", "cost", "dtype", "blocks", "rows"):
        kept.about[key]
    float(sampler["entropy_bound"])
    ids = [token for question in kept.questions for token in (*question.prompt, *(question.canvas or ()))]
    if not ids or min(ids) < 0 or max(ids) >= config["vocab"]:
        raise ValueError("its questions do not fit its vocabulary")
    for number, rows in enumerate(kept.batches):
        if f"states.{number}" not in names:
            raise ValueError(f"states.{number} is missing")
        shape = opened.get_slice(f"states.{number}").get_shape()
        if shape[1:] != [2, len(rows), config["canvas"], config["hidden"]]:
            raise ValueError(f"states.{number} has shape {shape}")
    if len(kept.free["canvases"]) != len(kept.about["rows"]) or len(kept.free["steps"]) != len(kept.about["rows"]):
        raise ValueError("its free run does not fit its questions")


def combined(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of a free run as one: canvases, steps, and seconds (batches,)."""
    joined = {name: torch.cat([result[name] for result in results]) for name in ("canvases", "steps")}
    return joined | {"seconds": torch.stack([result["seconds"] for result in results])}
