"""The torch encoders against ggml's C, byte for byte: every kind of block, every kind of importance, many scales.

On the CPU `scheme.quantize` is the C library, `encode` the torch code that runs on other devices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_schemes import SCHEMES, WEIGHTS
from torch.utils._python_dispatch import TorchDispatchMode

from dgq.quant.schemes.ggml import blocks, on_device
from dgq.quant.schemes.ggml.blocks import GGMLScheme
from dgq.quant.schemes.ggml.on_device import encode_on_device
from dgq.quant.schemes.ggml.q4_k import Q4_K
from dgq.quant.schemes.ggml.q5_0 import Q5_0
from dgq.quant.schemes.ggml.q6_k import Q6_K
from dgq.quant.schemes.ggml.q8_0 import Q8_0
from dgq.quant.schemes.ggml.search import nearest_int, signed_max, square_root, sum_positions


def encode(scheme: GGMLScheme, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return encode_on_device(scheme.encode, scheme.block, weight, importance)


EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
ROWS, COLUMNS = 12, 768
IMPORTANCES = ("none", "random", "heavy-tailed", "zeros", "mostly zeros", "all zeros", "constant", "tiny", "large")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")))
CHECKED = {
    "q4_k": 1 << 20,
    "q5_0": 1 << 22,
    "q5_k": 1 << 20,
    "q6_k": 1 << 21,
    "q8_0": 1 << 22,
    "iq4_nl": 1 << 21,
}  # weights a test of random blocks on a GPU; an eighth on a CPU


def _more_weights() -> dict[str, torch.Tensor]:
    """Blocks where one rounding decides, or where the search leaves the ordinary; each (12, 768) float32."""
    g = torch.Generator().manual_seed(11)
    shape = (ROWS, COLUMNS)
    normal, uniform = torch.randn(shape, generator=g), torch.rand(shape, generator=g)

    def steps(size: int) -> torch.Tensor:
        return torch.rand(ROWS, COLUMNS // size, 1, generator=g).expand(-1, -1, size).reshape(shape)

    single = torch.zeros(shape)
    single[:, 5::32] = torch.randn(ROWS, COLUMNS // 32, generator=g)
    ones, ties = torch.ones(shape), torch.zeros(shape)
    ties[:, ::256] = 2 * torch.randint(1024, 2048, (ROWS, 3), generator=g) + 1.0  # d = this / 4096 ties in a half
    return {
        "all negative": -normal.abs(),
        "far below zero": normal * 1e-3 - 1,
        "far above zero": normal * 1e-2 + 1,
        "one and its neighbour": 1 + (uniform < 0.2) * 1.2e-7,
        "two values": torch.where(uniform < 0.5, steps(32), -steps(16)),
        "single": single,
        "scales that tie": ties,
        "single outlier": torch.where(uniform < 0.02, 1e3, 1e-2) * normal,
        "whole numbers": torch.randint(-16, 16, shape, generator=g).float(),
        "0 to 15": torch.randint(0, 16, shape, generator=g).float(),
        "halves": torch.randint(-127, 128, shape, generator=g) / 2,
        "halves of 127": torch.where(uniform < 0.1, 127 * ones, torch.randint(-126, 126, shape, generator=g) + 0.5),
        "signs": normal.sign() * (uniform < 0.6),
        "minus zero": torch.where(steps(32) < 0.7, -0.0, normal),
        "ramp": torch.linspace(-1, 1, 32).repeat(ROWS, COLUMNS // 32) * steps(32),
        "scales apart": normal * torch.exp(-30 * steps(32)),
        "wide": torch.exp(8 * normal) * (uniform - 0.5).sign() * 1e-2,
        "wide bf16": (torch.exp(3 * normal) * (uniform - 0.5).sign()).bfloat16().float(),
        "nearly subnormal": normal * 1e-37,
        "overflowing range": (uniform * 2 - 1) * 3.4e38,
        "below the smallest scale": normal * 1e-5 * steps(256) ** 4,
        "at GROUP_MAX_EPS": normal.sign() * 1e-15 * (1 + (uniform - 0.5) * 1e-6),
    }


ALL = {**WEIGHTS, **_more_weights()}


def _importance(kind: str, columns: int) -> torch.Tensor | None:
    g = torch.Generator().manual_seed(2)
    random, other = torch.rand(columns, generator=g), torch.rand(columns, generator=g)
    kinds = {
        "none": None,
        "random": random + 1e-3,
        "heavy-tailed": random**8 + 1e-8,
        "zeros": random * (other < 0.5),
        "mostly zeros": random * (other < 0.05),
        "all zeros": random * 0,
        "constant": torch.full((columns,), 0.3),
        "tiny": random * 1e-40,
        "large": random * 1e20,
    }
    return kinds[kind]


def _wrong_blocks(
    scheme: GGMLScheme, weight: torch.Tensor, importance: torch.Tensor | None, device: str
) -> torch.Tensor:
    """Which blocks of (rows, in) differ from C's: (rows, blocks) bool."""
    right = scheme.quantize(weight, importance)[""]
    ours = encode(scheme, weight.to(device), importance)
    assert ours.device.type == device and ours.dtype == torch.uint8 and ours.shape == right.shape
    wrong: torch.Tensor = (ours.cpu() != right).unflatten(-1, (-1, scheme.block_bytes))
    return wrong.any(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("importance", IMPORTANCES)
@EVERY_SCHEME
def test_every_kind_of_block(scheme: GGMLScheme, importance: str, device: str) -> None:
    weights = torch.cat(list(ALL.values()))
    wrong = _wrong_blocks(scheme, weights, _importance(importance, COLUMNS), device)
    per_kind = zip(ALL, wrong.view(len(ALL), -1).sum(1).tolist(), strict=True)
    assert {kind: count for kind, count in per_kind if count} == {}


class _LikeCuda(TorchDispatchMode):
    """The CPU with CUDA's NaN; and what CUDA would compute otherwise is refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            divisor = torch.as_tensor(args[1], dtype=getattr(args[1], "dtype", torch.float64))
            if divisor.dim() == 0 and divisor.dtype in (torch.float64, torch.int64):  # a Python number
                assert abs(math.frexp(float(divisor))[0]) == 0.5, "CUDA multiplies by its reciprocal"
        assert func.overloadpacket is not torch.ops.aten.reciprocal, "a number / a tensor rounds twice"
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.int32:
            assert bool((args[0].double().abs() < 2.0**31).all()), "a cast that x86 and CUDA do differently"
        result = func(*args, **kwargs)
        copied = func is not torch.ops.aten._to_copy.default  # where, cat and views of halves move bits
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if not isinstance(tensor, torch.Tensor) or not bool(tensor.isnan().any()):
                continue
            if tensor.dtype == torch.float32:
                tensor.view(torch.int32).masked_fill_(tensor.isnan(), 0x7FFFFFFF)
            elif tensor.dtype == torch.float16 and not copied:
                tensor.view(torch.int16).masked_fill_(tensor.isnan(), 0x7FFF)
        return result


@pytest.mark.parametrize("importance", ("none", "random", "zeros"))
@EVERY_SCHEME
def test_nothing_hangs_on_cudas_habits(scheme: GGMLScheme, importance: str) -> None:
    weights, weigher = torch.cat([kind[:4] for kind in ALL.values()]), _importance(importance, COLUMNS)
    with _LikeCuda():  # type: ignore[no-untyped-call]
        ours = encode(scheme, weights, weigher)
    assert torch.equal(ours, scheme.quantize(weights, weigher)[""])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("importance", ("none", "heavy-tailed", "zeros"))
@EVERY_SCHEME
def test_random_blocks_of_every_scale(scheme: GGMLScheme, importance: str, device: str) -> None:
    """Rows of weights from 1e-30 to 1e4, a third of them rounded to bf16."""
    g = torch.Generator().manual_seed(scheme.block + len(importance))
    rows = CHECKED[scheme.name] // 2048 // (8 if device == "cpu" else 1)
    weight = torch.randn(rows, 2048, generator=g)
    weight[::4] /= torch.rand(rows // 4, 2048, generator=g).clamp(min=1e-3).sqrt()
    weight *= 10 ** torch.empty(rows, 1).uniform_(-6, 4, generator=g)
    weight[::8] *= 10 ** torch.empty(rows // 8, 1).uniform_(-28, 0, generator=g)
    weight[::3] = weight[::3].bfloat16().float()
    assert int(_wrong_blocks(scheme, weight, _importance(importance, 2048), device).sum()) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_q4_k_where_hardly_a_column_counts(seed: int, device: str) -> None:
    """Fits through one or two weighted points: scales below zero, which C wraps to bytes, and min next to max."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.cat((-torch.randn(256, 1024, generator=g).abs(), torch.randint(0, 16, (256, 1024), generator=g)))
    importance = torch.rand(1024, generator=g) * (torch.rand(1024, generator=g) < 0.05)
    assert int(_wrong_blocks(Q4_K, weight, importance, device).sum()) == 0


@EVERY_SCHEME
def test_pieces_do_not_show(scheme: GGMLScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    importance = _importance("random", COLUMNS)
    whole = encode(scheme, WEIGHTS["normal"], importance)
    monkeypatch.setitem(on_device._PIECE, "cpu", 5 * COLUMNS)
    assert torch.equal(encode(scheme, WEIGHTS["normal"], importance), whole)
    monkeypatch.setitem(on_device._PIECE, "cpu", 1)
    assert torch.equal(encode(scheme, WEIGHTS["normal"], importance), whole)


@pytest.mark.parametrize("shape", ((COLUMNS,), (3, COLUMNS), (5, 3, COLUMNS), (0, COLUMNS)))
@EVERY_SCHEME
def test_a_scheme_uses_it_off_the_cpu(
    scheme: GGMLScheme, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GGMLScheme does with a weight on another device, done on this one: any shape, dtype, strides, experts."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=g).bfloat16()
    cases: list[tuple[torch.Tensor, torch.Tensor | None]] = [(weight, None), (weight, torch.rand(COLUMNS, generator=g))]
    if len(shape) == 3:
        cases.append((weight, torch.rand(5, COLUMNS, generator=g)))
        cases.append((weight.transpose(0, 1), torch.rand(3, COLUMNS, generator=g)))
    right = [scheme.quantize(*case)[""] for case in cases]
    monkeypatch.setattr(blocks, "_c_encodes", lambda weight: False)
    monkeypatch.setattr(blocks, "_quantize_chunk", lambda: pytest.fail("C was called"))
    for case, bytes_ in zip(cases, right, strict=True):
        ours = scheme.quantize(*case)[""]
        assert ours.shape == bytes_.shape and torch.equal(ours, bytes_)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_SCHEME
def test_bytes_stay_on_the_weights_device(scheme: GGMLScheme) -> None:
    g = torch.Generator().manual_seed(3)
    weight, importance = torch.randn(5, 3, COLUMNS, generator=g), torch.rand(5, COLUMNS, generator=g)
    ours = scheme.quantize(weight.cuda(), importance)[""]
    assert ours.is_cuda and torch.equal(ours.cpu(), scheme.quantize(weight, importance)[""])


def test_importance_of_another_width_is_refused() -> None:
    for scheme in (Q4_K, Q5_0, Q6_K, Q8_0):
        with pytest.raises(ValueError, match="importance of shape"):
            encode(scheme, torch.zeros(2, 512), torch.ones(256))


@pytest.mark.parametrize("device", DEVICES)
def test_the_operations_are_cs(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.5, 1.5, -2.5, 4194303, 4194304, -4194305, 12345678, inf, -inf, nan], device=device)
    assert nearest_int(values).tolist() == [0, 2, -2, 4194303, -4194304, 4194302, -118617, -4194304, -4194304, 0]
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(square_root(x.to(device)).cpu().numpy(), np.sqrt(x.numpy()))
    terms = torch.tensor([[1.0], [2.0**-24], [2.0**-24], [2.0**-24], [2.0**-24]], device=device)
    assert sum_positions(terms).item() == 1.0  # each alone is lost; together they would not be
    size, first = signed_max(torch.tensor([[1.0, nan], [-2.0, -3.0], [2.0, 3.0]], device=device))
    assert size.tolist() == [2.0, 3.0] and first.tolist() == [-2.0, -3.0]
