"""Repacked weights decoded by the kernels, interpreted: every value that a 4-bit scheme can hold."""

from __future__ import annotations

import pytest
import torch

from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import natural_order, pair_words, tile

dense = pytest.importorskip("dgq.runtime.kernels.dense", reason="needs Triton", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # OCP's microscaling formats, table 5


def test_each_code_of_nvfp4_with_each_scale_is_exact() -> None:
    """A tile has 512 blocks of 16. Each holds the 16 codes; each positive E4M3 scale that is a number has its own."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randperm(16, generator=generator) for _ in range(512)]).view(1, 128, 64)
    scales = (torch.arange(512) % 127).to(torch.uint8).view(1, 128, 4).view(torch.float8_e4m3fn)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    parts = {"": packed, "weight_scale": scales, "weight_scale_2": torch.full((1, 1, 1), 2.0**-7)}
    weight = Packed(SCHEMES["nvfp4"], (1, 128, 64), {name: part.to(DEVICE) for name, part in parts.items()})
    exact = torch.cat((E2M1, -E2M1))[codes] * scales.float().repeat_interleave(16, -1) * 2.0**-7
    found = natural_order(dense.decoded(tile(weight, gated=False)), 64).cpu()
    assert torch.equal(found, exact[0].bfloat16()) and torch.equal(found.float(), exact[0])


@pytest.mark.parametrize("scheme", ["nf4", "iq4_nl"])
def test_pairs_are_two_values_of_the_table(scheme: str) -> None:
    table = SCHEMES[scheme].gpu.table
    assert table is not None
    pairs = pair_words(table.values)
    low, high = ((pairs << shift & -0x10000).view(torch.float32) for shift in (16, 0))  # a bfloat16 is a float32's half
    byte, rounded = torch.arange(256), torch.tensor(table.values).bfloat16().float()
    assert torch.equal(low, rounded[byte & 15]) and torch.equal(high, rounded[byte >> 4])
