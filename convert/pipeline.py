"""Carries a plan out: read a slice, quantise it, write it, in the plan's order.

    source slices (memory-mapped)  --threads-->  quantised slices  --in order-->  <name>-Q4_K_M.gguf, or *.safetensors
    source files                   --hash---->  dgq.json  <--hash--  the artifact's files

With a GPU the slices are copied there, quantised there and copied back; the bytes are the same.

Everything goes into a hidden directory beside the target, which gets its name in one rename when it is complete:
a reader never meets a half-written artifact, and a failure leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dgq.convert import provenance
from dgq.convert.gguf_metadata import metadata, rope_freqs
from dgq.convert.hf_artifact import DirWriter, write_configs
from dgq.convert.plan import Plan, PlannedTensor
from dgq.quant.errors import InputError
from dgq.quant.gguf_file import GGUFWriter
from dgq.quant.imatrix import Imatrix
from dgq.quant.types import Packed, Scheme
from dgq.runtime.config import GGUF_ARCH

SLICE = {"cpu": 1 << 22, "cuda": 1 << 25}  # elements quantised at a time: 16 and 128 MiB of float32
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
GPU_AHEAD = 3  # slices on a GPU at once: one is copied there while another is quantised and a third comes back
HEADER_ALLOWANCE = 64 << 20  # disk for metadata, tokenizer and the copied files

T = TypeVar("T")


@dataclass(frozen=True)
class InputScales:
    """Expert weight's name -> input_scale, and how they were found, for dgq.json."""

    values: Mapping[str, float]
    about: dict[str, Any]


Progress = Callable[[int, str], None]  # bytes of the artifact done since the last call, name of the tensor


@dataclass(frozen=True)
class Converted:
    """The finished artifact: its directory, what to open (the .gguf, or the directory), the content of its dgq.json."""

    path: Path
    file: Path
    document: dict[str, Any]


def convert(
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None,
    effort: str,
    threads: int,
    progress: Progress,
    device: str = "cpu",
    scales: InputScales | None = None,
) -> Converted:
    """Write the artifact `out`, a directory that must not exist. On any failure nothing is left behind.

    effort: "stock", the reference quantiser's exact bytes. threads: slices quantised at the same time; device: where;
    the bytes depend on neither. scales: input scales, for a recipe with activations. InputError for weights that are
    not finite, an imatrix that does not fit, a full disk.
    """
    source, version = plan.source, provenance.dgq_version()
    gguf = plan.recipe.format == "gguf"
    if imatrix is not None:
        _check_imatrix(plan, imatrix)
    ahead = 2 * threads if device == "cpu" else GPU_AHEAD
    keys = metadata(plan, version, imatrix) if gguf else {}  # before the weights: it may refuse the tokenizer
    file = f"{source.where.name}-{plan.recipe.label}.gguf" if gguf else ""
    with staged(out, plan.nbytes + HEADER_ALLOWANCE) as partial, ThreadPoolExecutor(threads) as pool:
        source.check_copies()
        writer: GGUFWriter | DirWriter
        if gguf:
            writer = GGUFWriter(partial / file, GGUF_ARCH, keys, {t.name: (t.shape, t.scheme) for t in plan.tensors})
        else:
            writer = DirWriter(plan, partial)
        for tensor in plan.tensors:
            jobs = _jobs(plan, tensor, imatrix, device, scales)
            for piece in ordered(pool, jobs, ahead):
                writer.append(tensor.name, piece)
                progress(tensor.nbytes * piece.numel // tensor.numel, tensor.name)
        writer.close()
        for name in COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, partial / name)
        if not gguf:
            write_configs(plan, partial, version)
        progress(0, "hashing")
        sources = _hashes(pool, source.files)
        files = _hashes(pool, sorted(partial.iterdir()))
        document = provenance.document(plan, effort, imatrix, scales.about if scales else None, sources, files)
        (partial / provenance.FILE).write_text(provenance.text(document), "utf-8")
    return Converted(out, out / file, document)


def _hashes(pool: ThreadPoolExecutor, files: list[Path]) -> dict[str, Any]:
    return dict(zip([file.name for file in files], pool.map(provenance.describe, files), strict=True))


def _jobs(
    plan: Plan, tensor: PlannedTensor, imatrix: Imatrix | None, device: str, scales: InputScales | None
) -> Iterator[Callable[[], Packed]]:
    """One job per slice of a tensor along its first axis: read, check, quantise."""
    if tensor.source is None:
        factors = torch.tensor(rope_freqs(plan.source))
        yield lambda: Packed(tensor.scheme, tensor.shape, tensor.scheme.quantize(factors))
        return
    weight = plan.source[tensor.source].parts[""]
    weight = weight if weight.dim() else weight.view(1)
    where = f"{plan.source.file(tensor.source)}: {tensor.source}"
    importance = imatrix.weights.get(tensor.name) if imatrix is not None else None
    rows = max(1, SLICE[device] // max(1, tensor.numel // weight.shape[0]))
    scheme = plan.layout.slices if len(tensor.entries) > 1 else tensor.scheme
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        columns = importance[part] if importance is not None and importance.dim() == 2 else importance
        job = _Job(weight, part, scheme, columns, where, device, scales.values.get(tensor.source) if scales else None)
        yield job.run


@dataclass(frozen=True)
class _Job:
    """A slice of a weight: read it, check it, quantise it."""

    weight: torch.Tensor
    part: slice
    scheme: Scheme
    importance: torch.Tensor | None
    where: str
    device: str
    input_scale: float | None

    def run(self) -> Packed:
        values = self.weight[self.part].to(self.device).float()
        self._check(values)
        packed = Packed(self.scheme, tuple(values.shape), self.scheme.quantize(values, self.importance))
        if self.importance is not None and not torch.isfinite(packed.dequantize()).all():
            name = self.scheme.name
            raise InputError(f"{self.where}: the imatrix's importance overflows {name}; the imatrix is damaged")
        if self.input_scale is not None:
            scale = torch.full((*values.shape[:-1], 1), self.input_scale)
            packed = Packed(packed.scheme, packed.shape, {**packed.parts, "input_scale": scale})
        return packed.to("cpu")

    def _check(self, values: torch.Tensor) -> None:
        finite = torch.isfinite(values)
        if not finite.all():
            index = [int(i) for i in (~finite).nonzero()[0]]
            index[0] += self.part.start
            raise InputError(
                f"{self.where} holds {float(self.weight[tuple(index)])} at {index}; the checkpoint is damaged"
            )
        largest = float(values.abs().max())
        if largest > self.scheme.max_abs:
            limit = f"{self.scheme.name} holds {self.scheme.max_abs:.6g} at most"
            raise InputError(f"{self.where} holds a weight of {largest:.4g}, {limit}; the checkpoint is damaged")


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
    if plan.recipe.format != "gguf":
        raise InputError(f"--imatrix {imatrix.file}: weighs GGUF quantisers, and recipe {plan.recipe.name} has none")
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
