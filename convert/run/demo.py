"""`dgq demo`: the whole way on the embedded model, in a minute and without a download.

tiny (BF16) ---------------------------------> answer
     |--> convert to nvfp4, bnb4, gguf ------> the same prompt, the same seed: an answer of each
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgq.convert.run.answer import answer
from dgq.convert.run.request import RunRequest, open_run
from dgq.convert.source.hub import TINY
from dgq.convert.write.conversion import ConvertOptions, Progress, convert
from dgq.quant.errors import InputError

PROMPT = "Sort: wind apple king door"
FORMATS = ("nvfp4", "bnb4", "gguf")


@dataclass(frozen=True)
class Demonstration:
    """One model of the demonstration.

    format: "bf16" for the original. path: what `dgq run` opens. bytes: of its tensors; bits: a weight. convert_s:
    seconds that the conversion took, None for the original; generate_s: seconds for the answer. steps: denoising steps
    of it. text: the answer.
    """

    format: str
    path: str
    bytes: int
    bits: float
    convert_s: float | None
    generate_s: float
    steps: int
    text: str


def demo(
    out: str | Path = "dgq-demo", progress: Progress | None = None, notice: Callable[[str], None] | None = None
) -> list[Demonstration]:
    """Convert `tiny` to each format with effort fast, and let the original and each artifact answer one prompt.

    out: the directory to create, with an artifact in it for each format. progress: as for dgq.convert.convert, of one
    conversion after the other. notice is called with each line that a user should read. Returns a Demonstration for
    the original and for each artifact, in the order of FORMATS. InputError if `out` exists, or cannot be written.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise InputError(f"{out}: already exists; name another directory with -o, or remove it")
    models = [_answered("bf16", TINY, None)]
    for to in FORMATS:
        began = time.perf_counter()
        artifact = convert(TINY, to, out / to, ConvertOptions(effort="fast"), progress, notice)
        models.append(_answered(to, str(artifact.path), round(time.perf_counter() - began, 3)))
    return models


def _answered(to: str, model: str, convert_s: float | None) -> Demonstration:
    run = open_run(RunRequest(model, chat=True))
    weights = run.artifact.weights.everything().values()
    nbytes, params = sum(one.nbytes for one in weights), sum(one.numel for one in weights)
    reply = answer(run, PROMPT)
    bits = round(8 * nbytes / params, 4)
    return Demonstration(to, model, nbytes, bits, convert_s, reply["generate_s"], sum(reply["steps"]), reply["text"])
