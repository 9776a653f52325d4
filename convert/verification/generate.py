"""`dgq run`: open anything dgq can run, answer one prompt, draw the canvas meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hub import TINY, Located, fetch_artifact, is_hub_id, locate
from dgq.convert.terminal.console import note
from dgq.convert.write import provenance
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.quantization import quantization

if TYPE_CHECKING:
    import torch

    from dgq.runtime.engine.engine import Rng


def open_model(asked: str, revision: str | None = None, adapters: Sequence[Path] = ()) -> Artifact:
    """An artifact (directory or .gguf), its remarks on stderr, or a BF16 source, checked as `convert` checks it."""
    if is_artifact(asked):
        if adapters:
            raise InputError(f"--adapter: {asked} is quantised already; convert its source with the adapter")
        return _artifact(asked)
    if is_hub_id(asked):  # what is wrong with it is said before all of it is fetched
        if (small := published(asked, revision)) is not None:
            if adapters:
                raise InputError(f"--adapter: {asked} is quantised already; convert its source with the adapter")
            return _artifact(str(fetch_artifact(asked, small.revision).path))
        revision = open_source(asked, revision, weights=False, adapters=adapters).where.revision
    source = open_source(asked, revision, adapters=adapters)
    source.check_copies()
    for adapter in source.adapters:
        note(adapter.notice)
    return Artifact("safetensors", source.path, source.path, source.config, source.generation, source)


def published(repo: str, revision: str | None) -> Located | None:
    """The small files of an artifact that dgq published; None of any other repository."""
    small = locate(repo, revision, weights=False)
    return small if (small.path / provenance.FILE).is_file() else None


def _artifact(path: str) -> Artifact:
    artifact = open_artifact(path)
    for line in artifact.weights.remarks:
        note(line)
    return artifact


def is_artifact(asked: str) -> bool:
    """A file, a directory with a .gguf and no safetensors, or one that says it is quantised. All else is a source;
    `tiny` is the embedded one."""
    if asked == TINY:
        return False
    path = Path(asked)
    if path.is_file():
        return True
    if not any(path.glob("*.safetensors")):
        return any(path.glob("*.gguf"))
    config = path / "config.json"
    return config.is_file() and quantization(path, read_json(config)) is not None


def generate_text(
    asked: str,
    prompt: str,
    *,
    images: Sequence[Path] = (),
    revision: str | None,
    chat: bool,
    max_new_tokens: int | None,
    steps: int | None,
    seed: int,
    device: str,
    dtype: str,
    activations: str | None,
    rng: Rng,
    draw: bool,
    vram: int | None = None,
    thinking: bool | None = None,
    adapters: Sequence[Path] = (),
) -> dict[str, Any]:
    """Answer one prompt: text, token ids, steps of each canvas, whether it stopped early, and times in seconds.

    images: what they become is computed first, so that the vision tower is gone before the model is loaded.
    """
    from dgq.runtime.engine.engine import Request, generate
    from dgq.runtime.files.images import placed

    device = chosen_device(device)
    check_vram(vram, device, dtype, activations, rng)
    artifact = open_model(asked, revision, adapters)
    tokenizer = artifact.tokenizer.thinking(thinking)
    kind = precision(dtype, device)
    began = time.perf_counter()
    said = [{"role": "user", "content": prompt}] if chat else prompt
    ids = _seen(artifact, *placed(tokenizer, said, images), device, kind)
    seen = time.perf_counter()
    model = artifact.load(device, kind, activations, vram)
    loaded = time.perf_counter()
    with drawing(tokenizer, artifact, draw) as on_step:
        request = Request([ids], artifact.generation, max_new_tokens, seed, steps, rng)
        result = generate(model, request, on_step)
    ended = time.perf_counter()
    text, thought = tokenizer.reply(result.tokens[0]) if chat else (tokenizer.decode(result.tokens[0]), "")
    return {
        "text": text,
        "thought": thought,
        "tokens": result.tokens[0],
        "prompt_tokens": len(ids),
        "images": len(images),
        "steps": result.steps[0],
        "stopped_early": result.stopped_early[0],
        "ended": result.ended[0],
        "seed": seed,
        "device": device,
        "images_s": round(seen - began, 3),
        "load_s": round(loaded - seen, 3),
        "generate_s": round(ended - loaded, 3),
    }


def check_vram(vram: int | None, device: str, dtype: str, activations: str | None, rng: Rng) -> None:
    """InputError if it is bounded where the runtime cannot bound it."""
    if vram is not None and (device != "cuda" or dtype == "fp32" or activations or rng != "counter"):
        raise InputError("--vram: is for bfloat16 on a GPU, with --rng counter and without --activations")


def precision(dtype: str, device: str) -> torch.dtype:
    """What --dtype says."""
    import torch

    from dgq.runtime.model.model import default_dtype

    return {"auto": default_dtype(device), "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def _seen(
    artifact: Artifact, ids: list[int], images: list[Any], front: int | None, device: str, dtype: torch.dtype
) -> Sequence[int]:
    """The prompt with its images, if it has any: see images.placed()."""
    if not images:
        return ids
    return artifact.vision.prompt(ids, images, artifact.vision.tower(device, dtype), front)


@contextmanager
def drawing(tokenizer: Any, artifact: Artifact, draw: bool) -> Iterator[Any]:
    """Who draws each step; None if nobody is to."""
    if not draw:
        yield None
        return
    from dgq.convert.terminal.canvas import CanvasView

    with CanvasView(tokenizer, artifact.generation.eos_ids) as view:
        yield view.step
