"""Carries a plan out: read a slice, quantise it, write it, in the plan's order.

    source slices (memory-mapped)  --threads-->  quantised slices  --in order-->  <name>-Q4_K_M.gguf
    source files                   --hash---->  dgq.json  <--hash--  the artifact's files

Everything goes into a hidden directory beside the target, which gets its name in one rename when it is complete:
a reader never meets a half-written artifact, and a failure leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dgq.convert import provenance
from dgq.convert.gguf_metadata import metadata, rope_freqs
from dgq.convert.plan import Plan, PlannedTensor
from dgq.quant.errors import InputError
from dgq.quant.gguf_file import GGUFWriter
from dgq.quant.imatrix import Imatrix
from dgq.quant.types import Packed
from dgq.runtime.config import GGUF_ARCH

SLICE = 1 << 22  # elements quantised at a time: 16 MiB of float32
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
)
HEADER_ALLOWANCE = 64 << 20  # disk for metadata, tokenizer and the copied files

T = TypeVar("T")
Progress = Callable[[int, str], None]  # bytes of the artifact done since the last call, name of the tensor


@dataclass(frozen=True)
class Converted:
    """The finished artifact: its directory, its weight file, the content of its dgq.json."""

    path: Path
    file: Path
    document: dict[str, Any]


def convert(
    plan: Plan, out: Path, *, imatrix: Imatrix | None, effort: str, threads: int, progress: Progress
) -> Converted:
    """Write the artifact `out`, a directory that must not exist. On any failure nothing is left behind.

    effort: "stock", the reference quantiser's exact bytes. threads: slices quantised at the same time; the bytes do
    not depend on it. InputError for weights that are not finite, an imatrix that does not fit, a full disk.
    """
    source = plan.source
    if imatrix is not None:
        _check_imatrix(plan, imatrix)
    keys = metadata(plan, provenance.dgq_version(), imatrix)  # before the weights are read: it may refuse the tokenizer
    with staged(out, plan.nbytes + HEADER_ALLOWANCE) as partial, ThreadPoolExecutor(threads) as pool:
        source.check_copies()
        file = partial / f"{source.where.name}-{plan.recipe.label}.gguf"
        writer = GGUFWriter(file, GGUF_ARCH, keys, {t.name: (t.shape, t.scheme) for t in plan.tensors})
        for tensor in plan.tensors:
            jobs = _jobs(plan, tensor, imatrix)
            for piece in ordered(pool, jobs, ahead=2 * threads):
                writer.append(tensor.name, piece)
                progress(piece.nbytes, tensor.name)
        writer.close()
        for name in COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, partial / name)
        progress(0, "hashing")
        sources = _hashes(pool, source.files)
        document = provenance.document(plan, effort, imatrix, sources, _hashes(pool, sorted(partial.iterdir())))
        (partial / provenance.FILE).write_text(provenance.text(document), "utf-8")
    return Converted(out, out / file.name, document)


def _hashes(pool: ThreadPoolExecutor, files: list[Path]) -> dict[str, Any]:
    return dict(zip([file.name for file in files], pool.map(provenance.describe, files), strict=True))


def _jobs(plan: Plan, tensor: PlannedTensor, imatrix: Imatrix | None) -> Iterator[Callable[[], Packed]]:
    """One job per slice of a tensor along its first axis: read, check, quantise."""
    if tensor.source is None:
        factors = torch.tensor(rope_freqs(plan.source))
        yield lambda: Packed(tensor.scheme, tensor.shape, tensor.scheme.quantize(factors))
        return
    weight, file = plan.source[tensor.source], plan.source.text[tensor.source].file
    importance = imatrix.weights.get(tensor.name) if imatrix is not None else None
    rows = max(1, SLICE // max(1, tensor.numel // tensor.shape[0]))
    for start in range(0, tensor.shape[0], rows):
        part = slice(start, start + rows)
        columns = importance[part] if importance is not None and importance.dim() == 2 else importance
        yield _job(weight, part, tensor, columns, f"{file}: {tensor.source}")


def _job(
    weight: Packed, part: slice, tensor: PlannedTensor, importance: torch.Tensor | None, where: str
) -> Callable[[], Packed]:
    def job() -> Packed:
        values = weight.parts[""][part].float()
        finite = torch.isfinite(values)
        if not finite.all():
            index = [int(i) for i in (~finite).nonzero()[0]]
            index[0] += part.start
            raise InputError(
                f"{where} holds {float(weight.parts[''][tuple(index)])} at {index}; the checkpoint is damaged"
            )
        largest = float(values.abs().max())
        if largest > tensor.scheme.max_abs:
            limit = f"{tensor.scheme.name} holds {tensor.scheme.max_abs:.6g} at most"
            raise InputError(f"{where} holds a weight of {largest:.4g}, {limit}; the checkpoint is damaged")
        packed = Packed(tensor.scheme, tuple(values.shape), tensor.scheme.quantize(values, importance))
        if importance is not None and not torch.isfinite(packed.dequantize()).all():
            raise InputError(
                f"{where}: the imatrix's importance overflows {tensor.scheme.name}; the imatrix is damaged"
            )
        return packed

    return job


def ordered(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Run jobs on the pool, at most `ahead` at a time, and yield their results in order."""
    running: deque[Future[T]] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(job))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _check_imatrix(plan: Plan, imatrix: Imatrix) -> None:
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    for name, weights in imatrix.weights.items():
        shape = shapes.get(name)
        if shape is None:
            raise InputError(f"{imatrix.file}: has an entry for {name}, which this model does not have")
        if tuple(weights.shape) != (shape[-1:] if weights.dim() == 1 else (shape[0], shape[-1])):
            raise InputError(
                f"{imatrix.file}: {name} has importance {list(weights.shape)} for a weight of {list(shape)}"
            )


def check_target(out: Path) -> None:
    """InputError if `out` exists: dgq never writes into, or over, somebody's directory."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; choose another -o or remove it")


@contextmanager
def staged(out: Path, nbytes: int) -> Iterator[Path]:
    """A directory beside `out` to write into; renamed to `out` at the end, removed (with new parents) on failure."""
    check_target(out)
    parent = out.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    partial: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.partial-", dir=parent))
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise InputError(f"{out}: needs {nbytes / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free")
        yield partial
        partial.chmod(0o755)
        check_target(out)
        partial.rename(out)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{out}: cannot be written ({error})") from None
        raise
