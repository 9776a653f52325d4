"""NF4, the 4-bit format of bitsandbytes: 16 values of a normal distribution, times the largest |w| of 64 weights.

    packed   uint8    (…, in / 2)    even column in the HIGH nibble
    absmax   float32  (…, in / 64)   w = NF4[code] * absmax

With double quantisation absmax itself is stored in 8 bits, in blocks of 256 counted over the whole tensor:

    absmax         uint8    (…, in / 64)       absmax = map[code] * nested_absmax[block] + offset
    nested_absmax  float32  (ceil(n / 256),)   n: number of absmax in the tensor
    nested_quant_map float32 (256,)            the "dynamic" 8-bit map: 7 decades, finer where the decade is higher
    nested_offset  float32  ()                 their mean
    row            int32    (…, rows, 1)       not stored: a row's number in the tensor, so that slices find their block

bitsandbytes counts blocks along the flattened tensor; with rows a multiple of 64 long (others are refused) that is
the same as along rows, a fused (E, out, in) weight is each expert alone, and slices of rows quantise to slices of the
bytes. Only the offset, a mean over the whole tensor, ties a weight's rows together.

Source of both algorithms: bitsandbytes 0.50, functional.quantize_4bit and quantize_blockwise on a CPU, whose bytes
these are. Every step is one IEEE operation or a comparison, and the mean is always taken on the CPU with one thread
(its sum depends on the order), so a GPU gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from dgq.quant.schemes.fourbit import count_below, largest, pieces
from dgq.quant.types import GPUForm, Table

BLOCK = 64
NESTED = 256

# Quantiles of the normal distribution (QLoRA, arXiv 2305.14314), as bitsandbytes rounds them.
QUANT_MAP = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
_MIDDLES = (QUANT_MAP[:-1] + QUANT_MAP[1:]) / 2


def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending: 2^i values of either sign in the i-th decade below 1,
    each the middle of its step, and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (steps[:-1] + steps[1:]) / 2
        values += [sign * v for sign in (1, -1) for v in (10 ** (i - 6) * middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _bin_codes() -> torch.Tensor:
    """The code of each of the 65,536 bins that bitsandbytes' CPU code sorts [-1, 1] into; uint8."""
    table = dynamic_map()
    centres = 2 * torch.arange(65536, dtype=torch.float32) / 65535 - 1
    return torch.bucketize(centres, (table[:-1] + table[1:]) * 0.5).to(torch.uint8)


def nest(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantise a whole tensor's absmax (…, rows, in / 64) to 8 bits: the parts "absmax" and "nested_*"."""
    offset = _mean(absmax)
    flat = absmax.flatten() - offset.to(absmax.device)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED)).view(-1, NESTED)
    nested_absmax = blocks.abs().amax(-1, keepdim=True)
    scaled = (blocks * (1.0 / nested_absmax)).clamp(-1, 1)
    # bitsandbytes fuses the last product and sum; for the 2^25 values that can come here that changes no bin
    bins = ((scaled + 1) * 0.5 * 65535 + 0.5).int().clamp(0, 65535)
    codes = _bin_codes().to(absmax.device)[bins]
    codes = torch.where(nested_absmax > 0, codes, 0).flatten()[: len(flat)]
    return {
        "absmax": codes.view(absmax.shape),
        "nested_absmax": nested_absmax.flatten(),
        "nested_quant_map": dynamic_map().to(absmax.device),
        "nested_offset": offset.to(absmax.device),
    }


def _mean(values: torch.Tensor) -> torch.Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.flatten().cpu().mean()
    finally:
        torch.set_num_threads(threads)


def row_numbers(shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """The part "row" of a whole weight (…, rows, in): int32 (…, rows, 1)."""
    lead = shape[:-1]
    return torch.arange(math.prod(lead), dtype=torch.int32, device=device).view(*lead, 1)


class Grid:
    """absmax may be any float32; candidates are bfloat16, which takes one word in the runtime instead of two."""

    block = sub = BLOCK
    factors = (0.76, 0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1)

    def __init__(self, weight: torch.Tensor) -> None:
        self.levels = QUANT_MAP.to(weight.device)

    def open(self, x: torch.Tensor, cost: torch.Tensor) -> None:
        return None

    def scales(
        self, x: torch.Tensor, cost: torch.Tensor, state: None, number: int
    ) -> tuple[torch.Tensor, None, tuple[torch.Tensor, ...]]:
        absmax = x.abs().amax(-1)
        candidates = torch.stack([absmax * factor for factor in self.factors]).bfloat16().float()
        return candidates, None, (candidates,)

    def pack(self, codes: torch.Tensor, notes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"": codes[..., ::2] << 4 | codes[..., 1::2], "absmax": notes[0]}


def codes_and_scales(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """parts of a weight (…, in), nested or not -> codes uint8 (…, in), one a byte, and absmax float32 (…, in / 64)."""
    packed = parts[""]
    scheme = NF4_DQ if "nested_absmax" in parts else NF4
    return torch.stack((packed >> 4, packed & 15), -1).flatten(-2), scheme.absmax(parts)


TABLE = Table(tuple(QUANT_MAP.tolist()), BLOCK, codes_and_scales)


@dataclass(frozen=True)
class NF4Scheme:
    """parts: "" uint8 (…, in/2), "absmax" float32 (…, in/64); with double quantisation as the module says."""

    name: str
    double: bool
    gpu: GPUForm
    in_mix: bool
    block: int = BLOCK
    max_abs: float = 1e30  # the mean of absmax must not overflow
    shared: frozenset[str] = frozenset({"nested_absmax", "nested_quant_map", "nested_offset"})
    whole: bool = False
    ggml: None = None
    grid: type[Grid] = Grid
    searched: bool = True

    @property
    def bits(self) -> float:
        return 4 + ((8 + 32 / NESTED) if self.double else 32) / BLOCK

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """weight (…, in), any float dtype -> parts, on the weight's device. Double quantisation: the whole tensor."""
        if weight.shape[-1] % BLOCK:
            raise ValueError(f"rows of {weight.shape[-1]} are no multiple of {self.name}'s block of {BLOCK}")
        weight = weight.detach() if weight.itemsize < 8 else weight.detach().float()
        absmax = largest(weight, BLOCK)
        factors = (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)
        blocks = weight.reshape(-1, BLOCK)
        codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
        for part in pieces(weight.numel(), BLOCK, weight.device):
            scaled = blocks[part].float() * factors[part]  # beyond -1 and 1 by a rounding at most: the same codes
            pairs = count_below(scaled, _MIDDLES).view(torch.int16)  # little endian: the even column is below
            codes[part] = pairs << 4 | pairs >> 8
        packed = {"": codes.view(*weight.shape[:-1], weight.shape[-1] // 2)}
        if not self.double:
            return packed | {"absmax": absmax}
        return packed | nest(absmax) | {"row": row_numbers(tuple(weight.shape), weight.device)}

    def dequantize(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        codes, absmax = codes_and_scales(parts)
        values = QUANT_MAP.to(codes.device)[codes.int()].unflatten(-1, (-1, BLOCK))
        weight: torch.Tensor = values * absmax.unsqueeze(-1)
        return weight.flatten(-2).to(dtype)

    def absmax(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The blocks' absmax, float32 (…, in / 64)."""
        absmax = parts["absmax"]
        if not self.double:
            return absmax
        along = torch.arange(absmax.shape[-1], dtype=torch.int32, device=absmax.device)
        nested = (parts["row"] * absmax.shape[-1] + along) // NESTED
        value: torch.Tensor = parts["nested_quant_map"][absmax.int()] * parts["nested_absmax"][nested]
        return value + parts["nested_offset"]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        blocks = math.prod(shape) // BLOCK
        nested = blocks + 4 * -(-blocks // NESTED) + 4 * 256 + 4
        return math.prod(shape) // 2 + (nested if self.double else 4 * blocks)


# A maximum is one bfloat16 on the GPU where the weight was bfloat16, and two words elsewhere.
NF4 = NF4Scheme("nf4", double=False, gpu=GPUForm("table", bits=4.25, table=TABLE), in_mix=True)
NF4_DQ = NF4Scheme("nf4_dq", double=True, gpu=GPUForm("table", bits=4.5, table=TABLE), in_mix=False)
