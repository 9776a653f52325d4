"""The routed experts' kernels against decode-then-multiply in float64; on a GPU if there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import block
from torch.nn.functional import gelu

from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.kernels.repack import in_order, tile
from dgq.runtime.model import layers
from dgq.runtime.model.model import Model

moe = pytest.importorskip("dgq.runtime.kernels.moe", reason="needs Triton", exc_type=ImportError)
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter's
LIMIT = 4e-3  # what roundings to bfloat16 leave: the scale's, the weight's, the output's
SCATTER = 1e-3  # of that, where few blocks were rounded
# gate_up's scheme, down's, hidden, inner: rows and columns that fill no tile where the blocks allow it
PAIRS = [
    ("bf16", "bf16", 80, 72),
    ("nvfp4", "nvfp4", 144, 80),
    ("nf4", "nf4", 192, 64),
    ("nf4_dq", "nf4_dq", 64, 64),
    ("q4_k", "q5_0", 256, 96),
    ("q4_k", "q8_0", 256, 32),
    ("q5_0", "q8_0", 96, 96),
    ("q6_k", "q8_0", 256, 64),
    ("iq4_nl", "iq4_nl", 96, 96),
    ("iq4_nl", "q8_0", 32, 32),
    ("f32", "f16", 64, 64),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels do not write is not a number, or far outside."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.dtype.is_floating_point else torch.iinfo(made.dtype).max // 2)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


def packed(scheme: str, *shape: int, seed: int = 0) -> Packed:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5
    weight = weight.bfloat16().to(DEVICE)
    return Packed(SCHEMES[scheme], shape, SCHEMES[scheme].quantize(weight))


def route(kind: str, tokens: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.ones(tokens, experts)
    if kind == "skewed":
        weights /= torch.arange(1, experts + 1) ** 1.5
    chosen = weights.multinomial(k)
    if kind == "one expert":
        chosen.fill_(experts - 2)
    return chosen.to(DEVICE), torch.rand(tokens, k).to(DEVICE) + 0.1


def first_exactly(x: torch.Tensor, gate_up: Packed, expert: int) -> torch.Tensor:
    gate, up = (x.double() @ gate_up[expert].dequantize().double().T).chunk(2, -1)
    return gelu(gate, approximate="tanh") * up


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(gate_up: Packed, down: Packed, tokens: int, k: int, kind: str, limit: float = LIMIT + SCATTER) -> None:
    """Each product on its own, the second with the first's true output; on a GPU also both, twice."""
    experts, _, hidden = gate_up.shape
    x = torch.randn(tokens, hidden).bfloat16().to(DEVICE)
    chosen, share = route(kind, tokens, experts, k)
    tiles = tile(gate_up, gated=True), tile(down, gated=False)
    picks = moe.sort(chosen, experts)
    found = moe.first_product(x, picks, tiles[0])
    inner = torch.zeros(chosen.numel(), down.shape[2], dtype=torch.float64, device=DEVICE)
    total, whole = (torch.zeros(tokens, hidden, dtype=torch.float64, device=DEVICE) for _ in range(2))
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        exact = first_exactly(x[token], gate_up, expert)
        inner[token * k + rank] = exact
        weight = down[expert].dequantize().double()
        whole.index_add_(0, token, share[token, rank, None] * (exact @ weight.T))
        total.index_add_(0, token, share[token, rank, None] * (exact.bfloat16().double() @ weight.T))
    order = picks.order.long()
    assert error(found, in_order(inner[order])) <= limit
    second = moe.second_product(in_order(inner[order].bfloat16()), picks, share, tiles[1])
    assert error(second, total) <= limit
    if not CUDA:
        return
    together = layers.experts(x, chosen, share, *tiles)
    assert together.dtype == torch.bfloat16 and error(together, whole) <= limit * 2**0.5
    assert torch.equal(together, layers.experts(x, chosen, share, *tiles)), "sums depend on the run"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_schemes(pair: tuple[str, str, int, int]) -> None:
    up, down, hidden, inner = pair
    torch.manual_seed(1)
    check(packed(up, 3, 2 * inner, hidden), packed(down, 3, hidden, inner, seed=1), 7, 2, "random")


@pytest.mark.parametrize("kind", ["random", "skewed", "one expert"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (45, 3), (131, 2)])
def test_routing(kind: str, tokens: int, k: int) -> None:
    """No token, some, more than a tile of them; tiles of 32, 64 and 128."""
    torch.manual_seed(2)
    check(packed("nvfp4", 3, 128, 64), packed("nvfp4", 3, 64, 64, seed=1), tokens, k, kind)


@pytest.mark.parametrize("kind", ["random", "skewed", "one expert"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(301, 128, 8), (3, 130, 8), (700, 5, 4)])
def test_picks_are_sorted_and_cut(kind: str, tokens: int, experts: int, k: int) -> None:
    torch.manual_seed(3)
    chosen, _ = route(kind, tokens, experts, k)
    picks = moe.sort(chosen, experts)
    assert torch.equal(picks.order.long(), chosen.flatten().argsort(stable=True))
    expected, start = [], 0
    for expert, count in enumerate(chosen.flatten().bincount(minlength=experts).tolist()):
        firsts = range(start, start + count, picks.block)
        expected += [[expert, first, min(first + picks.block, start + count)] for first in firsts]
        start += count
    found = picks.tile_map.tolist()
    assert found[: len(expected)] == expected
    assert all(expert == -1 for expert, _, _ in found[len(expected) :])


@pytest.mark.parametrize("scheme", ["bf16", "nvfp4", "nf4", "q4_k", "q5_0", "q8_0", "q6_k"])
def test_each_weight(scheme: str) -> None:
    """Unit vectors in, weights out, of all kinds of blocks. Each is within what its scale's rounding explains."""
    columns = 256 if scheme.endswith("k") else 64
    kinds = ("normal", "zero", "constant", "outliers", "zero blocks", "tiny")
    weight = torch.stack([block(kind, 33, columns, torch.Generator().manual_seed(4)) for kind in kinds])
    weight[kinds.index("tiny")] *= 1 if scheme in ("bf16", "nvfp4", "nf4") else 1e26  # what a half holds
    down = Packed(SCHEMES[scheme], tuple(weight.shape), SCHEMES[scheme].quantize(weight.to(DEVICE)))
    if scheme == "nvfp4":  # every scale there is, 0 and subnormal ones too
        codes = torch.arange(132, dtype=torch.uint8, device=DEVICE).view(33, 4)
        down.parts["weight_scale"].view(torch.uint8)[0] = torch.where(codes < 127, codes, 0)
    chosen = torch.arange(len(kinds), device=DEVICE).repeat_interleave(columns)[:, None]
    units = torch.eye(columns, device=DEVICE).bfloat16().repeat(len(kinds), 1)
    picks = moe.sort(chosen, len(kinds))
    found = moe.second_product(in_order(units), picks, torch.ones(len(chosen), 1, device=DEVICE), tile(down, False))
    found = found.view(len(kinds), columns, -1).transpose(1, 2).double()
    exact = down.dequantize().double()
    largest = exact.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    if scheme in ("bf16", "nvfp4"):
        assert bool(((found - exact).abs() <= exact.abs() * 2**-8).all())
    assert bool(((found - exact).abs() <= largest * 2**-6).all())


@pytest.mark.parametrize(
    ("scheme", "value"),
    [
        ("nvfp4", torch.nan),
        ("nvfp4", -1.0),
        ("nf4", torch.inf),
        ("q4_k", torch.inf),
        ("q8_0", torch.nan),
        ("bf16", torch.inf),
    ],
)
def test_damage_is_found_when_repacking(scheme: str, value: float) -> None:
    """What no quantiser writes as a scale, or as a weight."""
    weight = packed(scheme, 2, 64, 256)
    part = weight.parts[{"nvfp4": "weight_scale", "nf4": "absmax"}.get(scheme, "")]
    (part.view(torch.float16) if scheme[0] == "q" else part)[1, 3, 0] = value
    with pytest.raises(InputError, match=r"layer 7 holds values that are not finite"):
        tile(weight, False, "layer 7")


def test_repacking_adds_no_bytes_but_where_it_says() -> None:
    wanted = {"bf16": 16, "nvfp4": 4.5, "nf4": 4.25, "nf4_dq": 4.5, "q5_0": 5.5, "q8_0": 8.5, "q4_k": 5, "q6_k": 9}
    for scheme, bits in wanted.items():
        tiles = tile(packed(scheme, 2, 128, 256), gated=True)
        small = tiles.factors.nbytes + (tiles.high.nbytes if scheme[:3] == "nf4" else 0)
        assert (tiles.nbytes - small) * 8 == bits * 2 * 128 * 256


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["random", "skewed", "one expert"])
@pytest.mark.parametrize("pair", [p[:2] for p in PAIRS if "q6_k" not in p and "f16" not in p])
def test_real_shapes(pair: tuple[str, str], kind: str) -> None:
    torch.manual_seed(5)
    gate_up, down = packed(pair[0], 128, 1408, 2816), packed(pair[1], 128, 2816, 704, seed=1)
    for tokens in (256, 1, 777):
        single = tokens == 1 and kind == "one expert"  # 704 numbers, of which IQ4_NL's roundings alone make 4.2e-3
        check(gate_up, down, tokens, 8, kind, LIMIT + SCATTER if single else LIMIT)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("scheme", ["bf16", "nvfp4", "nf4", "q8_0"])
def test_tiny_with_and_without_kernels(scheme: str) -> None:
    """Logits of a prompt and a canvas in bfloat16 are as near to float32's with the kernels as without."""
    artifact = open_artifact(TINY)
    weights = dict(artifact.weights)
    for name, weight in weights.items():
        if ".experts." in name:
            values = weight.to(DEVICE).dequantize()
            weights[name] = Packed(SCHEMES[scheme], weight.shape, SCHEMES[scheme].quantize(values))
    generator = torch.Generator().manual_seed(6)
    ids, canvas = (torch.randint(artifact.config.vocab, (2, n), generator=generator).to(DEVICE) for n in (150, 64))

    def logits(dtype: torch.dtype, observe: layers.Observer | None = None) -> torch.Tensor:
        model = Model(artifact.config, weights, DEVICE, dtype, observe=observe)
        cache = model.new_cache(2)
        model.encode(ids, cache)
        return model.decode(canvas, cache).double()

    exact = logits(torch.float32)
    with_kernels = error(logits(torch.bfloat16), exact)
    without = error(logits(torch.bfloat16, lambda _, x, y, *more: y), exact)
    print(scheme, with_kernels, without)
    assert with_kernels <= 1.25 * without
