"""One prompt, one answer.

prompt, images --> vision tower (gone again) --> model loaded --> canvases denoised --> text
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgq.convert.run.request import OpenedRun
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.images import placed
from dgq.runtime.files.reply import Reply

if TYPE_CHECKING:
    from dgq.runtime.engine.engine import Step


def answer(
    run: OpenedRun, prompt: str, images: Sequence[Path] = (), on_step: Callable[[Step], None] | None = None
) -> dict[str, Any]:
    """Answer one prompt; what `dgq run --json` prints.

    images: picture files, which stand before the prompt or where it says <|image|>; what they become is computed
    before the model is loaded, so that the vision tower does not lie beside it in memory. on_step is called with every
    denoising step. Returns the reply's parts (files.reply.Reply), token ids, the steps of each canvas and whether it
    stopped early, whether the model ended its answer itself, and times in seconds. InputError for a prompt or images
    that the model cannot take.
    """
    request, artifact = run.request, run.artifact
    tokenizer = artifact.tokenizer.thinking(request.thinking)
    began = time.perf_counter()
    message = [{"role": "user", "content": prompt}] if request.chat else prompt
    ids = _ids(run, *placed(tokenizer, message, images))
    ready = time.perf_counter()
    model = run.load()
    loaded = time.perf_counter()
    asked = Request([ids], artifact.generation, request.max_new_tokens, request.seed, request.steps, request.rng)
    result = generate(model, asked, on_step)
    ended = time.perf_counter()
    tokens = result.tokens[0]
    reply = tokenizer.reply(tokens, ids) if request.chat else Reply(tokenizer.decode(tokens))
    return {
        **reply.json(),
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "images": len(images),
        "steps": result.steps[0],
        "stopped_early": result.stopped_early[0],
        "ended": result.ended[0],
        "seed": request.seed,
        "device": run.device,
        "images_s": round(ready - began, 3),
        "load_s": round(loaded - ready, 3),
        "generate_s": round(ended - loaded, 3),
    }


def _ids(run: OpenedRun, ids: list[int], images: list[Any], front: int | None) -> Sequence[int]:
    """The prompt's tokens, with those of its images if it has any; arguments as images.placed() returns them."""
    if not images:
        return ids
    vision = run.vision
    return vision.prompt(ids, images, vision.tower(run.device, run.dtype), front)
