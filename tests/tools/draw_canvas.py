"""Draws README's picture: `dgq run` shaping one canvas of `tiny`, every step as the terminal shows it.

    python tests/tools/draw_canvas.py recipes/guides/canvas.svg

The steps are the engine's and the drawing is the command's own CanvasView: bold where the sampler accepted a token, dim
where it is still noise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import dgq.recipes
import dgq.runtime
from dgq.convert.cli.terminal.canvas import CanvasView
from dgq.runtime.engine.engine import Step

PROMPT = "Copy: stone river gold house lamb morning eyes city fire"
SEED = 3  # whose canvas mends a word twice


def drawn(prompt: str, seed: int) -> list[Text]:
    """The view of every denoising step of the first canvas."""
    engine = dgq.runtime.load(Path(dgq.recipes.__file__).parent / "tiny", device="cpu")
    view = CanvasView(engine.tokenizer, engine.generation.eos_ids, Console(record=True, quiet=True))
    views = []
    for event in engine.stream([{"role": "user", "content": prompt}], max_new_tokens=64, seed=seed):
        if isinstance(event, Step):
            view.step(event)
            views.append(view.picture(event))
    return views


def main(out: Path) -> None:
    """Write the picture to `out`, an SVG file."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=94, file=nowhere, force_terminal=True)
        console.print(f'$ dgq run tiny --seed {SEED} --chat "{PROMPT}"', style="green", highlight=False)
        for view in drawn(PROMPT, SEED):
            console.print()
            console.print(view)
        out.write_text(console.export_svg(title="dgq run: one canvas, every step", unique_id="canvas"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
