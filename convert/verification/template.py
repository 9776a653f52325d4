"""Whether an artifact has the chat template of the model that was released.

Published quants carry templates of other models and days, and a model that is asked in another's words answers worse
without any sign of it. A template is told by the SHA-256 of its text, as the runtime uses it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dgq.convert.source.checkpoint import Source
from dgq.convert.write.provenance import FILE
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.tokenizer import template_of
from dgq.runtime.files.weights import GGUFWeights
from dgq.runtime.shape.config import ModelConfig

REPOSITORY = "google/diffusiongemma-26B-A4B-it"
RELEASED = "9aeb7eac68ad87bba7567e9d4597ff203e5609f1b427d9e823437d0142cc61bf"  # at f7f5b7f5
KNOWN = {  # that were seen in its place, and whose they are
    "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4": "Gemma 4's, whose prompts end in a thought",
}
SHAPE = {"layers": 30, "hidden": 2816, "experts": 128, "vocab": 262_144}  # of the release, and of what is made of it


def template_remarks(opened: Artifact | Source, source: Artifact | None = None) -> tuple[str, ...]:
    """A line for each thing that is wrong with its chat template. source: what it was made of, if that is known."""
    template, folder = _templates(opened)
    lines = []
    if folder is not None and template is not None and digest(folder) != digest(template):
        lines.append("the .gguf's chat template is not that of chat_template.jinja beside it, which dgq uses")
    used = folder or template
    if source is not None and digest(used) != digest(wanted := _used(source)):
        lines.append(f"its chat template ({_short(used)}) is not {source.path.name}'s ({_short(wanted)})")
    if _is_release(opened) and digest(used) != RELEASED:
        whose = KNOWN.get(digest(used), "an older one, or somebody's own")
        said = f"is {whose} ({_short(used)})" if used is not None else "is missing"
        lines.append(
            f"its chat template {said}; {REPOSITORY}'s is {RELEASED[:12]}: fetch chat_template.jinja from there"
        )
    return tuple(lines)


def digest(template: str | None) -> str:
    """ "" of none."""
    return "" if template is None else hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def _short(template: str | None) -> str:
    return digest(template)[:12] or "none"


def _used(opened: Artifact | Source) -> str | None:
    template, folder = _templates(opened)
    return folder or template


def _templates(opened: Artifact | Source) -> tuple[str | None, str | None]:
    """The .gguf's own, and the directory's."""
    weights = opened.weights if isinstance(opened, Artifact) else opened
    inside = weights.reader.metadata.get("tokenizer.chat_template") if isinstance(weights, GGUFWeights) else None
    own = inside if isinstance(inside, str) else None
    return own, template_of(opened.path) if opened.path.is_dir() else None


def _is_release(opened: Artifact | Source) -> bool:
    """Whether it is the released model, or one of its shape: made from it, as far as anybody can tell."""
    config: ModelConfig = opened.config
    if {key: getattr(config, key) for key in SHAPE} | {"layers": len(config.layers)} == SHAPE:
        return True
    return isinstance(opened, Artifact) and _made_of(opened.path) == REPOSITORY


def _made_of(path: Path) -> object:
    if not (path / FILE).is_file():
        return None
    said = read_json(path / FILE).get("source")
    return said.get("repository") if isinstance(said, dict) else None
