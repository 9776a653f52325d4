"""RAM that a conversion without STATS takes on the CPU, counted from the slices that threads work on at once.

RAM_BASE                    Python with torch: measured
ram_element x elements      of the largest slices, one a thread: as read, encoded, waiting to be written, and for
                            ggml's quantisers in float32: measured
"""

from __future__ import annotations

from dgq.convert.plans.plan import Plan
from dgq.convert.write.slices import rows_at_once

RAM_BASE = 320 << 20


def converting_ram(plan: Plan, threads: int) -> int:
    """Bytes at the peak, with so many threads."""
    slices: list[int] = []
    for tensor in plan.weights:
        row = tensor.numel // tensor.shape[0] if tensor.shape else 1
        size = rows_at_once(tensor, "cpu") * row
        slices += [size] * min(threads, -(-tensor.numel // size))
    return RAM_BASE + plan.format.ram_element * sum(sorted(slices)[-threads:])


def slices_ram(plan: Plan) -> tuple[int, int]:
    """Bytes in any case, and for each thread at most."""
    return RAM_BASE, converting_ram(plan, 1) - RAM_BASE
