"""Every scheme that dgq writes, one row each, by the name that recipes, dgq.json and plans use.

A new scheme is a module with a row here, a recipe that uses it, a line in recipes/guides/ and a reference for its
bytes in tests/unit/test_registry.py, which walks this table and names whatever is missing.
"""

from __future__ import annotations

from dgq.quant.schemes.dense import BF16, F16, F32
from dgq.quant.schemes.fp4 import FP4
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.schemes.ggml.iq4_nl import IQ4_NL
from dgq.quant.schemes.ggml.q4_k import Q4_K
from dgq.quant.schemes.ggml.q5_0 import Q5_0
from dgq.quant.schemes.ggml.q5_k import Q5_K
from dgq.quant.schemes.ggml.q6_k import Q6_K
from dgq.quant.schemes.ggml.q8_0 import Q8_0
from dgq.quant.schemes.gguf_guests import guest
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import Scheme

_ROWS: tuple[Scheme, ...] = (
    BF16,
    F16,
    F32,
    Q4_K,
    Q5_0,
    Q5_K,
    Q6_K,
    Q8_0,
    IQ4_NL,
    NVFP4,
    NF4,
    NF4_DQ,
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def stored_bits(name: str) -> float:
    """Bits a weight of a scheme, or of one of those that dgq only reads (fp8.py, fp4.py, gguf_guests.py)."""
    for read in (FP8, FP4):
        if name == read.name:
            return read.bits
    if name in SCHEMES:
        return SCHEMES[name].bits
    reader = guest(name.upper())
    assert reader is not None
    return reader.bits
