"""Whether an artifact has the chat template of the model that was released.

    template = a .gguf's own, or the directory's chat_template.jinja ── SHA-256 ──> the source's? the release's?

Published quants carry the templates of other models and of earlier days, and a model whose prompts are written by the
wrong template answers worse without any sign of it. A template is identified by the SHA-256 of its text, as the runtime
uses it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dgq.convert.source.checkpoint import Source
from dgq.convert.source.release import FILES, REPOSITORY, SHAPE, TEMPLATE
from dgq.convert.write.provenance import FILE
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.files.gguf_weights import GGUFWeights
from dgq.runtime.files.tokenizer import template_of
from dgq.runtime.shape.config import ModelConfig

RELEASED = FILES[TEMPLATE].sha256
# The SHA-256 of templates that were seen in its place -> whose they are.
KNOWN = {
    "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4": "Gemma 4's, whose prompts end in a thought",
}


def template_remarks(opened: Artifact | Source, source: Artifact | None = None) -> tuple[str, ...]:
    """A line for each thing that is wrong with a model's chat template. source: what it was made of, if that is
    known."""
    template, folder = _templates(opened)
    lines = []
    if folder is not None and template is not None and digest(folder) != digest(template):
        lines.append("the .gguf's chat template is not that of chat_template.jinja beside it, which dgq uses")
    used = folder or template
    if source is not None and digest(used) != digest(wanted := _used(source)):
        lines.append(f"its chat template ({_short(used)}) is not {source.path.name}'s ({_short(wanted)})")
    if _is_release(opened) and digest(used) != RELEASED:
        whose = KNOWN.get(digest(used), "an older one, or somebody's own")
        state = f"is {whose} ({_short(used)})" if used is not None else "is missing"
        lines.append(
            f"its chat template {state}; {REPOSITORY}'s is {RELEASED[:12]}: fetch chat_template.jinja from there"
        )
    return tuple(lines)


def digest(template: str | None) -> str:
    """The SHA-256 of a template; "" without one."""
    return "" if template is None else hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def _short(template: str | None) -> str:
    return digest(template)[:12] or "none"


def _used(opened: Artifact | Source) -> str | None:
    template, folder = _templates(opened)
    return folder or template


def _templates(opened: Artifact | Source) -> tuple[str | None, str | None]:
    """The template in a .gguf, and the one in its directory."""
    weights = opened.weights if isinstance(opened, Artifact) else opened
    inside = weights.reader.metadata.get("tokenizer.chat_template") if isinstance(weights, GGUFWeights) else None
    return inside if isinstance(inside, str) else None, template_of(opened.path) if opened.path.is_dir() else None


def _is_release(opened: Artifact | Source) -> bool:
    """Whether it is the released model, or has its shape: then it was made from it, as far as anybody can tell."""
    config: ModelConfig = opened.config
    if {key: getattr(config, key) for key in SHAPE} | {"layers": len(config.layers)} == SHAPE:
        return True
    return isinstance(opened, Artifact) and _made_of(opened.path) == REPOSITORY


def _made_of(path: Path) -> object:
    """The repository that dgq.json names as the source."""
    if not (path / FILE).is_file():
        return None
    source = read_json(path / FILE).get("source")
    return source.get("repository") if isinstance(source, dict) else None
