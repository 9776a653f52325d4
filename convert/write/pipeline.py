"""Carries a plan out: read a slice, quantise it, write it to its place.

    source rows (read, not mapped)  --threads-->  quantised slices  --in order-->  <name>-Q4_K_M.gguf, or *.safetensors
                                                                                   mmproj-<name>-BF16.gguf
    source files                    --hash---->   dgq.json  <--hash--  the artifact's files

With a GPU each thread copies its slices there, quantises them on a stream of its own and copies them back, so that
copies and arithmetic overlap; the bytes are the same. Everything goes into a hidden directory beside the target, which
gets its name in one rename when it is complete: a reader never meets a half-written artifact. A conversion that ends
early (a signal, a full disk, a power cut) leaves that directory and its journal (resume/journal.py), and the same
command goes on from there; bad input leaves nothing.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dgq.convert.plans.plan import Plan
from dgq.convert.resume import journal
from dgq.convert.resume.journal import Journal
from dgq.convert.resume.target import check_target
from dgq.convert.source.hashes import describe, dgq_version, digest
from dgq.convert.write import provenance
from dgq.convert.write.artifact_files import COPIED, ArtifactFiles, artifact_files, copy_small_files
from dgq.convert.write.input_scales import calibrated, given, scales_of
from dgq.convert.write.refine import check_memory, check_scratch, refinable, refined
from dgq.convert.write.settings import Calibrate, ConversionSettings, Given, InputScales
from dgq.convert.write.slices import ordered, slices
from dgq.quant.errors import InputError
from dgq.quant.files.imatrix import Imatrix
from dgq.quant.files.places import free_bytes, sync_path, taken_bytes

GPU_THREADS = 4  # slices on a GPU at once
HASHERS = 4  # source files hashed at once, beside the work
HEADER_ALLOWANCE = 64 << 20  # disk for metadata, tokenizer and the copied files
Progress = Callable[[int, str], None]  # bytes of the artifact done since the last call, name of the tensor


@dataclass(frozen=True)
class Converted:
    """The finished artifact: its directory, what to open (the .gguf, or the directory), the content of its dgq.json;
    seconds spent by stage; weights that an earlier run had done."""

    path: Path
    file: Path
    document: dict[str, Any]
    seconds: dict[str, float]
    resumed: int


def convert(
    plan: Plan, out: Path, settings: ConversionSettings, progress: Progress, notice: Callable[[str], None]
) -> Converted:
    """Write the artifact `out`, a directory that must not exist, or go on with what an earlier run began of it.

    progress is called with bytes of the artifact done since its last call, and what is being worked on; notice with
    each line that the user should read. InputError for weights that are not finite, an imatrix that does not fit, a
    full disk, a source that changes, an unfinished conversion of something else.
    """
    source, version, identity = plan.source, dgq_version(), _identity(plan, settings)
    settings = _checked(plan, settings, notice)
    files = artifact_files(plan, version, settings.imatrix)  # before the weights: it may refuse the tokenizer
    for line in files.notices:
        notice(line)
    seconds: dict[str, float] = {}
    with _staged(plan, out, identity, notice) as (partial, log), _hashers() as hashers:
        hashes = _hashes(hashers, source.files)
        with _timed(seconds, "checking copies"):
            source.check_copies()
        with _timed(seconds, "input scales"):
            scales = _scales(plan, settings, log, functools.partial(progress, 0), notice)
        files.open(partial)
        resumed = len(log.done)
        with _timed(seconds, "quantising"):
            _write(_Run(plan, settings, files, log, scales), progress, partial.parent)
            files.close()
        copy_small_files(source.path, partial)
        files.finish(partial, version)
        progress(0, "hashing")
        with _timed(seconds, "hashing the source"):
            sources = {name: future.result() for name, future in hashes.items()}
        _check_unchanged(plan, settings, identity)
        with _timed(seconds, "hashing the artifact"):
            hashed = {name: f.result() for name, f in _hashes(hashers, sorted(partial.iterdir())).items()}
        document = provenance.document(plan, settings, scales.about if scales else None, sources, hashed)
        (partial / provenance.FILE).write_text(provenance.text(document), "utf-8")
    return Converted(out, out / files.main, document, seconds, resumed)


def _checked(plan: Plan, settings: ConversionSettings, notice: Callable[[str], None]) -> ConversionSettings:
    """The settings with the imatrix fitted to the model. InputError for what does not go with the plan, too little
    memory, or a vocabulary that the tokenizer does not have."""
    if settings.imatrix is not None:
        settings = replace(settings, imatrix=_fitted(plan, settings.imatrix, notice))
    settings.budget.enforce()
    if settings.stats is not None and (careful := [tensor for tensor in plan.tensors if refinable(tensor)]):
        check_memory(plan, careful, settings)
    plan.source.check_vocabulary()
    return settings


@dataclass(frozen=True)
class _Run:
    """A conversion that is under way."""

    plan: Plan
    settings: ConversionSettings
    files: ArtifactFiles
    log: Journal
    scales: InputScales | None

    def keep(self) -> None:
        """Wait until everything written is on the disk, and note what is whole."""
        self.files.places.sync()
        self.log.flush()


def _write(run: _Run, progress: Progress, scratch: Path) -> None:
    """Quantise and write every weight that the journal does not have. scratch: where hidden states may lie."""
    plan, settings = run.plan, run.settings
    for tensor in plan.tensors:
        if tensor.name in run.log.done:
            run.files.places.skip(tensor.entries or (tensor.name,))
            progress(tensor.nbytes, tensor.name)
    todo = [tensor for tensor in plan.tensors if tensor.name not in run.log.done]
    careful = [tensor for tensor in todo if settings.stats is not None and refinable(tensor)]
    plain = [tensor for tensor in todo if tensor not in careful]
    if careful:
        check_scratch(plan, todo, settings, scratch)
    jobs = (job for tensor in plain for job in slices(plan, tensor, settings, run.scales))
    threads = settings.threads if settings.device == "cpu" else min(settings.threads, GPU_THREADS)
    step = functools.partial(progress, 0)
    before = torch.get_num_threads()
    # one OpenMP thread each: there are enough of ours
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            made = chain(ordered(pool, jobs, 2 * threads), refined(plan, careful, settings, scratch, run.scales, step))
            for job, piece in made:
                run.files.append(job.tensor.name, piece)
                progress(job.tensor.nbytes * piece.numel // job.tensor.numel, job.tensor.name)
                if job.last and run.log.finish(job.tensor.name):
                    run.keep()
        except BaseException:
            with suppress(OSError):  # what is whole is kept, if the disk still takes it
                run.keep()
            raise
        finally:
            torch.set_num_threads(before)
        run.keep()


def _scales(
    plan: Plan, settings: ConversionSettings, log: Journal, step: Callable[[str], None], notice: Callable[[str], None]
) -> InputScales | None:
    """The input scales of a recipe with activations. A calibration takes long, and the journal keeps what it found."""
    if plan.recipe.activations is None:
        return None
    if settings.input_scales is None:
        raise InputError(f"recipe {plan.recipe.name}: stores input scales; have them calibrated, or give one")
    if isinstance(settings.input_scales, Given):
        return given(plan, settings.input_scales)
    if settings.stats is not None:
        return scales_of(settings.stats)
    if log.scales is not None:
        return InputScales(**log.scales)
    scales = calibrated(plan, settings.device, step, notice)
    log.note({"scales": {"values": dict(scales.values), "about": scales.about}})
    return scales


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 3)


@contextmanager
def _hashers() -> Iterator[ThreadPoolExecutor]:
    """A pool whose end does not wait for files that it has not begun."""
    pool = ThreadPoolExecutor(HASHERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _hashes(pool: ThreadPoolExecutor, files: list[Path]) -> dict[str, Future[dict[str, Any]]]:
    return {file.name: pool.submit(describe, file) for file in files}


def _fitted(plan: Plan, imatrix: Imatrix, notice: Callable[[str], None]) -> Imatrix:
    if not plan.format.takes_imatrix:
        raise InputError(f"--imatrix {imatrix.file}: weighs GGUF quantisers, and recipe {plan.recipe.name} has none")
    fitted = imatrix.fitted({tensor.name: tensor.shape for tensor in plan.tensors})
    quantised = [tensor.name for tensor in plan.tensors if tensor.scheme.bits < 16]
    without = [name for name in quantised if name not in fitted.weights]
    if without:
        notice(f"{imatrix.file}: no entry for {len(without)} of {len(quantised)} quantised weights ({without[0]}, …):"
               " quantised unweighed")  # fmt: skip
    if fitted.unseen:
        notice(f"{imatrix.file}: {fitted.unseen} experts or weights saw no token: their columns weigh the same")
    return fitted


def _identity(plan: Plan, settings: ConversionSettings) -> dict[str, Any]:
    """What must be the same for a conversion to go on: everything that decides the artifact's bytes."""
    source = plan.source
    names = [source.path / name for name in COPIED]
    by_calibration = plan.recipe.activations and isinstance(settings.input_scales, Calibrate)
    return {
        "dgq version": dgq_version(),
        "recipe": f"{plan.recipe.name} ({digest(plan.recipe.model_dump_json())})",
        "effort": settings.effort,
        "imatrix": describe(Path(settings.imatrix.file)) if settings.imatrix else None,
        "adapters": [adapter.about for adapter in source.adapters],
        "stats": settings.stats.sha256 if settings.stats else None,
        "input scale": str(settings.input_scales) if plan.recipe.activations else None,
        "device": settings.device if settings.stats or by_calibration else None,  # sums differ in their last bits
        "source": f"{source.where.repo or source.where.name} {source.where.revision or ''}".strip(),
        "files": {file.name: _stamp(file) for file in (*source.files, *names) if file.is_file()},
    }


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def _check_unchanged(plan: Plan, settings: ConversionSettings, began: dict[str, Any]) -> None:
    """InputError if a source file, or the imatrix, is not what it was when the conversion began."""
    now = _identity(plan, settings)
    changed = [plan.source.path / name for name, stamp in began["files"].items() if now["files"].get(name) != stamp]
    if settings.imatrix and now["imatrix"] != began["imatrix"]:
        changed.append(Path(settings.imatrix.file))
    if changed:
        raise InputError(f"{changed[0]}: changed while it was converted; run the command again")


def _check_room(plan: Plan, out: Path, partial: Path) -> None:
    taken = sum(taken_bytes(file) for file in partial.iterdir())
    need = HEADER_ALLOWANCE + max(0, plan.nbytes - taken)
    free = free_bytes(partial)
    if free < need:
        raise InputError(f"{out}: needs {need / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free")


@contextmanager
def _staged(
    plan: Plan, out: Path, identity: dict[str, Any], notice: Callable[[str], None]
) -> Iterator[tuple[Path, Journal]]:
    """The partial directory and its journal; renamed to `out` at the end. Kept if the work can go on, else removed."""
    check_target(out)
    partial, path = journal.paths(out)
    missing = [folder for folder in (partial.parent, *partial.parent.parents) if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with journal.opened(out, identity) as log:
            keep = log.worth_keeping
            try:
                check_target(out)
                _check_room(plan, out, partial)
                if log.done:
                    notice(f"going on with {partial}: {len(log.done)} of {len(plan.tensors)} weights are done")
                keep = False
                yield partial, log
                partial.chmod(0o755)
                for file in partial.iterdir():
                    sync_path(file)
                check_target(out)
                partial.rename(out)
                with suppress(OSError):  # a file system may not know how
                    sync_path(out)
                    sync_path(out.absolute().parent)
            except BaseException as error:
                keep = partial.is_dir() and (keep or (log.worth_keeping and not isinstance(error, InputError)))
                if keep and not isinstance(error, InputError | OSError):
                    notice(f"{partial} keeps what is done; the same command goes on from there")
                raise
            finally:
                if not keep:
                    shutil.rmtree(partial, ignore_errors=True)
                    journal.remove(path)
    except OSError as error:
        kept = "; what is done is kept, the same command goes on from there" if partial.is_dir() else ""
        raise InputError(f"{out}: cannot be written ({error}){kept}") from None
    finally:
        with suppress(OSError):  # those that are empty
            for folder in missing:
                folder.rmdir()
