"""Products with the weights that every token goes through, by Triton kernels: attention, MLPs, embedding and head.

    Linear   weights that share their input, side by side: one launch for each scheme among them
    Gated    gate and up of an MLP
    Table    the embedding as ggml stores it: row lookup, and both vocabulary products, piece by piece

Weights of 16 bits stay as they are and are multiplied by cuBLAS. Packed weights are repack.py's tiles. Their products
read x with its columns in the order of repack.in_order(), which fused.py's functions write if they are asked to;
otherwise x is copied into that order here. For more than MANY tokens a packed weight is decoded as a whole and then
multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional

from dgq.quant.schemes.nf4 import NF4, NF4Scheme
from dgq.quant.types import Packed
from dgq.runtime.kernels import dense_kernels
from dgq.runtime.kernels.repack import COLUMNS, ROWS, Tiles, in_order, natural_order, tile

MANY = 1024  # tokens
PIECE = 16384  # rows of a table decoded at a time
_ADDED = 1024


@dataclass(frozen=True)
class Linear:
    """One or more weights side by side: the rows of each part are the next columns of the product.

    parts: bfloat16 (rows, columns), or tiles with a factor for each row tile. shape: (rows, columns) of all parts.
    """

    parts: tuple[Tensor | Tiles, ...]
    shape: tuple[int, int]

    @property
    def packed(self) -> bool:
        """Whether the weights are tiles, whose product reads its input in the order of repack.in_order()."""
        return isinstance(self.parts[0], Tiles)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Gated:
    """A gate and an up, both (inner, columns): tiles in which their rows alternate, or both side by side."""

    both: Tiles | Linear
    inner: int

    @property
    def packed(self) -> bool:
        return isinstance(self.both, Tiles) or self.both.packed

    @property
    def nbytes(self) -> int:
        return self.both.nbytes


def pack(weights: Sequence[Packed], name: str = "the weight") -> Linear:
    """Join weights (rows, columns) of equal columns into one product, on their device. Either all of them have 16 or 32
    bits, or none has. InputError naming `name` for values that are not finite."""
    parts: list[Tensor | Tiles] = []
    for weight in weights:
        part = _part(weight, name)
        last = parts[-1] if parts else None
        if isinstance(part, Tiles) and isinstance(last, Tiles) and _may_join(last, part):
            parts[-1] = _joined(last, part)
        elif isinstance(part, Tensor) and isinstance(last, Tensor):
            parts[-1] = torch.cat((last, part))
        else:
            parts.append(part)
    assert len({isinstance(part, Tiles) for part in parts}) == 1, f"{name}: some packed, some not"
    return Linear(tuple(parts), (sum(weight.shape[0] for weight in weights), weights[0].shape[1]))


def pack_gated(gate: Packed, up: Packed, name: str = "the weight") -> Gated:
    """Join a gate and an up, both (inner, columns), into one product. InputError as for pack()."""
    joined = None if _is_plain(gate) else _stacked(gate, up)
    if joined is None:
        return Gated(pack((gate, up), name), gate.shape[0])
    return Gated(_by_row_tile(tile(_one(joined), True, name)), gate.shape[0])


def linear(x: Tensor, weight: Linear, ordered: bool = False, out: Tensor | None = None) -> Tensor:
    """x bfloat16 (n, columns) @ weight^T -> (n, rows). ordered: x (n, columns up to whole tiles) already is in the
    order of repack.in_order(); for packed weights only."""
    if isinstance(weight.parts[0], Tensor):
        assert not ordered
        return functional.linear(x, weight.parts[0]) if out is None else torch.mm(x, weight.parts[0].T, out=out)
    x = x if ordered else in_order(x)
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    first = 0
    for part in weight.parts:
        assert isinstance(part, Tiles)
        rows = part.shape[1]
        _product(x, part, out[:, first : first + rows], gated=False)
        first += rows
    return out


def gated_mlp(x: Tensor, gate_up: Gated, down: Linear, ordered: bool = False, out: Tensor | None = None) -> Tensor:
    """down(gelu(gate x) * up x), x as linear() takes it for the gate's weight."""
    if isinstance(gate_up.both, Tiles):
        x = x if ordered else in_order(x)
        wide = gate_up.inner + -gate_up.inner % COLUMNS
        inner = torch.empty(len(x), wide, dtype=x.dtype, device=x.device)
        _product(x, gate_up.both, inner, gated=True)
        return linear(inner if down.packed else natural_order(inner, gate_up.inner), down, down.packed, out)
    return linear(gated(linear(x, gate_up.both, ordered)), down, False, out)


def gated(both: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu_tanh(gate) * up of both (n, 2 * inner) bfloat16, the gates first -> (n, inner)."""
    rows, inner = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, inner, dtype=both.dtype, device=both.device) if out is None else out
    grid = rows, triton.cdiv(inner, _ADDED)
    dense_kernels.gated[grid](both, out, both.stride(0), inner, BLOCK=_ADDED)
    return out


def decoded(weight: Tiles, gated: bool = False) -> Tensor:
    """The weight in bfloat16 (rows, columns up to whole tiles), its columns in the order of repack.in_order(). A gated
    weight: the gate's rows and then the up's, both up to whole tiles and in that order too."""
    row_tiles, column_tiles = weight.codes.shape[1:3]
    rows = row_tiles * ROWS if gated else weight.shape[1]
    out = torch.empty(rows, column_tiles * COLUMNS, dtype=torch.bfloat16, device=weight.codes.device)
    dense_kernels.unpack[(row_tiles, column_tiles)](
        out, weight.codes, weight.scales, weight.high, weight.factors, rows, column_tiles, rows // 2,
        SCHEME=weight.form, GATED=gated, num_warps=4,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Cut:
    """How a product is cut into programs: tokens of each, splits of the columns, stages of loads."""

    tokens: int
    splits: int
    stages: int


def cut_for(tokens: int, weight: Tiles) -> Cut:
    """The fastest cut, as measured on Hopper. Tables are bound by their permute instructions, so that more tokens
    should share a decoded weight; before Hopper the sums of so many tokens do not fit a thread's registers."""
    row_tiles, column_tiles = weight.codes.shape[1:3]
    device = weight.codes.device
    wide = (
        weight.form.startswith("table") and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    )
    power: int = triton.next_power_of_2(tokens)
    block = min(128 if wide else 64, max(16, power))
    programs = row_tiles * triton.cdiv(tokens, block)
    splits = max(1, min(4, column_tiles // 8, 2 * _processors(device) // programs))
    return Cut(block, splits, 3 if wide else 4)


def _product(x: Tensor, weight: Tiles, out: Tensor, gated: bool, cut: Cut | None = None) -> None:
    tokens, (row_tiles, column_tiles) = len(x), weight.codes.shape[1:3]
    if tokens > MANY and cut is None:
        whole = decoded(weight, gated)
        if gated:
            dense = functional.linear(x, whole)
            dense_kernels.gated[(tokens, triton.cdiv(out.shape[1], _ADDED))](
                dense, out, dense.stride(0), out.shape[1], BLOCK=_ADDED
            )
        else:
            out.copy_(functional.linear(x, whole))
        return
    cut = cut_for(tokens, weight) if cut is None else cut
    parts = out
    if cut.splits > 1:
        parts = torch.empty(cut.splits, tokens, row_tiles * ROWS, dtype=torch.float32, device=x.device)
    dense_kernels.product[(triton.cdiv(tokens, cut.tokens), row_tiles, cut.splits)](
        x, parts, weight.codes, weight.scales, weight.high, weight.factors, x.stride(0), parts.stride(-2),
        parts.stride(0), out.shape[1], tokens, column_tiles,
        SCHEME=weight.form, GATED=gated, SPLIT=cut.splits > 1, BLOCK_N=cut.tokens, STAGES=cut.stages,
        num_warps=4,
    )  # fmt: skip
    if cut.splits > 1:
        dense_kernels.add[(tokens, triton.cdiv(out.shape[1], _ADDED))](
            parts, out, parts.stride(1), parts.stride(0), out.stride(0), out.shape[1], cut.splits, GATED=gated,
            BLOCK=_ADDED,
        )  # fmt: skip


@dataclass(frozen=True)
class Table:
    """An embedding (vocab, hidden) in Q6_K or Q8_0, as ggml stores it: uint8 (vocab, bytes of a row)."""

    scheme: str
    shape: tuple[int, int]
    blocks: Tensor

    @classmethod
    def of(cls, weight: Packed) -> Table:
        assert weight.scheme.gpu.embedding
        rows, columns = weight.shape
        return cls(weight.scheme.name, (rows, columns), weight.parts[""].contiguous())

    def rows(self, ids: Tensor, factor: float = 0.0, out: Tensor | None = None) -> Tensor:
        """Rows ids (n,) as Packed.dequantize() decodes them, bfloat16 (n, hidden); times factor unless that is 0."""
        return self._decode(ids, 0, len(ids), factor, out)

    def head(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits: x bfloat16 (n, hidden) @ table^T -> bfloat16 (n, vocab), not capped."""
        vocab = self.shape[0]
        out = torch.empty(len(x), vocab, dtype=x.dtype, device=x.device) if out is None else out
        for first, piece in self._pieces():
            out[:, first : first + len(piece)] = functional.linear(x, piece)
        return out

    def soft_embed(self, probabilities: Tensor, out: Tensor | None = None) -> Tensor:
        """See fused.soft_embed(); the products with the table's pieces are summed in float32."""
        total = torch.zeros(len(probabilities), self.shape[1], dtype=torch.float32, device=probabilities.device)
        for first, piece in self._pieces():
            some = probabilities[:, first : first + len(piece)]
            if some.is_cuda:
                total += torch.mm(some, piece, out_dtype=torch.float32)
            else:
                total += some.float() @ piece.float()
        return total.to(probabilities.dtype) if out is None else out.copy_(total)

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each piece, and its rows, which are decoded into the same memory every time."""
        rows, columns = self.shape
        room = torch.empty(min(PIECE, rows), columns, dtype=torch.bfloat16, device=self.blocks.device)
        for first in range(0, rows, PIECE):
            yield first, self._decode(None, first, min(PIECE, rows - first), 0.0, room[: rows - first])

    def _decode(self, ids: Tensor | None, first: int, count: int, factor: float, out: Tensor | None) -> Tensor:
        columns = self.shape[1]
        out = torch.empty(count, columns, dtype=torch.bfloat16, device=self.blocks.device) if out is None else out
        block = min(1024, triton.next_power_of_2(columns))
        dense_kernels.table_rows[(count, triton.cdiv(columns, block))](
            ids, self.blocks, self.blocks.view(torch.float16), out, first, columns, self.blocks.shape[1], factor,
            SCHEME=self.scheme, BLOCK=block,
        )  # fmt: skip
        return out


def _is_plain(weight: Packed) -> bool:
    """Whether it goes to cuBLAS in bfloat16, by its scheme's decision."""
    return weight.scheme.gpu.tiles == "bf16"


def _part(weight: Packed, name: str) -> Tensor | Tiles:
    if _is_plain(weight):
        return weight.dequantize(torch.bfloat16)
    return _by_row_tile(tile(_one(weight), False, name))


def _one(weight: Packed) -> Packed:
    """The weight as a stack of one expert, which tile() takes."""
    weight = _single_scales(weight)
    parts = {key: part[None] for key, part in weight.parts.items() if key != "input_scale"}
    return Packed(weight.scheme, (1, *weight.shape), parts)


def _stacked(first: Packed, second: Packed) -> Packed | None:
    """second's rows below first's; None if their schemes or their per-tensor scales differ."""
    first, second = _single_scales(first), _single_scales(second)
    whole = [weight.parts.get("weight_scale_2") for weight in (first, second)]
    if first.scheme.name != second.scheme.name:
        return None
    if whole[0] is not None and whole[1] is not None and not torch.equal(whole[0][0], whole[1][0]):
        return None
    parts = {key: torch.cat((part, second.parts[key])) for key, part in first.parts.items() if key != "input_scale"}
    return Packed(first.scheme, (first.shape[0] + second.shape[0], first.shape[1]), parts)


def _single_scales(weight: Packed) -> Packed:
    """The weight without double quantisation, whose blocks of scales span rows."""
    if not isinstance(weight.scheme, NF4Scheme):
        return weight
    return Packed(NF4, weight.shape, {"": weight.parts[""], "absmax": weight.scheme.absmax(weight.parts)})


def _by_row_tile(tiles: Tiles) -> Tiles:
    factors = tiles.factors.expand(tiles.codes.shape[1]).contiguous()
    return Tiles(tiles.form, tiles.shape, tiles.codes, tiles.scales, tiles.high, factors)


def _may_join(first: Tiles, second: Tiles) -> bool:
    return first.form == second.form and first.shape[1] % ROWS == 0


def _joined(first: Tiles, second: Tiles) -> Tiles:
    """second's rows below first's."""
    shape = 1, first.shape[1] + second.shape[1], first.shape[2]
    high = first.high if first.high.dim() == 2 else torch.cat((first.high, second.high), 1)  # a table is the same
    both = [torch.cat(pair, 1) for pair in ((first.codes, second.codes), (first.scales, second.scales))]
    return Tiles(first.form, shape, both[0], both[1], high, torch.cat((first.factors, second.factors)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
