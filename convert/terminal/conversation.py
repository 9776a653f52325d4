"""`dgq run MODEL --chat` without a prompt: a conversation, a line a turn, from a terminal or a pipe.

At a terminal, what is wrong with one line and Ctrl-C end that turn only; end of input ends the conversation. From a
pipe, each line is a turn as well, and the first that cannot be answered ends everything, as with any other command.
A line "/image FILE" is no turn: the next one shows that picture.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgq.convert.source.device import chosen_device
from dgq.convert.terminal import console
from dgq.convert.verification.generate import check_vram, drawing, open_model, precision
from dgq.quant.errors import InputError

if TYPE_CHECKING:
    from dgq.runtime.engine.engine import Rng


IMAGE = "/image "


def converse(
    asked: str,
    *,
    images: Sequence[Path] = (),
    revision: str | None,
    thinking: bool | None,
    max_new_tokens: int | None,
    steps: int | None,
    seed: int,
    device: str,
    dtype: str,
    activations: str | None,
    rng: Rng,
    vram: int | None,
    as_json: bool,
    adapters: Sequence[Path] = (),
) -> None:
    """Answer line after line of standard input, on standard output; as JSON, one object a turn. images: the first
    line's, before the model is loaded."""
    from dgq.runtime.engine.chat import Chat
    from dgq.runtime.files.images import Once, open_image

    device = chosen_device(device)
    check_vram(vram, device, dtype, activations, rng)
    artifact = open_model(asked, revision, adapters)
    artifact.tokenizer.thinking(thinking).render([{"role": "user", "content": ""}])  # refuses now, not after loading
    place, kind = device if vram is None else "cpu", precision(dtype, device)
    tower = Once(lambda patches: artifact.vision.tower(place, kind)(patches))  # which is gone again after each

    def look(image: Path) -> Any:
        tower(artifact.vision.patches(image))
        return open_image(image)[1]

    def see(ids: Sequence[int], those: Sequence[Any]) -> Sequence[int]:
        return artifact.vision.prompt(ids, those, tower)

    shown = [look(image) for image in images]  # now, while there is room
    began = time.perf_counter()
    model = artifact.load(device, kind, activations, vram)
    loaded = round(time.perf_counter() - began, 3)
    tokenizer = artifact.tokenizer.thinking(thinking)
    chat = Chat(model, tokenizer, artifact.generation, seed=seed, rng=rng, see=see)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    draw = sys.stdout.isatty() and not as_json
    for text in _typed() if terminal else _piped():
        began = time.perf_counter()
        try:
            if text.startswith(IMAGE):
                shown.append(look(Path(text.removeprefix(IMAGE).strip()).expanduser()))
                continue
            with drawing(artifact.tokenizer, artifact, draw) as on_step:
                reply = chat.ask(text, on_step, shown, max_new_tokens=max_new_tokens, steps=steps)
        except (InputError, KeyboardInterrupt) as error:
            if not terminal:
                raise
            console.note(str(error) or "stopped; it is as though you had not said that")
            continue
        shown = []
        found: dict[str, Any] = vars(reply) | {"seed": seed, "device": device, "load_s": loaded}
        found["generate_s"] = round(time.perf_counter() - began, 3)
        console.print_json(found) if as_json else console.answer(found)
        sys.stdout.flush()


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  # lines that can be edited, and fetched back

    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text:
            yield text


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().strip()
        except UnicodeError:
            raise InputError(f"line {number} of standard input is not valid UTF-8") from None
        if text:
            yield text
