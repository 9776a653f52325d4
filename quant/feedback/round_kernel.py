"""Rounding the columns of a scale group with error feedback, for every candidate scale, in two launches (Triton).

The torch loop of feedback.py launches some ten kernels a column and writes all candidates' columns each time. Here
each program takes ROWS rows of one matrix, a row a thread, and one candidate; the columns stay in registers, and only
the candidate's loss is kept. A second launch does each row's best again and stores its codes and errors.

Columns are held as tiles (TILE, ROWS) and rounded by a loop over the columns of the first tile that is left, which
picks its column by a masked sum and takes its error off that tile and those after it. (Unrolled, this compiles for
minutes; as one tile, most of its instructions pick.) All of a tile's columns belong to the same thread because
the loads that make them go along rows, hence x transposed, and strides that say nothing of alignment.
"""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator,assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ROWS, TILE, WARPS = 32, 16, 1
REGISTERS = 192  # a thread; 64 columns take 242 if they may, and spill none of these
_uniform = WeakTensorKeyDictionary()  # levels -> whether they are consecutive integers


def round_columns(
    x: Tensor, scale: Tensor, low: Tensor, factor: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns x (B, rows, sub) to levels (L,) * scale + low with each of the candidates scale and low (C, B,
    rows), errors going by factor (B, sub, sub), upper triangular; keep each row's candidate of least loss, the first
    of equals -> codes uint8 and errors (B, rows, sub), best (B, rows) int64. All float32; sub a multiple of 16; more
    than 16 levels only if they are consecutive integers. Waits for the GPU once for each `levels`."""
    experts, rows, sub = x.shape
    if levels not in _uniform:
        _uniform[levels] = bool((levels.diff() == 1).all())
    uniform, shared = _uniform[levels], factor.stride(0) == 0 or len(factor) == 1
    if sub % TILE or not (uniform or len(levels) <= 16):
        raise ValueError(f"{sub} columns and {len(levels)} levels that are{'' if uniform else ' not'} uniform")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    error = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    best = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    loss = torch.empty_like(scale, memory_format=torch.contiguous_format)
    inputs = tuple(v.contiguous() for v in (x.mT, scale, low, factor[:1] if shared else factor, levels))

    def launch(programs: int, store: bool) -> None:
        _kernel[triton.cdiv(rows, ROWS), experts, programs](
            *inputs, codes, error, best, loss, rows, 0 if shared else sub * sub, STORE=store,
            SUB=sub, LEVELS=len(levels), UNIFORM=uniform, ROWS=ROWS, TILE=TILE, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip

    launch(len(scale), False)
    torch.argmin(loss, 0, out=best)
    launch(1, True)
    return codes, error, best


@triton.jit
def _nearest(v, levels, bounds, lowest, highest, UNIFORM: tl.constexpr):
    """Level and code of v as torch.bucketize has them: what lies between two goes down, a NaN to the last."""
    if UNIFORM:
        level = tl.ceil(v - 0.5)
        level = tl.where(level < highest, level, highest)
        level = tl.where(level > lowest, level, lowest)
        code = (level - lowest).to(tl.int32)
    else:
        code = tl.where(v <= bounds[0], 0, 1)
        for n in tl.static_range(1, len(bounds)):
            code += tl.where(v <= bounds[n], 0, 1)
        level = tl.load(levels + code)
    return level, code


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x, scale, low, factor, levels, codes, error, best, losses, rows, factor_stride, STORE: tl.constexpr,
    SUB: tl.constexpr, LEVELS: tl.constexpr, UNIFORM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(1).to(tl.int64)
    real = row < rows
    line = matrix * rows + row
    k = tl.arange(0, TILE)[:, None]
    x += matrix * SUB * rows
    factor += matrix * factor_stride
    left = ()
    for t in tl.static_range(SUB // TILE):
        left = left + (tl.load(x + (t * TILE + k) * rows + row[None, :], real[None, :], 0.0),)
    lowest, highest = tl.load(levels), tl.load(levels + LEVELS - 1)
    bounds = ()
    if not UNIFORM:
        for n in tl.static_range(LEVELS - 1):
            bounds = bounds + ((tl.load(levels + n) + tl.load(levels + n + 1)) * 0.5,)
    if STORE:
        candidate = tl.load(best + line, real, 0)
    else:
        candidate = tl.program_id(2).to(tl.int64)
    at = candidate * (tl.num_programs(1) * rows) + line
    s, base = tl.load(scale + at, real, 0.0), tl.load(low + at, real, 0.0)
    inverse = tl.where(s != 0, tl.math.div_rn(1.0, s), 0.0)
    loss = tl.zeros((ROWS,), tl.float32)
    for g in tl.static_range(SUB // TILE):
        for i in tl.range(TILE):
            j = g * TILE + i
            through = ()
            for t in tl.static_range(g, SUB // TILE):
                through = through + (tl.load(factor + j * SUB + t * TILE + k),)
            column = tl.sum(tl.where(k == i, left[0], 0.0), 0)
            level, code = _nearest((column - base) * inverse, levels, bounds, lowest, highest, UNIFORM)
            lost = (column - (level * s + base)) / tl.load(factor + j * SUB + j)
            loss += lost * lost
            if STORE:
                tl.store(codes + line * SUB + j, code.to(tl.uint8), real)
                tl.store(error + line * SUB + j, lost, real)
            after = ()
            for t in tl.static_range(SUB // TILE - g):
                after = after + (left[t] - lost[None, :] * through[t],)
            left = after
        left = left[1:]
    if not STORE:
        tl.store(losses + at, loss, real)
