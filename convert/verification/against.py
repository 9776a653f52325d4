"""Is an artifact what its dgq.json says it was made from? Whole tensors, quantised again from the source, byte by byte.

    dgq.json (recipe, effort, imatrix)  +  SRC  ->  the plan  ->  a sample of weights  ==  the artifact's bytes?

Files that agree with their own hashes prove nothing of where they came from; this does, for the weights drawn. What
STATS made cannot be made again without them. Input scales come from calibration or a number, and are not compared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def verify_against(
    path: Path, source: Source, recipe: str | None, imatrix: Path | None, sample: int, seed: int, threads: int
) -> dict[str, Any]:
    """Requantise `sample` weights, and one more of each part and scheme that is not among them: {"ok", "problems",
    "compared", "left_out"}. The artifact must have passed `verify`. recipe: the one to hold it to, if not dgq's own of
    its name or the rules in dgq.json; imatrix: the file that dgq.json names. InputError if the artifact was made with
    STATS, or dgq.json does not say how."""
    file = path / provenance.FILE
    document = read_json(file)
    settings = ConversionSettings(_effort(file, document), None, threads)
    _check_adapters(file, document, source)
    to, name = document.get("format"), document.get("recipe")
    if not (isinstance(to, str) and isinstance(name, str)):
        raise InputError(f"{file}: names no format and recipe; damaged")
    chosen = _recipe(file, document, to, recipe or name, recipe is not None)
    plan = make_plan(source, chosen)
    if document.get("imatrix") is not None or imatrix is not None:
        matrix = read_imatrix(_imatrix(file, document, imatrix)).fitted({t.name: t.shape for t in plan.tensors})
        settings = ConversionSettings(settings.effort, matrix, threads)
    problems = [*_source_differs(document, source)]
    if document.get("recipe_rules") not in (None, chosen.model_dump(mode="json")):
        problems.append(
            f"{file}: its recipe_rules are not those of {recipe or f'dgq {dgq_version()} by the name {name}'}"
        )
    said = document.get("tensors")
    if said != (made := {tensor.name: tensor.scheme.name for tensor in plan.tensors}):
        said = said if isinstance(said, dict) else {}
        odd = next((n for n in {**made, **said} if made.get(n) != said.get(n)), "their order")
        problems.append(f"{path}: {odd} is {said.get(odd)}; recipe {plan.recipe.name} makes it {made.get(odd)}")
        return _result(problems, [], False)
    drawn = _drawn(plan, sample, seed)
    problems += [f"{path}: {tensor} is not what {source.where.name} gives" for tensor in _differing(
        plan, path, drawn, settings)]  # fmt: skip
    return _result(problems, [tensor.name for tensor in drawn], plan.recipe.activations is not None)


def source_revision(path: Path, asked: str) -> str | None:
    """The commit of `asked` that dgq.json names, if it is the repository that it names."""
    source = read_json(path / provenance.FILE).get("source")
    named = isinstance(source, dict) and source.get("repository") == asked
    return str(source["revision"]) if named and isinstance(source, dict) and source.get("revision") else None


def _result(problems: list[str], compared: list[str], left_out: bool) -> dict[str, Any]:
    told = [printable(problem) for problem in problems]
    return {"ok": not told, "problems": told, "compared": compared, "left_out": ["input_scale"] if left_out else []}


def _effort(file: Path, document: dict[str, Any]) -> str:
    effort = document.get("effort")
    if document.get("calibration") is not None or effort in ("standard", "max"):
        raise InputError(f"{file}: made with STATS (effort {effort}): --against cannot prove it without them")
    if effort not in ("stock", "fast"):
        raise InputError(f"{file}: its effort is none that dgq has; damaged")
    return str(effort)


def _recipe(file: Path, document: dict[str, Any], to: str, name: str, given: bool) -> Recipe:
    """The recipe given; dgq's own of that name; or, of somebody's own recipe, the rules that dgq.json holds."""
    if given or name in own_recipes():
        return find_recipe(to, name)
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
    said = document.get("imatrix")
    if not isinstance(said, dict):
        raise InputError(f"--imatrix {imatrix}: {file} says that none was used")
    if imatrix is None:
        raise InputError(f"{file}: made with the imatrix {printable(str(said.get('name')))}; give it with --imatrix")
    if not imatrix.is_file() or describe(imatrix)["sha256"] != said.get("sha256"):
        raise InputError(f"--imatrix {imatrix}: is not the file whose SHA-256 {file} names")
    return imatrix


def _check_adapters(file: Path, document: dict[str, Any], source: Source) -> None:
    """InputError unless the source has just those adapters that dgq.json names, in their order."""
    said, given = document.get("adapters") or [], [adapter.about for adapter in source.adapters]
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise InputError(f"{file}: its adapters are no list of objects; damaged")
    if [one.get("files") for one in said] != [one["files"] for one in given]:
        names = " ".join(f"--adapter {one.get('name')}" for one in said) or "no --adapter"
        raise InputError(f"{file}: made with {names}; the files given are not those that it names")


def _source_differs(document: dict[str, Any], source: Source) -> Iterator[str]:
    """The source's files against their SHA-256s in dgq.json."""
    about = document.get("source")
    said = about.get("files") if isinstance(about, dict) else None
    found = {file.name: describe(file) for file in source.files}
    if said != found:
        known = said if isinstance(said, dict) else {}
        odd = next((name for name in {**found, **known} if found.get(name) != known.get(name)), "their order")
        yield f"{source.path / odd}: is not the file that dgq.json says the artifact was made from"


def _drawn(plan: Plan, sample: int, seed: int) -> list[PlannedTensor]:
    """In the plan's order: the sample, and one of each part and scheme that it lacks: a quant of experts alone changes
    no other weight when it is quantised again."""
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
    """Names of stored tensors that are not the requantised bytes; one for each weight."""
    stored = plan.format.reader(path)
    scales = InputScales({t.name: 1.0 for t in drawn}, {}) if plan.recipe.activations else None
    # one OpenMP thread each: double quantisation's own sums depend on their number
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
