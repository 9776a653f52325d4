"""How long a conversion would take here: everything it does, done for a moment on the CPU, and scaled up.

    calibrate (W4A4)   cast an expert to float32, multiply with it     x elements and products of all passes
    then, at the same time:
    encode, hash       a random matrix in each scheme; a few MiB       x elements and bytes / threads
    read               some MiB of the source's largest file           x bytes
    write              some MiB into a nameless file here, synced      x bytes

An estimate, and of the least: other programs want the cores too, threads share more than these, and what was just read
may still lie in memory. Seconds of work are one thread's time on a core, divided by the threads.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from dgq.convert.calibration.input_scales import CHATS, DRAFTS, PROMPT, TEXTS
from dgq.convert.estimate.needs import PASSES
from dgq.convert.plans.plan import Plan
from dgq.convert.write.pipeline import HASHERS
from dgq.quant.files.hf_writer import MAX_SHARD
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme

SHAPE = (512, 1024)  # of the matrix: rows that every block divides
NEW = 1 << 23  # elements whose float32 the allocator asks the system for every time
LEAST = 0.03  # seconds that something is repeated for
PIECE = 1 << 22  # bytes read, hashed or written at once


def probe(plan: Plan, threads: int) -> dict[str, Any]:
    """Seconds by kind of work; None for what could not be tried. total_s leaves a download out."""
    cores = min(threads, os.cpu_count() or 1)
    files = [plan.source.path / file for file in plan.source.files]  # of a Hub id they may not be here
    source = {str(file): file.stat().st_size for file in files if file.is_file()}
    largest = max(source, key=lambda file: source[file], default=None)
    nbytes = sum(stored.nbytes for stored in plan.source.everything().values())
    if plan.format.one_file:
        longest = sum(tensor.nbytes for tensor in plan.text)  # a file, which one thread hashes
    else:
        longest = plan.nbytes // min(cores, math.ceil(plan.nbytes / MAX_SHARD), HASHERS)
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoding = sum(n["params"] * _encode(SCHEMES[name]) for name, n in plan.by_scheme().items()) / cores
        calibrate = _calibrate(plan) / kept if plan.recipe.activations is not None else None
    finally:
        torch.set_num_threads(kept)
    read = _scaled(_read(largest, source[largest]) if largest else None, nbytes)
    write = _scaled(_write(), plan.nbytes)
    hashing = _hash() * (nbytes / cores + longest)
    total = max(encoding + hashing, read or 0.0, write or 0.0) + (calibrate or 0.0)
    times = {"encode_s": encoding, "read_s": read, "write_s": write, "hash_s": hashing}
    times |= {"calibrate_s": calibrate, "total_s": total}
    rounded = {name: None if s is None else round(s, 2) for name, s in times.items()}
    return {"device": "cpu", "threads": cores, **rounded}


def _seconds(action: Callable[[], object]) -> float:
    """This thread's own, for one action; the first is not counted, which may have to load something."""
    action()
    began, count = time.process_time(), 0
    while (spent := time.process_time() - began) < LEAST or not count:
        action()
        count += 1
    return spent / count


def _scaled(rate: float | None, count: int) -> float | None:
    return None if rate is None else rate * count


def _encode(scheme: Scheme) -> float:
    """Seconds an element, as the pipeline treats it: checked, quantised."""
    weight = (torch.randn(SHAPE) * 0.02).bfloat16()
    return _seconds(lambda: (torch.aminmax(weight), scheme.quantize(weight))) / weight.numel()


def _read(file: str, size: int) -> float | None:
    """Seconds a byte, from the file's middle on."""
    piece = min(PIECE, size)
    with open(file, "rb", buffering=0) as opened:  # noqa: PTH123
        opened.seek((size - piece) // 2)
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < LEAST and (got := len(opened.read(piece))):
            done += got
    return spent / done if done else None


def _write() -> float | None:
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            began = time.perf_counter()
            file.write(os.urandom(PIECE))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - began) / PIECE
    except OSError:
        return None


def _hash() -> float:
    data = bytes(PIECE)
    return _seconds(lambda: hashlib.sha256(data).digest()) / PIECE


def _calibrate(plan: Plan) -> float:
    """One thread's seconds for all passes, if the checkpoint stays in memory: each casts all weights, into memory
    that is new to the process, and multiplied with all tokens, an expert's with its share of them."""
    config = plan.source.config
    share = config.top_k / config.experts
    tokens = TEXTS * (PROMPT + 2 * config.canvas) + CHATS * (PROMPT + DRAFTS * config.canvas)
    weight = torch.zeros(2 * config.expert_intermediate, config.hidden)
    x = torch.zeros(max(1, round(share * tokens / PASSES)), config.hidden)
    cast = _seconds(torch.zeros(NEW, dtype=torch.bfloat16).float) / NEW
    product = _seconds(lambda: functional.linear(x, weight)) / (weight.numel() * len(x))
    shares = ((spec.numel, share if ".experts." in name else 1.0) for name, spec in plan.source.text.items())
    return sum(numel * (PASSES * cast + tokens * each * product) for numel, each in shares)
