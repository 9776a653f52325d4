"""Sums on a CPU whose bits do not depend on the number of threads: torch gets one, and products are cut by shape.

    a @ b     the rows of the result, or its columns if they are more, in pieces of PIECE multiplications, each made by
              one thread of a pool; the pieces are the same whatever the pool's size

MKL cuts products, and the inverse of a matrix, by the threads that it has, and each cut rounds differently. Everything
but products is done by the caller's thread. Another CPU may have other instructions, of which MKL takes the best, so
that its bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PIECE = 1 << 26  # some milliseconds of a core
ALIGNED = 64  # rows or columns: whole registers, whatever the instructions


@contextmanager
def one_thread(device: str) -> Iterator[Executor | None]:
    """On a CPU: torch has one thread meanwhile, and there is a pool of as many threads as it had. Elsewhere: None."""
    if device != "cpu":
        yield None
        return
    before = torch.get_num_threads()
    with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def shared_out(pool: Executor | None) -> AbstractContextManager[Any]:
    """A context in which the pool, if there is one, makes this thread's products of matrices."""
    return nullcontext() if pool is None else _Products(pool)


class _Products(TorchDispatchMode):
    def __init__(self, pool: Executor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_pieces = _BY_PIECES.get(func)
        if by_pieces is not None and not kwargs and (product := by_pieces(self._pool, *args)) is not None:
            return product
        return func(*args, **(kwargs or {}))


def _product(pool: Executor, a: Tensor, b: Tensor) -> Tensor | None:
    """a (…, n) @ b (n, columns); None if b is not one matrix, or the product is too small to cut."""
    if a.dim() < 2 or b.dim() != 2:
        return None
    flat = a.reshape(-1, a.shape[-1])
    pieces = _pieces(flat, b)
    if len(pieces) < 2:
        return None
    product = flat.new_empty(flat.shape[0], b.shape[1])
    _each(pool, lambda rows, columns: torch.mm(flat[rows], b[:, columns], out=product[rows, columns]), pieces)
    return product.view(*a.shape[:-1], b.shape[1])


def _linear(pool: Executor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _product(pool, x, weight.t()) if bias is None else None


def _added(pool: Executor, total: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    pieces = _pieces(a, b)
    if len(pieces) < 2:
        return None
    _each(pool, lambda rows, columns: total[rows, columns].addmm_(a[rows], b[:, columns]), pieces)
    return total


_BY_PIECES: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.matmul.default: _product,  # in inference mode
    torch.ops.aten.linear.default: _linear,  # in inference mode
    torch.ops.aten.addmm_.default: _added,
}


def _pieces(a: Tensor, b: Tensor) -> list[tuple[slice, slice]]:
    """The rows and columns of a @ b that are made at once."""
    (rows, inner), columns = a.shape, b.shape[1]
    length, other = max(rows, columns), min(rows, columns)
    step = -(-PIECE // max(1, inner * other) // ALIGNED) * ALIGNED
    cuts = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    return [(cut, slice(None)) if rows >= columns else (slice(None), cut) for cut in cuts]


def _each(pool: Executor, do: Callable[[slice, slice], Tensor], pieces: list[tuple[slice, slice]]) -> None:
    def work(piece: tuple[slice, slice]) -> None:
        with torch.inference_mode():  # each thread has a mode of its own, as in all of autograd
            do(*piece)

    for _ in pool.map(work, pieces):
        pass
