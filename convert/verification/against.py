"""Whether an artifact is what its dgq.json says it was made from: whole tensors, quantised again and compared by bytes.

    dgq.json (recipe, effort, imatrix)  +  SRC  ->  the plan  ->  a sample of weights  ==  the artifact's bytes?

Files that agree with their own hashes do not prove where they came from; this does, for the weights drawn. What was
made with STATS cannot be made again without them. Input scales come from calibration or a number, and are not compared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipe import Recipe
from dgq.convert.plans.recipes import find_recipe, own_recipes
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import describe, dgq_version
from dgq.convert.write import provenance
from dgq.convert.write.settings import ConversionSettings, InputScales
from dgq.convert.write.slices import ordered, slices
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json
from dgq.quant.files.imatrix import read_imatrix

NOT_COMPARED = ".input_scale"


@dataclass(frozen=True)
class Sample:
    """What is quantised again. count: weights drawn, by `seed`; recipe: to hold the artifact to, None for dgq's own of
    its name or the rules in dgq.json; imatrix: the file that dgq.json names; threads: slices quantised at once."""

    count: int
    seed: int
    recipe: str | None
    imatrix: Path | None
    threads: int


@dataclass(frozen=True)
class WeightCheck:
    """problems: a line for each thing that is wrong; compared: names of the weights that were quantised again;
    left_out: kinds of tensors that were not."""

    problems: tuple[str, ...]
    compared: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def check_weights(path: Path, source: Source, sample: Sample) -> WeightCheck:
    """Quantise the sample again, and one more weight of each part and scheme that is not in it, and compare bytes.

    The artifact's files must have passed check_files(). InputError if it was made with STATS, if dgq.json does not say
    how it was made, or if something that it was made with is not given.
    """
    file = path / provenance.FILE
    document = read_json(file)
    settings = ConversionSettings(_effort(file, document), None, sample.threads)
    _check_adapters(file, document, source)
    chosen = _recipe(file, document, sample.recipe)
    plan = make_plan(source, chosen)
    if document.get("imatrix") is not None or sample.imatrix is not None:
        matrix = read_imatrix(_imatrix(file, document, sample.imatrix))
        settings = ConversionSettings(
            settings.effort, matrix.fitted({t.name: t.shape for t in plan.tensors}), sample.threads
        )
    problems = [*_source_differs(document, source)]
    if document.get("recipe_rules") not in (None, chosen.model_dump(mode="json")):
        whose = sample.recipe or f"dgq {dgq_version()} by the name {document['recipe']}"
        problems.append(f"{file}: its recipe_rules are not those of {whose}")
    planned = {tensor.name: tensor.scheme.name for tensor in plan.tensors}
    if (stored := document.get("tensors")) != planned:
        stored = stored if isinstance(stored, dict) else {}
        odd = _first_difference(planned, stored)
        problems.append(f"{path}: {odd} is {stored.get(odd)}; recipe {plan.recipe.name} makes it {planned.get(odd)}")
        return WeightCheck(tuple(map(printable, problems)))
    drawn = _drawn(plan, sample.count, sample.seed)
    differing = _differing(plan, path, drawn, settings)
    problems += [f"{path}: {tensor} is not what {source.where.name} gives" for tensor in differing]
    left_out = ("input_scale",) if plan.recipe.activations is not None else ()
    return WeightCheck(tuple(map(printable, problems)), tuple(tensor.name for tensor in drawn), left_out)


def _first_difference(here: Mapping[str, object], there: Mapping[str, object]) -> str:
    """The first key whose value differs."""
    return next((key for key in {**here, **there} if here.get(key) != there.get(key)), "their order")


def source_revision(path: Path, asked: str) -> str | None:
    """The commit of `asked` that dgq.json names, if it is the repository that it names."""
    source = read_json(path / provenance.FILE).get("source")
    named = isinstance(source, dict) and source.get("repository") == asked
    return str(source["revision"]) if named and isinstance(source, dict) and source.get("revision") else None


def _effort(file: Path, document: dict[str, Any]) -> str:
    effort = document.get("effort")
    if document.get("calibration") is not None or effort in ("standard", "max"):
        raise InputError(f"{file}: made with STATS (effort {effort}): --against cannot prove it without them")
    if effort not in ("stock", "fast"):
        raise InputError(f"{file}: its effort is none that dgq has; damaged")
    return str(effort)


def _recipe(file: Path, document: dict[str, Any], given: str | None) -> Recipe:
    """The recipe given; dgq's own of the name in dgq.json; or, where somebody else made the recipe, its rules there."""
    to, name = document.get("format"), document.get("recipe")
    if not (isinstance(to, str) and isinstance(name, str)):
        raise InputError(f"{file}: names no format and recipe; damaged")
    if given is not None or name in own_recipes():
        return find_recipe(to, given or name)
    try:
        recipe = Recipe.model_validate(document.get("recipe_rules"))
    except ValidationError:
        raise InputError(
            f"{file}: recipe {name} is none of dgq's, and its rules are not in it; give --recipe"
        ) from None
    if (recipe.name, recipe.format) != (name, to):
        raise InputError(f"{file}: its recipe_rules are of {recipe.name}, not {name}; damaged")
    return recipe


def _imatrix(file: Path, document: dict[str, Any], imatrix: Path | None) -> Path:
    """The file that dgq.json names by its SHA-256. InputError if it was not given, or none was used."""
    entry = document.get("imatrix")
    if not isinstance(entry, dict):
        raise InputError(f"--imatrix {imatrix}: {file} says that none was used")
    if imatrix is None:
        raise InputError(f"{file}: made with the imatrix {printable(str(entry.get('name')))}; give it with --imatrix")
    if not imatrix.is_file() or describe(imatrix)["sha256"] != entry.get("sha256"):
        raise InputError(f"--imatrix {imatrix}: is not the file whose SHA-256 {file} names")
    return imatrix


def _check_adapters(file: Path, document: dict[str, Any], source: Source) -> None:
    """InputError unless the source has exactly the adapters that dgq.json names, in their order."""
    named, given = document.get("adapters") or [], [adapter.about for adapter in source.adapters]
    if not isinstance(named, list) or not all(isinstance(one, dict) for one in named):
        raise InputError(f"{file}: its adapters are no list of objects; damaged")
    if [(one.get("files"), one.get("side")) for one in named] != [(one["files"], one.get("side")) for one in given]:
        names = " ".join(f"--adapter {one.get('name')}" for one in named) or "no --adapter"
        names += "".join(f" --adapter-side {one['side']}" for one in named if one.get("side"))
        raise InputError(f"{file}: made with {names}; the files given are not those that it names")


def _source_differs(document: dict[str, Any], source: Source) -> Iterator[str]:
    """A line if the source's files are not those whose SHA-256s dgq.json holds."""
    about = document.get("source")
    listed = about.get("files") if isinstance(about, dict) else None
    files = {file.name: describe(file) for file in source.files}
    if listed != files:
        odd = _first_difference(files, listed if isinstance(listed, dict) else {})
        yield f"{source.path / odd}: is not the file that dgq.json says the artifact was made from"


def _drawn(plan: Plan, sample: int, seed: int) -> list[PlannedTensor]:
    """The sample, and one weight of each part and scheme that it lacks, in the plan's order: an artifact whose experts
    alone are quantised shows nothing when another weight is quantised again."""
    rng = random.Random(seed)
    mixed = rng.sample(plan.tensors, len(plan.tensors))
    drawn = {tensor.name for tensor in mixed[:sample]}
    kinds = {(tensor.part, tensor.scheme.name) for tensor in mixed[:sample]}
    for tensor in mixed[sample:]:
        if (tensor.part, tensor.scheme.name) not in kinds:
            kinds.add((tensor.part, tensor.scheme.name))
            drawn.add(tensor.name)
    return [tensor for tensor in plan.tensors if tensor.name in drawn]


def _differing(plan: Plan, path: Path, drawn: list[PlannedTensor], settings: ConversionSettings) -> Iterator[str]:
    """Yield the names of stored tensors that are not the requantised bytes, one for each weight."""
    stored = plan.format.reader(path)
    scales = InputScales({t.name: 1.0 for t in drawn}, {}) if plan.recipe.activations else None
    # Each thread has one of OpenMP's: the sums of double quantisation depend on their number.
    with ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for tensor in drawn:
            parts: dict[str, list[torch.Tensor]] = {}
            start = 0
            given = scales if len(tensor.entries) > 1 else None
            for _, piece in ordered(pool, slices(plan, tensor, settings, given), 2 * settings.threads):
                for entry, part in plan.split(tensor, piece, start):
                    parts.setdefault(entry, []).append(part)
                start += piece.shape[0] if piece.shape else 0
            for entry, made in parts.items():
                if entry.endswith(NOT_COMPARED):
                    continue
                if _bytes(stored(entry)) != b"".join(map(_bytes, made)):
                    yield entry
                    break


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
