"""Products with packed dense weights against decode-then-multiply in float64; on a GPU if there is one, else
interpreted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles, in_order
from dgq.runtime.model.layers import embed

dense = pytest.importorskip("dgq.runtime.kernels.dense", reason="needs Triton", exc_type=ImportError)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter's
LIMIT = 4e-3 if CUDA else 5e-3  # small weights: few scales were rounded, and scatter
PACKED = ["nvfp4", "nf4", "nf4_dq", "q4_k", "q5_0", "q6_k", "q8_0", "iq4_nl"]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels do not write is not a number."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


def packed(scheme: str, rows: int, columns: int, seed: int = 0, size: float = 1.0) -> Packed:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size * columns**-0.5
    weight = weight.bfloat16().to(DEVICE)
    return Packed(SCHEMES[scheme], (rows, columns), SCHEMES[scheme].quantize(weight))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().to(DEVICE)


def exactly(x: Tensor, *weights: Packed) -> Tensor:
    return torch.cat([linear(x.double(), weight.dequantize().double()) for weight in weights], -1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def columns_of(scheme: str) -> int:
    return 256 if scheme.endswith("k") else {"nvfp4": 144, "q5_0": 96, "q8_0": 160}.get(scheme, 192)


CUTS = [(scheme, (16, 1, 2)) for scheme in PACKED] + [("nvfp4", (32, 2, 2)), ("q8_0", (16, 3, 2))]


@pytest.mark.parametrize(("scheme", "cut"), CUTS, ids=str)
def test_product(scheme: str, cut: tuple[int, ...]) -> None:
    """Rows and columns that fill no tile, tokens that fill no block, splits with and without columns of their own."""
    torch.manual_seed(1)
    weight = packed(scheme, 203, columns_of(scheme))
    tiles = dense.pack([weight]).parts[0]
    x = normal(21, weight.shape[1])
    out = torch.full((21, 300), torch.nan, device=DEVICE).bfloat16()
    dense._product(in_order(x), tiles, out[:, 50:253], False, dense.Cut(*cut))
    assert error(out[:, 50:253], exactly(x, weight)) <= LIMIT
    assert out[:, :50].isnan().all() and out[:, 253:].isnan().all()


@pytest.mark.parametrize(("scheme", "splits"), [("nvfp4", 1), ("nf4", 2), ("q4_k", 1), ("q6_k", 2)])
def test_gated_product(scheme: str, splits: int) -> None:
    torch.manual_seed(2)
    inner, columns = 72, columns_of(scheme)
    gate, up = packed(scheme, inner, columns, size=2), packed(scheme, inner, columns, 1, size=1 / 8)
    weight = dense.pack_gated(gate, up)
    x = normal(19, columns)
    exact = gelu(exactly(x, gate), approximate="tanh") * exactly(x, up)
    out = torch.full((19, 128), torch.nan, device=DEVICE).bfloat16()
    if scheme == "nvfp4":  # scales for the whole differ: side by side
        assert not isinstance(weight.both, Tiles)
        assert error(dense.gated(dense.linear(x, weight.both)), exact) <= LIMIT * 2
        up = packed(scheme, inner, columns, size=2)
        weight, exact = dense.pack_gated(gate, up), gelu(exactly(x, gate), approximate="tanh") * exactly(x, up)
    assert isinstance(weight.both, Tiles)
    dense._product(in_order(x), weight.both, out, True, dense.Cut(16, splits, 2))
    assert error(out, in_order(exact)) <= LIMIT * 1.3  # a product of two


@pytest.mark.parametrize("schemes", [("bf16", "f32"), ("q4_k", "q4_k", "q6_k"), ("nvfp4",) * 3, ("nf4", "nf4_dq")])
def test_weights_side_by_side(schemes: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    columns = max(columns_of(scheme) for scheme in schemes)
    sizes = [(scheme, rows, columns, i, 3.0**i) for i, (scheme, rows) in enumerate(zip(schemes, (128, 128, 40)))]  # noqa: B905
    weights = [packed(*size) for size in sizes]
    weight = dense.pack(weights)
    x = normal(7, columns)
    assert weight.packed == (schemes[0] != "bf16")
    expected = exactly(x, *weights)
    assert weight.shape == (expected.shape[1], columns)
    out = torch.full(expected.shape, torch.nan, device=DEVICE).bfloat16()
    ordered = weight.packed
    for found in (dense.linear(x, weight), dense.linear(in_order(x) if ordered else x, weight, ordered, out)):
        for mine, exact in zip(found.split([size[1] for size in sizes], -1), expected.split([s[1] for s in sizes], -1)):  # noqa: B905
            assert error(mine, exact) <= LIMIT


MLPS = [
    ("bf16",) * 3,
    ("nvfp4",) * 3,
    ("q4_k", "q4_k", "q8_0"),
    ("nf4_dq",) * 3,
    ("q4_k", "q6_k", "bf16"),
    ("q8_0", "q8_0", "bf16"),
]


@pytest.mark.parametrize("schemes", MLPS)
def test_mlp(schemes: tuple[str, ...]) -> None:
    torch.manual_seed(4)
    hidden, inner = 256, 64 if schemes[0] == "nf4_dq" else 96
    gate, up = packed(schemes[0], inner, hidden), packed(schemes[1], inner, hidden, 1)
    down = packed(schemes[2], hidden, inner, 2)
    x = normal(9, hidden)
    exact = gelu(exactly(x, gate), approximate="tanh") * exactly(x, up)
    weights = dense.pack_gated(gate, up), dense.pack([down])
    found = dense.gated_mlp(x, *weights)
    assert error(found, exactly(exact, down)) <= LIMIT * 2**0.5
    if weights[0].packed:
        assert torch.equal(found, dense.gated_mlp(in_order(x), *weights, ordered=True))


@pytest.mark.parametrize("scheme", PACKED if CUDA else ["nvfp4", "q8_0"])
def test_many_tokens(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded as a whole, then multiplied."""
    torch.manual_seed(5)
    monkeypatch.setattr(dense, "MANY", 4)
    columns = columns_of(scheme)
    gate, other = packed(scheme, 72, columns), packed(scheme, 203, columns, 2)
    up = gate[torch.arange(71, -1, -1, device=DEVICE)]  # the same scale for the whole
    x = normal(9, columns)
    assert error(dense.linear(x, dense.pack([other])), exactly(x, other)) <= LIMIT
    weight = dense.pack_gated(gate, up)
    out = torch.full((9, 128), torch.nan, device=DEVICE).bfloat16()
    dense._product(in_order(x), weight.both, out, True)
    exact = gelu(exactly(x, gate), approximate="tanh") * exactly(x, up)
    assert error(out, in_order(exact)) <= LIMIT * 1.5
    assert error(dense.decoded(dense.pack([other]).parts[0]), in_order(other.dequantize())) <= LIMIT


def test_damage_is_found_when_repacking() -> None:
    weight = packed("q8_0", 64, 256)
    weight.parts[""].view(torch.float16)[3, 0] = torch.inf
    with pytest.raises(InputError, match=r"layer 7 holds values that are not finite"):
        dense.pack([weight], "layer 7")


TABLES = [("q6_k", 70, 512), ("q8_0", 70, 160)] + ([("q6_k", 262144, 2816), ("q8_0", 262144, 2816)] if CUDA else [])


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_table(table: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows to the bit; both products."""
    torch.manual_seed(6)
    _, vocab, hidden = table
    weight = packed(*table)
    if vocab < 1000:
        monkeypatch.setattr(dense, "PIECE", 32)
    found = dense.Table.of(weight)
    ids = torch.randint(vocab, (256 if CUDA else 11,), device=DEVICE)
    ids[:2] = torch.tensor([0, vocab - 1])
    assert torch.equal(found.rows(ids), weight[ids].dequantize(torch.bfloat16))
    factor = float(torch.tensor(hidden**0.5).bfloat16())
    assert torch.equal(found.rows(ids, factor), embed(ids, weight, torch.bfloat16))
    x, shares = normal(5, hidden), torch.rand(5, vocab, device=DEVICE).pow(8).bfloat16()
    assert error(found.head(x), exactly(x, weight)) <= LIMIT
    exact = shares.double() @ weight.dequantize().double()
    assert error(found.soft_embed(shares), exact) <= LIMIT
    out = torch.full((5, hidden), torch.nan, device=DEVICE).bfloat16()
    assert found.soft_embed(shares, out) is out and error(out, exact) <= LIMIT


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("scheme", ["nvfp4", "nf4", "nf4_dq", "q4_k", "q6_k", "q8_0"])
def test_real_shapes(scheme: str) -> None:
    torch.manual_seed(7)
    q, k, v = packed(scheme, 4096, 2816), packed(scheme, 2048, 2816, 1), packed(scheme, 2048, 2816, 2)
    gate, up, down = packed(scheme, 2112, 2816), packed(scheme, 2112, 2816), packed("q8_0", 2816, 2112, 2)
    qkv, gate_up, narrow = dense.pack([q, k, v]), dense.pack_gated(gate, up), dense.pack([down])
    for tokens in (256, 1, 777, 1500):
        x = normal(tokens, 2816)
        found = dense.linear(x, qkv)
        assert error(found, exactly(x, q, k, v)) <= LIMIT
        assert torch.equal(found, dense.linear(x, qkv)), "sums depend on the run"
        exact = gelu(exactly(x, gate), approximate="tanh") * exactly(x, up)
        assert error(dense.gated_mlp(x, gate_up, narrow), exactly(exact, down)) <= LIMIT * 2**0.5


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_no_product_runs_on_while_its_registers_are_used_again() -> None:
    """Wrong sums of Q4_K were seen with more programs than fit the GPU at once; see moe_kernels.settled."""
    torch.manual_seed(8)
    weight = packed("q4_k", 8192, 2816)
    tiles, x = dense.pack([weight]).parts[0], normal(2000, 2816)
    exact = exactly(x, weight)
    for _ in range(3):
        out = torch.full(exact.shape, torch.nan, device=DEVICE).bfloat16()
        dense._product(in_order(x), tiles, out, False, dense.Cut(64, 1, 4))
        assert error(out, exact) <= LIMIT
    compiled = dense.dense_kernels.product.device_caches[torch.cuda.current_device()][0].values()
    pending = [kernel for kernel in compiled if re.search("warp_group_dot_wait.*pendings = [1-9]", kernel.asm["ttgir"])]
    assert compiled and not pending
