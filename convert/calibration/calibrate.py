"""`dgq calibrate`: what goes through each weight of the model, by side, noise level and expert.

    documents ── round 0, 1, … ──> chunks ──> both passes ──> sums, maxima, counts ──> STATS
                     └────────── further rounds, until every expert saw FLOOR tokens, or MORE times as many are over

No more than samples.TOKENS are taken, which is what a conversion uses: what is counted here is what quantisers get.

Everything lies in .NAME.calibration while it is made (unfinished.py). The same command goes on from there, and ends in
the same bytes. Under torchrun the chunks are dealt out to the processes, and the sums of a layer are added up over the
processes before they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgq.convert.calibration.imatrix import export_once
from dgq.convert.calibration.input_sums import InputSums, add_sums
from dgq.convert.calibration.samples_file import sample_tensors
from dgq.convert.calibration.stats import coverage, starved, watched
from dgq.convert.calibration.trajectories import walked
from dgq.convert.calibration.unfinished import Unfinished, calibration_folder
from dgq.convert.layerwise.budget import Budget
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.estimate import Needs, Sizes
from dgq.convert.layerwise.passes import DRAFTS, Rows, SamplePasses, drafted
from dgq.convert.layerwise.samples import Document, chunks, documents, used
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.layerwise.stream import Stream
from dgq.convert.resume import ranks
from dgq.convert.resume.folder import write_tensors
from dgq.convert.resume.target import check_target
from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.device import chosen_device
from dgq.convert.source.hashes import dgq_version
from dgq.quant.errors import InputError
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

STATS = "stats"  # the finished file, in the folder of unfinished work
MORE = 4  # times the rounds asked for are made at most, while an expert has too few tokens
Progress = Callable[[int, int], None]  # steps done, steps in all
Notice = Callable[[str], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """The options of `dgq calibrate`, with its defaults.

    prompts: a .jsonl of {"text"} or {"messages"}, or a .txt; None: the prompts that ship with dgq. seed: of cuts, noise
    and random tokens. rounds: through the documents. trajectories: take half of the canvases from the sampler's own
    steps. imatrix: write an importance matrix for llama-quantize there as well.

    revision: branch, tag or commit of a Hub source. adapters: directories of LoRA adapters that are merged into the
    source, in order. device: "auto", "cpu" or "cuda". ram, vram: bytes to keep below; None: most of what is free. The
    result does not depend on them.
    """

    prompts: Path | None = None
    seed: int = 0
    rounds: int = 4
    trajectories: bool = False
    imatrix: Path | None = None
    revision: str | None = None
    adapters: tuple[AdapterLike, ...] = ()
    device: str = "auto"
    ram: int | None = None
    vram: int | None = None


def calibrate(
    src: str,
    out: Path,
    options: CalibrateOptions = CalibrateOptions(),
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any] | None:
    """Write the STATS of a checkpoint to the file `out`, or go on where the same call broke off.

    src: a directory, a Hub id, or "tiny". progress: called with steps done and steps in all; notice: with lines for the
    user. Returns what STATS say about themselves, with "starved" and "coverage" (stats.py); under torchrun None in all
    processes but the first. InputError for bad prompts, an `out` that exists, too little memory, another calibration's
    unfinished work.
    """
    source = open_source(src, options.revision, adapters=options.adapters)
    out, device = out.expanduser(), chosen_device(options.device)
    with ranks.process_group(device):
        if options.imatrix is not None:
            _check_imatrix(options.imatrix, out)
        with one_thread(device) as pool, shared_out(pool):
            calibration = _Calibration(source, out, device, options, progress or _ignore, notice or _ignore)
            about = calibration.run()
        return about if ranks.rank() == 0 else None


def _ignore(*_: object) -> None:
    return None


def _check_imatrix(imatrix: Path, out: Path) -> None:
    """InputError if the imatrix cannot be written, as far as that is known before the work. If STATS are finished but
    for their name, the same work may have written the imatrix already."""
    if imatrix.resolve() == out.resolve():
        raise InputError(f"--imatrix {imatrix}: is the name of STATS; give it another")
    if not (calibration_folder(out) / STATS).is_file():
        check_target(imatrix)
    if not imatrix.absolute().parent.is_dir():
        raise InputError(f"--imatrix {imatrix}: there is no directory {imatrix.absolute().parent}")


class _Calibration:
    """One calibration of an open source on a device, by this process and the others of torchrun."""

    def __init__(
        self, source: Source, out: Path, device: str, options: CalibrateOptions, progress: Progress, notice: Notice
    ) -> None:
        self._source, self._out, self._device, self._options = source, out, device, options
        self._progress, self._notice = progress, notice
        self._dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def run(self) -> dict[str, Any]:
        """Write STATS, and the imatrix before; what STATS say about themselves."""
        source, options = self._source, self._options
        check_target(self._out)
        read, data = documents(source, options.prompts)
        self._check_memory(read)
        about = {"dgq": dgq_version(), "weights": source.digest(), "data": data, "seed": options.seed,
                 "dtype": str(self._dtype), "trajectories": options.trajectories}  # fmt: skip
        sampler = GenerationConfig.from_file(source.path / "generation_config.json", source.config).sampler
        identity = {**about, "rounds": options.rounds, "processes": ranks.world()}
        with Unfinished(self._out, identity, self._notice) as work:
            made, tensors, rounds = self._rounds(work, read, sampler)
            about |= {"rounds": rounds, "tokens": sum(chunk.run_tokens for chunk in made)}
            if ranks.rank() == 0:
                self._write(work.path, made, tensors, about)
            work.remove()
        return {**about, "starved": starved(tensors), "coverage": coverage(tensors)}

    def _check_memory(self, read: list[Document]) -> None:
        """InputError if the budget of memory is too small for these documents."""
        budget, options = Budget(self._options.ram, self._options.vram), self._options
        budget.enforce()
        most = Sizes.most(self._source.config, read, len(read) * MORE * options.rounds * options.trajectories)
        budget.room(Needs(self._source, self._device, most), self._device, "calibrating")

    def _rounds(
        self, work: Unfinished, read: list[Document], sampler: SamplerConfig
    ) -> tuple[list[Chunk], dict[str, Tensor], int]:
        """All rounds: their chunks, the sums over them, and how many rounds there were."""
        source, options = self._source, self._options
        stream = Stream(source.config, Rows(source), self._device, self._dtype)
        layers = len(source.config.layers)
        drafts = DRAFTS * layers * any(document.open for document in read)
        each = (2 + sampler.steps * options.trajectories) * layers
        steps = _Steps(self._progress, drafts + each * options.rounds)
        with steps.promised(drafts):
            read = work.drafts(partial(drafted, stream, read, options.seed, steps.step), read)
        made: list[Chunk] = []
        tensors: dict[str, Tensor] = {}
        turn = 0
        while turn < options.rounds or (turn < MORE * options.rounds and starved(tensors)):
            new = used([*made, *chunks(read, options.seed, turn, source)])[len(made) :]
            if not new:
                break
            steps.total = max(steps.total, steps.done + each)
            with steps.promised(each):
                if options.trajectories:
                    walk = partial(walked, stream, new, sampler, options.seed, turn << 32, progress=steps.step)
                    new = work.walked(turn, walk)
                made += new
                add_sums(tensors, _round(source, stream, new, work, turn, steps.step))
            turn += 1
        return made, tensors, turn

    def _write(self, folder: Path, made: list[Chunk], tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """The imatrix first: work that breaks off between the two goes on."""
        tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
        stats = folder / STATS
        write_tensors(stats, {**sample_tensors(made), **tensors}, {"dgq": json.dumps(about)})
        stats.chmod(0o644)  # safetensors keeps it to its owner
        check_target(self._out)  # hours may have gone by
        if self._options.imatrix is not None:
            export_once(folder / "imatrix", self._options.imatrix, self._source, tensors, about)
        stats.replace(self._out)


class _Steps:
    """How much is done, and how much there is in all. A step is all chunks through a layer."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        self.done += 1
        self._progress(self.done, self.total)

    @contextmanager
    def promised(self, steps: int) -> Iterator[None]:
        """For work of so many steps, or fewer: those that an earlier run did are taken off the total."""
        before = self.done
        yield
        self.total -= steps - (self.done - before)


def _round(
    source: Source, stream: Stream, new: list[Chunk], work: Unfinished, turn: int, step: Callable[[], None]
) -> dict[str, Tensor]:
    """Both passes over a round's chunks, of which this process does its share; the sums over all processes. Stages that
    an earlier run did are read."""
    mine = range(ranks.rank(), len(new), ranks.world())
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(work.states_file(f"states-{ranks.rank()}-{i}")) for i in range(3)]
        passes = SamplePasses(stream, new, mine, files[2], files[:2])
        if not work.has(f"{turn}-first"):
            passes.first(step)
            work.store(f"{turn}-first", {})
        stages = ["enter", *range(len(source.config.layers)), "leave"]
        for stage in stages:
            name = f"{turn}-{stage}"
            if not work.has(name):
                sums = InputSums(source.config.experts)
                if isinstance(stage, int):
                    passes.layer(stage, sums)
                    step()
                elif stage == "enter":
                    passes.enter(sums)
                else:
                    passes.leave(sums)
                work.store(name, sums.result(watched(source, stage)))
            tensors |= work.read(name)
    return tensors
