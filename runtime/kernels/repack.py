"""Routed experts' weights in the order in which moe_kernels.py's threads want them; made once, when a model is loaded.

A weight (E, rows, columns), with zeros up to whole tiles, is cut into tiles of 128 rows and 64 columns. Bits of a
row's and a column's number in its tile, highest first:

    row     m w w n r r r    m: half of the tile; w: warp; n: which of a warp's two times 8 rows; r: row
    column  t t a b h p      t: thread, of a row's four; a, b: matrix instruction; h: its half; p: place in a pair

    codes    4 bits: (m, w, r, t, n, a) words of (p, b, h), of a table (b, h, p); Q5_0's fifth bits: (m, w, r, t) words
             NVFP4's, which are sign and E2M1's three bits: each half's 16 bits as in _NVFP4_PLACES
             8 bits: (m, n, w, r, t, a, b) words of (p, h)
            16 bits: (m, n, a, w, r, t, b, h) words of p
    scales   bfloat16: (m, w, r, t's first bits if it has blocks of its own) words of n; Q4_K: two words, scales and
             rests; tables of blocks of 64: two words, the scale and what its rounding lost, unless that is nothing
             NVFP4: (w, r, t) words of (m, n): E4M3 codes as 8 * (exponent + 10) + mantissa, so that none is subnormal
    factors  float32 (E,): what the expert's products are multiplied with

The gate's and the up's rows alternate by 8, both in the order in which the second product counts its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from dgq.quant.errors import InputError
from dgq.quant.schemes.ggml.blocks import GGMLScheme
from dgq.quant.types import Packed, Table

ROWS, COLUMNS = 128, 64
GROUP_ELEMENTS = 1 << 25  # repacked at a time
_SIZES = {"m": 2, "w": 4, "n": 2, "r": 8, "a": 2, "b": 2, "h": 2, "p": 2}
_CODES = {"bf16": "mnawrtbhp", "q8_0": "mnwrtabph", "q6_k": "mnwrtabph", "table": "mwrtnabhp"}
_FOUR_BITS = "mwrtnapbh"
_NVFP4_PLACES = (15, 8, 7, 6), (12, 5, 4, 3), (14, 2, 1, 0), (13, 11, 10, 9)  # of a half's codes, highest bits first
_OFFSETS = {"q8_0": 128, "q6_k": 32, "q5_0": 16, "q4_k": 0}  # added to a code, so that it has no sign
_CODE_EXPONENT = 133  # a code q is read as the bfloat16 q * 2^-133,
_SCALE_EXPONENT = 104  # so scales, products of a half and at most 7 bits, are taken times 2^104: up to 2^127
_PAIRS = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # of so many bytes each, moved as one
_UNDONE = torch.tensor(2.0 ** (_CODE_EXPONENT - _SCALE_EXPONENT))


@dataclass(frozen=True)
class Tiles:
    """A weight for the kernels. form: how moe_decode.py reads it; shape: (E, rows, columns) before zeros were added.

    codes, scales, high: int32 (E, tiles of rows, tiles of columns, words), of no words where the form has none; high of
    a "table" form is the table, int32 (10, threads): _table_words() and pair_words().
    Of those, "table64" and "table32" have a bfloat16 scale for so many
    columns, and "table64_split" a pair of them, the scale and what its rounding lost.
    """

    form: str
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    high: Tensor
    factors: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.high.nbytes + self.factors.nbytes


def tile(weight: Packed, gated: bool, name: str = "the weight") -> Tiles:
    """weight (E, rows, columns), repacked on its device. gated: its rows are the gate's and then the up's.

    Scales of ggml's schemes are rounded to bfloat16. Q4_K grows to 5 bits a weight, Q6_K to 9, NF4 with double
    quantisation to 4.5; NF4 shrinks to 4.25 where that loses nothing. The scheme's GPUForm decides which tiles it
    becomes. InputError naming the weight if it holds values that are not finite; ValueError for a scheme whose tiles
    nobody makes.
    """
    experts, rows, columns = weight.shape
    gpu = weight.scheme.gpu
    if gpu.tiles not in REPACK:
        raise ValueError(f"{name}: {weight.scheme.name} wants tiles {gpu.tiles!r}, and there are {', '.join(REPACK)}")
    repack = REPACK[gpu.tiles]
    step = max(1, GROUP_ELEMENTS // (rows * columns))
    whole: list[Tensor] = []
    for start in range(0, experts, step):
        parts = repack(weight[start : start + step], gated)
        if not bool(parts[-1].isfinite().all()):
            raise InputError(f"{name} holds values that are not finite; the file is damaged")
        whole = whole or [part.new_empty(experts, *part.shape[1:]) for part in parts]
        for to, part in zip(whole, parts, strict=True):
            to[start : start + step] = part
    if gpu.table is not None:
        return _with_table(gpu.table, weight.shape, whole)
    codes, scales, high, factors = whole
    return Tiles(gpu.tiles, weight.shape, codes, scales, high, factors)


def _with_table(table: Table, shape: tuple[int, ...], parts: list[Tensor]) -> Tiles:
    """Tiles of a table's codes. Where all scales are bfloat16, as bitsandbytes' of a bfloat16 weight are (its largest
    value, exactly), what rounding lost is left out; ggml's halves are rounded, as everywhere here."""
    codes, scales, _, factors = parts
    split = table.group == COLUMNS and bool(scales[..., 1::2].any())
    if not split:
        scales = scales[..., ::2].contiguous()
    form = f"table{table.group}" + ("_split" if split else "")
    return Tiles(form, shape, codes, scales, _table_words(table.values).to(codes.device), factors)


def in_order(x: Tensor) -> Tensor:
    """x (n, columns) with its columns as the matrix instruction counts them, (a, b, h, t, p), and zeros behind."""
    x = pad(x, (0, -x.shape[1] % COLUMNS)).contiguous()
    pairs = x.view(_PAIRS[x.itemsize]).view(len(x), -1, 4, 8)
    return pairs.transpose(2, 3).reshape(len(x), -1).view(x.dtype)


def natural_order(x: Tensor, width: int) -> Tensor:
    """Undo in_order(): bfloat16 x (n, whole tiles) -> its first `width` columns, counted as the model counts them."""
    pairs = x.view(torch.int32).view(len(x), -1, 8, 4)
    return pairs.transpose(2, 3).reshape(len(x), -1).view(x.dtype)[:, :width]


_Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # of Tiles; factors that are not finite where the weight isn't


def _dense(weight: Packed, gated: bool) -> _Parts:
    values = weight.dequantize(torch.bfloat16)
    codes = _words(_arrange(_rows(values, gated), COLUMNS, _CODES["bf16"]))
    return codes, _none(codes), _none(codes), _if_finite(values, torch.ones(len(values), device=values.device))


def _nvfp4(weight: Packed, gated: bool) -> _Parts:
    codes, scales = _nibbles(weight.parts[""]), weight.parts["weight_scale"]
    scale_codes = _scale_codes().to(codes.device)[scales.view(torch.uint8).int()]
    codes = torch.where(scales.view(torch.uint8).repeat_interleave(16, -1) == 0, 0, codes)
    halves = _pack_nibbles(_arrange(_rows(codes, gated), COLUMNS, _FOUR_BITS)).view(torch.int16)
    packed = _nvfp4_halves().to(codes.device)[halves.int() & 0xFFFF].view(torch.int32)
    packed_scales = _words(_arrange(_rows(scale_codes, gated), 4, "wrtmn"))
    factors = weight.parts["weight_scale_2"][:, 0, 0] * 256
    return packed, packed_scales, _none(packed), _if_finite(scales.float().sqrt(), factors)  # nor negative


@cache
def _nvfp4_halves() -> Tensor:
    """Four codes in 16 bits, the first lowest -> their bits at _NVFP4_PLACES, int16."""
    codes = torch.arange(1 << 16)
    places = enumerate(place for code in _NVFP4_PLACES for place in reversed(code))
    return sum(((codes >> bit & 1) << place for bit, place in places), torch.zeros_like(codes)).to(torch.int16)


@cache
def _scale_codes() -> Tensor:
    """E4M3's positive codes -> 8 * (exponent + 10) + mantissa, uint8; 0 for zero."""
    mantissa, exponent = torch.frexp(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    return pad(((exponent + 9) * 8 + (2 * mantissa - 1) * 8).to(torch.uint8)[1:], (1, 129))


def _table(weight: Packed, gated: bool) -> _Parts:
    """Sixteen values by code. Scales are words of two: rounded, and what rounding lost."""
    table = weight.scheme.gpu.table
    assert table is not None
    unpacked, exact = table.codes_and_scales(weight.parts)
    codes = _pack_nibbles(_arrange(_rows(unpacked, gated), COLUMNS, _CODES["table"]))
    rounded = exact.bfloat16()
    per_tile = COLUMNS // table.group
    halves = [_arrange(_rows(half, gated), per_tile, "mwrtn") for half in (rounded, (exact - rounded).bfloat16())]
    return codes, _words(torch.stack(halves, -2)), _none(codes), _if_finite(exact, torch.ones_like(exact[:, 0, 0]))


@cache
def _table_words(values: tuple[float, ...]) -> Tensor:
    """The table in bfloat16: four words of low bytes, four of high ones; once a thread, which keeps it in registers.
    Then its 256 pairs."""
    entries = torch.tensor(values).bfloat16().view(torch.uint8).view(16, 2)
    each = entries.t().contiguous().view(torch.int32).view(8, 1).repeat(1, 128)
    return torch.cat((each, pair_words(values).view(-1, 128)))


def pair_words(values: tuple[float, ...]) -> Tensor:
    """All pairs of a table's 16 values, for pair_table.py: int32 (256,), entry a + 16 * b the bfloat16 bits of
    values[a] and, above them, those of values[b]."""
    bits = torch.tensor(values).bfloat16().view(torch.int16)
    return torch.stack((bits.repeat(16), bits.repeat_interleave(16)), -1).view(torch.int32).flatten()


def _ggml(weight: Packed, gated: bool) -> _Parts:
    assert isinstance(weight.scheme, GGMLScheme)
    name = weight.scheme.gpu.tiles
    integers, scales, minimums = weight.scheme.unpack(weight.parts)
    per_tile = COLUMNS // integers.shape[-1]
    finite = scales if minimums is None else scales + minimums
    factors = _if_finite(finite, _UNDONE.to(scales.device).expand(len(scales)))
    rounded = (scales.bfloat16(),) if minimums is None else _scale_and_rest(integers, scales, minimums)
    powers = 2.0**_SCALE_EXPONENT, 2.0 ** (_SCALE_EXPONENT - _CODE_EXPONENT)
    packed = [
        _arrange(_rows((part * power).squeeze(-1), gated), per_tile, "mwrtn")
        for part, power in zip(rounded, powers, strict=False)
    ]
    words = _words(torch.stack(packed, -2))
    codes = _rows((integers.to(torch.int16) + _OFFSETS[name]).to(torch.uint8).flatten(-2), gated)
    if name in ("q8_0", "q6_k"):
        return _words(_arrange(codes, COLUMNS, _CODES[name])), words, _none(words), factors
    low = _pack_nibbles(_arrange(codes & 15, COLUMNS, _FOUR_BITS))
    high = _pack_bits(_arrange(codes >> 4, COLUMNS, "mwrtpnabh")) if name == "q5_0" else _none(words)
    return low, words, high, factors


def _scale_and_rest(integers: Tensor, scales: Tensor, minimums: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 scale and rest of a block: scale * (q - 8) + rest, rounded, is near scales * q - minimums. Three scales
    are tried, each with the rest that fits best."""
    exact, centred = scales * integers - minimums, integers.float() - 8
    best = scale = rest = torch.full_like(scales, torch.inf)
    for nudge in (0.0, -(2.0**-8), 2.0**-8):
        tried = (scales * (1 + nudge)).bfloat16().float()
        fitting = (exact - tried * centred).mean(-1, keepdim=True).bfloat16().float()
        loss = (torch.addcmul(fitting, tried, centred).bfloat16() - exact).square().sum(-1, keepdim=True)
        better = loss < best
        best, scale, rest = (torch.where(better, *pair) for pair in ((loss, best), (tried, scale), (fitting, rest)))
    return scale.bfloat16(), rest.bfloat16()


REPACK: dict[str, Callable[[Packed, bool], _Parts]] = {"bf16": _dense, "nvfp4": _nvfp4, "table": _table}
REPACK |= dict.fromkeys(_OFFSETS, _ggml)
"""GPUForm.tiles -> what makes them. moe_decode.weights() has a branch for each."""


def _if_finite(values: Tensor, factors: Tensor) -> Tensor:
    """factors (E,), and NaN for experts whose values (E, …) are not all finite."""
    return torch.where(values.flatten(1).isfinite().all(1), factors, torch.nan)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(*like.shape[:3], 0)


def _rows(part: Tensor, gated: bool) -> Tensor:
    """Codes or scales (E, rows, …) with their rows in the kernels' order, zeros added to whole tiles."""
    if not gated:
        return pad(part, (0, 0, 0, -part.shape[1] % ROWS))
    both = part.unflatten(1, (2, -1))
    both = pad(both, (0, 0, 0, -both.shape[2] % COLUMNS))
    order = in_order(torch.arange(both.shape[2], device=part.device)[None])[0]
    whole: Tensor = both[:, :, order].unflatten(2, (-1, 8)).transpose(1, 2).flatten(1, 3)
    return whole


def _arrange(part: Tensor, per_tile: int, axes: str) -> Tensor:
    """part (E, rows, columns), per_tile of its columns to a tile -> (E, R, C, axes…), zeros added to whole tiles."""
    part = pad(part, (0, -part.shape[-1] % per_tile))
    names = "eRmwnrCt" + ("abhp" if per_tile == COLUMNS else "")
    sizes = {"e": len(part), "R": part.shape[1] // ROWS, "C": part.shape[2] // per_tile, "t": min(4, per_tile)}
    return part.view(*((sizes | _SIZES)[axis] for axis in names)).permute(*(names.index(axis) for axis in "eRC" + axes))


def _words(part: Tensor) -> Tensor:
    """(E, R, C, …) of 8 or 16 bits -> int32 (E, R, C, words), little endian."""
    return part.flatten(3).contiguous().view(torch.int32)


def _nibbles(packed: Tensor) -> Tensor:
    """Two codes a byte, the low one first -> uint8, one a byte."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _pack_nibbles(codes: Tensor) -> Tensor:
    codes = codes.flatten(3)
    return _words(codes[..., ::2] | codes[..., 1::2] << 4)


def _pack_bits(bits: Tensor) -> Tensor:
    bits = bits.flatten(3).unflatten(-1, (-1, 8))
    return _words((bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8))
