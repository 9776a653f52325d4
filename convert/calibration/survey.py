"""`dgq calibrate`: what goes through each weight of the model, by side, noise level and expert.

    documents ── round 0, 1, … ──> chunks ──> both passes ──> sums, maxima, counts ──> STATS
                     └────────── then on, until every expert saw FLOOR tokens, or 4 times as many are over

No more than TOKENS are taken, which is what a conversion uses: what is counted here is what quantisers get.

Everything lies in .NAME.calibration while it is made (unfinished.py). The same command goes on from there, and
ends in the same bytes. Under torchrun the chunks are dealt out to the processes, and the sums of a layer are added up
before they are written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dgq.convert.calibration.stats import (
    READERS,
    WATCHED,
    coverage,
    imatrix_entries,
    sample_tensors,
    starved,
    watched,
)
from dgq.convert.calibration.trajectories import walked
from dgq.convert.calibration.unfinished import Unfinished, save
from dgq.convert.layerwise.budget import UNSAID, Budget
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.memory import Needs, Sizes
from dgq.convert.layerwise.passes import DRAFTS, Passes, Rows, drafted
from dgq.convert.layerwise.samples import KINDS, chunks, documents, used
from dgq.convert.layerwise.steady import one_thread, shared_out
from dgq.convert.layerwise.stream import Stream
from dgq.convert.resume.journal import check_target
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hashes import dgq_version
from dgq.quant.errors import InputError
from dgq.quant.files.imatrix import write_imatrix
from dgq.runtime.shape.names import gguf_name
from dgq.runtime.shape.settings import GenerationConfig

STATS = "stats"  # in the folder of the unfinished work, once all is counted
MORE = 4  # times the rounds asked for are made while an expert has too few tokens
Progress = Callable[[int, int], None]


def calibrated(
    source: Source, out: Path, prompts: Path | None, seed: int, rounds: int, device: str, imatrix: Path | None,
    progress: Progress, notice: Callable[[str], None], budget: Budget = UNSAID, trajectories: bool = False,
) -> dict[str, Any] | None:  # fmt: skip
    """survey(), by one process or by those of torchrun; None in all of these but the first."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        if imatrix is not None:
            _check_beside(imatrix, out, again=(_folder(out) / STATS).is_file())
        with one_thread(device) as pool, shared_out(pool):
            found = survey(
                source, out, prompts, seed, rounds, device, dtype, progress, notice, budget, trajectories, imatrix
            )
        return found if not several or dist.get_rank() == 0 else None
    finally:
        if several:
            dist.destroy_process_group()


def _check_beside(imatrix: Path, out: Path, again: bool) -> None:
    """InputError if the imatrix cannot be written, as far as that is known before. again: the same work may have
    written it, and not got further."""
    if imatrix.resolve() == out.resolve():
        raise InputError(f"--imatrix {imatrix}: is the name of STATS; give it another")
    if not again:
        check_target(imatrix)
    if not imatrix.absolute().parent.is_dir():
        raise InputError(f"--imatrix {imatrix}: there is no directory {imatrix.absolute().parent}")


def _folder(out: Path) -> Path:
    return out.absolute().parent / f".{out.name[:200]}.calibration"


class Survey:
    """A Watch that adds up what goes into the weights that STATS names. Sums are float64: their order does not show."""

    kinds: Tensor

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._rows: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None
        self.found: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        if name.endswith(WATCHED):
            self._add(name, x.reshape(-1, x.shape[-1]), expert, tokens)
        return y

    def _add(self, name: str, x: Tensor, expert: int | None, tokens: Tensor | None) -> None:
        sides, count = self._sides(tokens)
        sums = sides @ x.double().square()
        amax = (sides * x.abs().amax(-1)).amax(-1).float()
        if name + ".sum2" not in self.found:
            lead = () if expert is None else (self._experts,)
            self.found[name + ".sum2"] = sums.new_zeros(*lead, *sums.shape)
            self.found[name + ".amax"] = amax.new_zeros(*lead, 2)
            self.found[name + ".count"] = count.new_zeros(*lead, KINDS)
        at = ... if expert is None else expert
        own = {part: self.found[f"{name}.{part}"][at] for part in ("sum2", "count", "amax")}
        own["sum2"].add_(sums)
        own["count"].add_(count)
        torch.maximum(own["amax"], amax, out=own["amax"])

    def _sides(self, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which rows are a prompt's and which a canvas's, float64 (2, rows), and how many of each kind. An expert's two
        products have the same."""
        if self._rows is None or self._rows[0] is not self.kinds or self._rows[1] is not tokens:
            kinds = self.kinds if tokens is None else self.kinds[tokens]
            sides = torch.stack((kinds == 0, kinds != 0)).double()
            numbers = torch.arange(KINDS, device=kinds.device).unsqueeze(1)
            self._rows = self.kinds, tokens, sides, (kinds == numbers).sum(1)  # bincount() waits for the GPU
        return self._rows[2:]

    def result(self, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The sums of all processes, on the CPU. expected: weights that the others may have seen -> shape of sum2."""
        done = {}
        for name, shape in expected.items():
            zeros = {"sum2": torch.zeros(shape, dtype=torch.float64), "amax": torch.zeros(shape[:-1]),
                     "count": torch.zeros(*shape[:-2], KINDS, dtype=torch.int64)}  # fmt: skip
            for part, zero in zeros.items():
                value = self.found.get(f"{name}.{part}", zero).cpu()
                if dist.is_initialized():
                    dist.all_reduce(value, dist.ReduceOp.MAX if part == "amax" else dist.ReduceOp.SUM)
                if not bool(value.isfinite().all()):
                    raise InputError(f"{name}: its inputs are not numbers; the checkpoint is damaged")
                done[f"{name}.{part}"] = value
        return done


def survey(
    source: Source, out: Path, prompts: Path | None, seed: int, rounds: int, device: str, dtype: torch.dtype,
    progress: Progress, notice: Callable[[str], None], budget: Budget = UNSAID, trajectories: bool = False,
    imatrix: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write STATS to `out`, and the imatrix before; what STATS says about itself. InputError for bad prompts, an `out`
    that exists, a budget of memory that is too small."""
    check_target(out)
    found, data = documents(source, prompts)
    budget.enforce()
    most = Sizes.most(source.config, found, len(found) * MORE * rounds * trajectories)
    budget.room(Needs(source, device, most), device, "calibrating")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    about = {"dgq": dgq_version(), "weights": source.digest(), "data": data, "seed": seed, "dtype": str(dtype),
             "trajectories": trajectories}  # fmt: skip
    sampler = GenerationConfig.from_file(source.path / "generation_config.json", source.config).sampler
    folder = _folder(out)
    with Unfinished(folder, {**about, "rounds": rounds, "processes": world}, rank, notice) as work:
        stream = Stream(source.config, Rows(source), device, dtype)
        layers = len(source.config.layers)
        drafts = DRAFTS * layers * any(d.open for d in found)
        each = (2 + sampler.steps * trajectories) * layers
        steps = _Steps(progress, drafts + each * rounds)
        with steps.promised(drafts):
            found = work.drafts(lambda: drafted(stream, found, seed, steps.step), found)
        tensors: dict[str, Tensor] = {}
        made: list[Chunk] = []
        turn = 0
        while turn < rounds or (turn < MORE * rounds and starved(tensors)):
            new = chunks(found, seed, turn, source)
            new = used([*made, *new])[len(made) :]
            if not new:
                break
            steps.total = max(steps.total, steps.done + each)
            with steps.promised(each):
                if trajectories:
                    new = work.walked(turn, new, partial(walked, stream, new, sampler, seed, turn << 32), steps.step)
                made += new
                _add(tensors, _round(source, stream, new, work, turn, steps.step))
            turn += 1
        about |= {"rounds": turn, "tokens": sum(chunk.run_tokens for chunk in made)}
        if rank == 0:
            tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
            save({**sample_tensors(made), **tensors}, folder / STATS, {"dgq": json.dumps(about)})
            (folder / STATS).chmod(0o644)  # safetensors keeps it to its owner
            check_target(out)  # hours may have gone by
            if imatrix is not None:  # before: what breaks off here goes on
                _export(folder / "imatrix", imatrix, source, tensors, about)
            (folder / STATS).replace(out)
        if dist.is_initialized():
            dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
    return {**about, "starved": starved(tensors), "coverage": coverage(tensors)}


class _Steps:
    """Tells how much is done, and how much there is in all."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        self.done += 1
        self._progress(self.done, self.total)

    @contextmanager
    def promised(self, steps: int) -> Iterator[None]:
        """For work of so many steps, or less: some of it may have been done before."""
        before = self.done
        yield
        self.total -= steps - (self.done - before)


def _round(
    source: Source, stream: Stream, new: list[Chunk], work: Unfinished, turn: int, step: Callable[[], None]
) -> dict[str, Tensor]:
    layers = len(source.config.layers)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(new), world)
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(work.file(f"states-{rank}-{i}")) for i in range(3)]
        passes = Passes(stream, new, mine, files[2], files[:2])
        if not work.has(f"{turn}-first"):
            passes.first(step)
            work.note(f"{turn}-first", {})
        stages = ["enter", *range(layers), "leave"]
        for stage in stages:
            name = f"{turn}-{stage}"
            if not work.has(name):
                watch = Survey(source.config.experts)
                if isinstance(stage, int):
                    passes.layer(stage, watch)
                    step()
                elif stage == "enter":
                    passes.enter(watch)
                else:
                    passes.leave(watch)
                work.note(name, watch.result(watched(source, stage)))
            tensors |= work.read(name)
    return tensors


def _export(made: Path, path: Path, source: Source, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """The imatrix, which the same work may have written before it broke off; InputError if another file is there."""
    export_imatrix(made, source, tensors, about)
    if not (path.is_file() and path.read_bytes() == made.read_bytes()):
        check_target(path)
        export_imatrix(path, source, tensors, about)


def export_imatrix(path: Path, source: Source, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """The sums as llama.cpp's importance matrix, under the names of a .gguf: of prompts and canvases together."""
    entries = {}
    for name, found in imatrix_entries(tensors).items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        for reader in (kind, *READERS.get(kind, ())):
            same = name.replace(kind, reader)
            if same in source.text and (known := gguf_name(same)) is not None:
                entries[known] = found
    write_imatrix(path, entries, about["data"]["name"], about["rounds"], about["tokens"] // about["rounds"])


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        known = total.get(name)
        if known is None:
            total[name] = value
        else:
            total[name] = torch.maximum(known, value) if name.endswith(".amax") else known + value
