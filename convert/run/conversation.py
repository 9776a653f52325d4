"""A conversation: turn after turn on one loaded model, whose keys and values stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgq.convert.run.request import OpenedRun
from dgq.runtime.engine.chat import Chat
from dgq.runtime.files.images import Once, open_image

if TYPE_CHECKING:
    from dgq.runtime.engine.engine import Step


class Conversation:
    """Turns with one model. Pictures are shown before the turn that is about them."""

    def __init__(self, run: OpenedRun, images: Sequence[Path] = ()) -> None:
        """Load the model. images: the first turn's, which are looked at before that, while there is room for the vision
        tower. InputError for a template that knows no thinking, and for everything that is wrong with the images."""
        request, artifact = run.request, run.artifact
        # This refuses a template that does not fit now, and not after the model was loaded.
        tokenizer = artifact.tokenizer.thinking(request.thinking)
        tokenizer.render([{"role": "user", "content": ""}])
        self._run, self.artifact = run, artifact
        # A bounded GPU holds the model alone. The tower is loaded for a picture that is new, and gone again after it.
        place = run.device if request.vram is None else "cpu"
        self._tower = Once(lambda patches: run.vision.tower(place, run.dtype)(patches))
        self._images: list[Any] = []
        self.adapter: str | None = None
        for image in images:
            self.show(image)
        began = time.perf_counter()
        model = run.load()
        self._chat = Chat(model, tokenizer, artifact.generation, seed=request.seed, rng=request.rng, see=self._prompt)
        self._load_s = round(time.perf_counter() - began, 3)

    def show(self, image: Path) -> None:
        """Show a picture with the next turn. InputError for a file that is none."""
        self._tower(self._run.vision.patches(image))
        self._images.append(open_image(image)[1])

    def ask(self, text: str, on_step: Callable[[Step], None] | None = None) -> dict[str, Any]:
        """The reply to one turn, with its times in seconds; what `dgq run --chat --json` prints for it. A turn that
        ends in an error, or in KeyboardInterrupt, never was; its pictures wait for the next one."""
        request = self._run.request
        began = time.perf_counter()
        reply = self._chat.ask(
            text, on_step, self._images, max_new_tokens=request.max_new_tokens, steps=request.steps,
            adapter=self.adapter,
        )  # fmt: skip
        self._images = []
        return vars(reply) | {
            "tool_calls": [vars(call) for call in reply.tool_calls],
            "seed": request.seed,
            "device": self._run.device,
            "load_s": self._load_s,
            "generate_s": round(time.perf_counter() - began, 3),
        }

    def _prompt(self, ids: Sequence[int], images: Sequence[Any]) -> Sequence[int]:
        return self._run.vision.prompt(ids, images, self._tower)
