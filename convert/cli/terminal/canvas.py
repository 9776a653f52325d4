"""The canvas taking shape on a terminal: bold where the sampler has accepted a token, dim where it is still noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dgq.quant.errors import shown

if TYPE_CHECKING:
    from dgq.runtime.engine.engine import Step
    from dgq.runtime.files.artifact import Artifact
    from dgq.runtime.files.tokenizer import Tokenizer


@contextmanager
def drawing(artifact: Artifact, draw: bool) -> Iterator[Callable[[Step], None] | None]:
    """The engine's callback that draws each step, and takes the picture away at the end; None without `draw`."""
    if not draw:
        yield None
        return
    with CanvasView(artifact.tokenizer, artifact.generation.eos_ids) as view:
        yield view.step


class CanvasView:
    """Draws every step of the first row from the first one on; leaves nothing on the screen when it is done."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int], console: Console | None = None) -> None:
        self._tokenizer, self._eos = tokenizer, set(eos)
        self._committed: list[int] = []
        self._block = 0
        self._last: list[int] = []
        self._live = Live(console=console or Console(), transient=True, refresh_per_second=20)

    def __enter__(self) -> CanvasView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self, step: Step) -> None:
        """The engine's callback."""
        if step.block != self._block:
            self._committed += self._last
            self._block = step.block
        self._last = step.canvas[0].tolist()
        self._live.start()  # Only its first call does anything.
        self._live.update(self.picture(step))

    def picture(self, step: Step) -> Text:
        """The committed text, the canvas, and a line of numbers."""
        text = Text(shown(self._tokenizer.decode(self._committed)))
        accepted = step.accepted[0].tolist()
        start = 0
        while start < len(self._last):
            stop = start
            while stop < len(self._last) and accepted[stop] == accepted[start]:
                stop += 1
            piece = self._last[start:stop]
            ended = next((i for i, token in enumerate(piece) if token in self._eos), None)
            words = self._tokenizer.decode(piece if ended is None else piece[:ended])
            text.append(shown(words), style="bold" if accepted[start] else "dim cyan")
            if ended is not None:
                break
            start = stop
        numbers = f"block {step.block + 1}  step {step.step}/{step.steps}  accepted {sum(accepted)}/{len(accepted)}"
        return text.append(f"\n\n{numbers}  entropy {float(step.entropy[0]):.3f} nats", style="dim")
