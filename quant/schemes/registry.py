"""Every scheme dgq knows, by the name that recipes, dgq.json and plans use."""

from __future__ import annotations

from dgq.quant.schemes.dense import BF16, F16, F32
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.schemes.ggml import Q4_K, Q5_0, Q6_K, Q8_0
from dgq.quant.schemes.gguf_guests import guest
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (BF16, F16, F32, Q4_K, Q5_0, Q6_K, Q8_0, NVFP4, NF4, NF4_DQ)
}


def stored_bits(name: str) -> float:
    """Bits a weight of a scheme, or of one of those that dgq only reads (fp8.py, gguf_guests.py)."""
    if name == FP8.name:
        return FP8.bits
    if name in SCHEMES:
        return SCHEMES[name].bits
    found = guest(name.upper())
    assert found is not None
    return found.bits
