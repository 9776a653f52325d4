"""The model card: everything it says as one JSON object, and that object as Markdown.

    dgq.json, the artifact's headers, validation.json  ->  card_data()  ->  manifest.json's "card"
                                                               |
                                     recipes/report/card.md.jinja  ->  README.md

Numbers are rounded here and nowhere else: the text holds what the object holds. The same artifact and report give the
same text; there is no date, no local path and nothing from the network in it. The metadata at its head is written by
huggingface_hub. What strangers named is shown as text: Markdown in it means nothing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgq.convert.calibration.stats import FLOOR
from dgq.convert.estimate.needs import Runtime
from dgq.convert.plans.formats import format_of, written_format
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.publication.judgement import Judgement
from dgq.convert.validation.report.evaluation import Score
from dgq.convert.validation.report.render import triple
from dgq.convert.validation.report.result import Interval, as_json
from dgq.quant.errors import printable
from dgq.quant.schemes.registry import SCHEMES, stored_bits
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.shape.names import expected_tensors, part_of

Json = dict[str, Any]
CONTEXTS = (4096, 32768, 131072, 262144)
PLAIN_BITS, CONFIDENCE = 16, 95
PLOTS = ("kl-by-level", "top-by-level", "steps", "tasks")


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. document: dgq.json; judgement: None without a report; repo: USER/NAME; licence: by the
    Hub's name; licence_file: its text's file in the repository."""

    artifact: Artifact
    document: Json
    judgement: Judgement | None
    repo: str
    licence: str | None
    licence_file: str | None


def card_data(facts: CardFacts, problems: Sequence[str]) -> Json:
    """What the card says, as JSON. problems: the checks that failed and were overruled."""
    artifact, document, repo = facts.artifact, facts.document, facts.repo
    stored = artifact.weights.everything()
    size = sum(weight.nbytes for weight in stored.values())
    rules = document.get("recipe_rules") or {}
    source, calibration = document["source"], document["calibration"]
    return {
        "repo": repo, "dgq": document["dgq"], "problems": list(problems), "license": facts.licence,
        "license_file": facts.licence_file,
        "base": {key: source[key] for key in ("name", "repository", "revision")},
        "format": document["format"], "effort": document["effort"], "made_on": document.get("made_on"),
        "recipe": {"name": document["recipe"], "description": rules.get("description", document["format"])},
        "params": document["params"], "plain_bits": PLAIN_BITS, "confidence": CONFIDENCE,
        "quantized_percent": round(100 * document["quantized_params"] / document["params"], 2),
        "gigabytes": round(size / 1e9, 3), "bits": round(8 * size / document["params"], 2),
        "adapters": [{"name": one["name"], "files": _listed(one["files"])} for one in document.get("adapters") or []],
        "parts": _parts(artifact), "notices": document["notices"],
        "calibration": None if calibration is None else _calibration(calibration),
        "imatrix": document["imatrix"], "input_scales": _input_scales(document["input_scales"]),
        "validation": None if facts.judgement is None else _validation(facts.judgement),
        "vram": _vram(artifact), "openers": _openers(artifact, document, repo),
        "limits": [written_format(document).limit, *_limits(document)],
        "provable": calibration is None, "proof": _proof(repo, document),
        "files": _listed(document["files"]), "source_files": _listed(source["files"]),
        "libraries": ", ".join(f"{name} {version}" for name, version in (document.get("libraries") or {}).items()),
        "siblings": [],
    }  # fmt: skip


def card(data: Json) -> str:
    """README.md of card_data()."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    base, form = data["base"]["repository"], format_of(data["format"])
    assert form is not None
    metadata = ModelCardData(
        base_model=base, license=data["license"], library_name=form.hub_library,
        pipeline_tag="text-generation", base_model_relation="quantized" if base else None,
        tags=["dgq", "diffusion-gemma", "text-diffusion", "4-bit", "quantized", *form.hub_tags],
        **({"license_link": data["license_file"]} if data["license_file"] else {}),
    )  # fmt: skip
    environment = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": escaped, "code": code, "thousands": lambda number: f"{number:,}"}
    environment.globals["base"] = _base
    template = files("dgq.recipes").joinpath("report", "card.md.jinja").read_text("utf-8")
    text = environment.from_string(template).render(card=data)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"


def escaped(text: str) -> str:
    """Somebody's words as Markdown that shows just these."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", printable(text))


def code(text: str) -> str:
    """The same between backticks, in a table's cell too."""
    shown = printable(str(text)).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else "–"


def _base(base: Json) -> str:
    name = base["repository"]
    return f"[{escaped(name)}](https://huggingface.co/{name})" if name else escaped(base["name"])


def _parts(artifact: Artifact) -> list[Json]:
    """Part and scheme -> parameters and megabytes, most first."""
    totals: dict[tuple[str, str], list[int]] = {}
    for name, stored in artifact.weights.everything().items():
        sums = totals.setdefault((part_of(name), stored.scheme), [0, 0])
        sums[0] += stored.numel
        sums[1] += stored.nbytes
    rows = sorted(totals.items(), key=lambda item: (-item[1][1], item[0]))
    return [{"part": part, "scheme": scheme, "params": params, "megabytes": round(size / 1e6, 2)}
            for (part, scheme), (params, size) in rows]  # fmt: skip


def _vram(artifact: Artifact) -> list[Json]:
    """What `dgq plan` says of the same, by context."""
    stored, shapes = artifact.weights.everything(), expected_tensors(artifact.config)
    held = Runtime(artifact.config, [PlannedTensor(name, name, shape, SCHEMES[stored[name].scheme])
                                     for name, shape in shapes.items() if name in stored])  # fmt: skip
    rows = []
    for context in sorted({min(context, artifact.config.context) for context in CONTEXTS}):
        needed = held.vram(context)
        card = needed["fits"][0] if needed["fits"] else None
        rows.append({"context": context, "gib": round(needed["total"] / 2**30, 2), "card": card})
    return rows


def _calibration(entry: Json) -> Json:
    data = entry["data"]
    return {
        "data": data["name"], "documents": data["documents"], "data_sha256": data["sha256"], "tokens": entry["tokens"],
        "rounds": entry["rounds"], "sha256": entry["sha256"], "coverage": entry.get("coverage") or {},
        "starved": entry["starved"], "floor": FLOOR,
    }  # fmt: skip


def _input_scales(entry: Json | None) -> str | None:
    if entry is None:
        return None
    if entry["method"] != "calibrated":
        return f"{entry['value']:.6g} everywhere, by hand"
    amax = ", ".join(f"{side} activations up to {max(values.values()):.4g}" for side, values in entry["amax"].items())
    return (
        f"calibrated on {entry['texts']} texts and {entry['chats']} chats that ship with dgq ({amax})"
        if "texts" in entry
        else amax
    )


def _validation(judgement: Judgement) -> Json:
    whole, one, base = judgement.result, judgement.artifact, judgement.result.reference.free
    assert base is not None
    mean, free = one.fixed.mean, one.free
    rows = [_row("KL(BF16 ‖ this), nats a position", mean.kl)]
    rows += [_row(f"the same at noise {level}", row.both.kl) for level, row in one.fixed.by_level.items()]
    rows += [
        _row("best token as BF16's", mean.top1, scale=100, unit=" %"),
        _row("among BF16's five best", mean.top5, scale=100, unit=" %"),
        _row("exact answers", free.score, base.score, 100, " %"),
        _row("denoising steps a canvas", free.steps, base.steps),
        _row("the same over BF16's", free.steps_ratio),
        _row("canvases that stop early", free.early, base.early, 100, " %"),
    ]
    return {
        "dgq": whole.dgq, "device": whole.device, "quick": whole.quick, "seed": whole.seed, "activations":
        one.activations, "questions": whole.questions.questions, "confidence": CONFIDENCE, "ok": one.ok, "rows": rows,
        "plots": judgement.document["plots"], "gate": [as_json(check) for check in one.gate],
        "evaluation": _evaluation(judgement),
    }  # fmt: skip


def _evaluation(judgement: Judgement) -> Json | None:
    """The harness's scores of this artifact, and of BF16 where it was evaluated as well."""
    evaluation = judgement.result.evaluation
    mine = (
        next((one for one in evaluation.models if one.files == judgement.artifact.files), None) if evaluation else None
    )
    if evaluation is None or mine is None:
        return None
    base = {
        (row.task.task, row.score.metric, row.score.filter): _score(row.score)
        for row in evaluation.rows() if row.model.reference
    }  # fmt: skip
    rows = [
        {
            "task": task.task, "metric": score.metric, "score": _score(score), "prompts": score.samples,
            "reference": base.get((task.task, score.metric, score.filter), ""),
            "unsettled": f"{task.unsettled} of {task.blocks}", "steps": round(task.steps, 2),
        }
        for task in mine.tasks for score in task.scores
    ]  # fmt: skip
    return {"harness": evaluation.harness, "seed": evaluation.seed, "limit": evaluation.limit, "rows": rows}


def _score(score: Score) -> str:
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ±{score.stderr:.2g}")


def _row(
    label: str, values: Interval | None, reference: Interval | None = None, scale: float = 1.0, unit: str = ""
) -> Json:
    figure, bounds = triple(values, scale, unit)
    return {
        "label": label,
        "figure": figure,
        "bounds": bounds,
        "reference": triple(reference, scale, unit)[0] if reference else "",
    }


def _openers(artifact: Artifact, document: Json, repo: str) -> list[Json]:
    """Commands of those programs that open the format, with the caveats that apply."""
    kinds = ["caveats", *(["activations"] if document["input_scales"] else [])]
    filled = {"repo": repo, "file": shlex.quote(artifact.file.name), "canvas": artifact.config.canvas,
              "steps": artifact.generation.sampler.steps}  # fmt: skip
    known = json.loads(files("dgq.recipes").joinpath("report", "openers.json").read_text("utf-8"))
    return [{"name": one["name"], "language": one["language"], "code": "\n".join(one["code"]).format(**filled),
             "caveats": [line for kind in kinds for line in one.get(kind, ())]} for one in known
            if document["format"] in one["formats"]
            and (one["name"] == "dgq" or not artifact.weights.only_dgq)]  # fmt: skip


def _limits(document: Json) -> list[str]:
    lines = []
    fallback = (document.get("recipe_rules") or {}).get("fallback", {})
    if odd := sorted(set(fallback.values()) & set(document["tensors"].values())):
        lines.append(f"Rows that no K-quant fits are {' and '.join(map(str.upper, odd))}.")
    kept = sorted({scheme for scheme in document["tensors"].values() if stored_bits(scheme) >= PLAIN_BITS})
    lines.append(f"What is not named above as quantised is stored as {', '.join(kept).upper()}.")
    return [*lines, "Another random stream than transformers': the same seed gives another text there."]


def _proof(repo: str, document: Json) -> str:
    where = document["source"]["repository"] or "SRC"
    imatrix = f" --imatrix {shlex.quote(document['imatrix']['name'])}" if document["imatrix"] else ""
    merged = document.get("adapters") or []
    adapters = "".join(f" --adapter {shlex.quote(one['name'])}" for one in merged)
    adapters += "".join(f" --adapter-side {side}" for side in sorted({one["side"] for one in merged if "side" in one}))
    return f"dgq verify {repo} --against {where} --seed SEED{imatrix}{adapters}"


def _listed(files: Json) -> list[Json]:
    """A mapping of files as a list by name."""
    return [{"name": name, **entry} for name, entry in sorted(files.items())]


def sibling(data: Json) -> Json:
    """A card's row in the table of a collection."""
    figures = {row["label"]: row["figure"] for row in data["validation"]["rows"]} if data["validation"] else {}
    card = data["vram"][0]["card"]
    return {
        "repo": data["repo"], "recipe": data["recipe"]["name"], "gigabytes": data["gigabytes"],
        "quantized_percent": data["quantized_percent"], "fits": f"{card} GB" if card else "–",
        "kl": figures.get("KL(BF16 ‖ this), nats a position", "–"), "top1": figures.get("best token as BF16's", "–"),
        "steps_ratio": figures.get("the same over BF16's", "–"),
    }  # fmt: skip


def licence_text(licence: str | None) -> str | None:
    """The text of a licence that dgq has at hand, by the Hub's name; None of others."""
    known = files("dgq.recipes").joinpath("licenses", f"{Path(licence or 'none').name}.txt")
    return known.read_text("utf-8") if known.is_file() else None
