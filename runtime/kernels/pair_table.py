"""The 256 pairs of a 16-entry table, in shared memory: two weights a load, where permute instructions take eight.

A byte holds two codes, and word `byte` of the table holds their two values as bfloat16. There is a copy for each of the
32 banks, 32 KiB in all, so that the lanes of a warp never wait for each other. Triton knows no such memory: assembly
declares, fills and reads it. Triton also asks the driver for more than 48 KiB only where its own share exceeds them;
has_room() asks for the sum.
"""

# mypy: ignore-errors

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_LEAST_SHARED = 200 << 10  # bytes a multiprocessor: with less, too few programs run side by side
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ready: dict[tuple[object, ...], bool] = {}


@cache
def is_worthwhile(device: torch.device) -> bool:
    """Whether the device's multiprocessors have room for the tables of several programs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    shared: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return shared >= _LEAST_SHARED


def has_room(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Let this launch of a Triton kernel have its shared memory and the table's; False if the driver refuses, or if
    this Triton hides its kernels' handles. The driver is asked once for each compilation of the kernel."""
    kinds = (a.data_ptr() % 16 if isinstance(a, torch.Tensor) else a for a in arguments)
    key = kernel, torch.cuda.current_device(), *kinds, *options.values()
    if key not in _ready:
        try:
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            compiled._init_handles()
            wanted = ctypes.c_void_p(compiled.function), _MAX_DYNAMIC_SHARED_SIZE, compiled.metadata.shared
            _ready[key] = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(*wanted) == 0
        except (AttributeError, OSError):
            _ready[key] = False
    return _ready[key]


@triton.jit
def fill(pairs):
    """Copy the pairs (256,) to shared memory for a program of 128 threads; its address there."""
    here = tl.inline_asm_elementwise(
        "{ .shared .align 1024 .b8 pairs[32768]; mov.u32 $0, pairs; }",
        "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    thread = tl.arange(0, 128)
    for i in tl.static_range(16):
        row = thread // 8 + 16 * i
        tl.inline_asm_elementwise(
            "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, $2;",
            "=r,r,r", [here + row * 128 + thread % 8 * 16, tl.load(pairs + row)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, $1;", "=r,r", [here], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def bank(lane):
    """Where a lane's copy lies in a row of 128 bytes."""
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 31; shl.b32 $0, $0, 2;", "=r,r", [lane], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def look(word, bank, here):
    """The pair of the byte that lies in bits 14 to 7 of each word."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 at; lop3.b32 at, $1, 0x7F80, $2, 0xEA; add.u32 at, at, $3; ld.shared.b32 $0, [at]; }",
        "=r,r,r,r", [word, bank, here], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
