"""Quantisers that know what goes through a weight: what they write decodes as planned, and loses less."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import pytest
import torch

from dgq.quant.feedback import feedback as module
from dgq.quant.feedback.feedback import feedback, grid_of, search
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Scheme

NAMES = tuple(name for name, scheme in SCHEMES.items() if scheme.grid is not None and name != "nf4_dq")


def _case(experts: int = 3, rows: int = 24, columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    weight, hessian = _made(experts, rows, columns)
    return weight.clone(), hessian.clone()


@cache
def _made(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(experts, columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    x = torch.randn(experts, 2048, columns, generator=g) @ mix * (2 * torch.rand(experts, 1, columns, generator=g))
    return torch.randn(experts, rows, columns, generator=g) * 0.02, x.mT @ x / 2048


def _loss(scheme: Scheme, parts: dict[str, torch.Tensor], weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = scheme.dequantize(parts).view(weight.shape) - weight
    return float((error @ hessian * error).sum())


@pytest.mark.parametrize("name", NAMES)
def test_every_step_loses_less(name: str) -> None:
    scheme = SCHEMES[name]
    weight, hessian = _case()
    weight[:, -1] *= 4  # rows are not alike
    plain = torch.eye(weight.shape[-1]).expand_as(hessian)
    stock = scheme.quantize(weight)
    searched, weighted = search(weight, None, scheme), search(weight, hessian.diagonal(dim1=1, dim2=2), scheme)
    done = feedback(weight, hessian, scheme)
    assert _loss(scheme, searched, weight, plain) <= _loss(scheme, stock, weight, plain)
    losses = [_loss(scheme, parts, weight, hessian) for parts in (stock, weighted, done)]
    assert losses[1] < losses[0] and losses[2] < 0.65 * losses[0], losses
    for parts in (searched, weighted, done):
        assert name != "nvfp4" or torch.equal(parts["weight_scale_2"], stock["weight_scale_2"])
        assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {k: (v.shape, v.dtype) for k, v in stock.items()}


def _felt(
    scheme: Scheme, parts: dict[str, torch.Tensor], weight: torch.Tensor, hessian: torch.Tensor, outputs: torch.Tensor
) -> float:
    error = scheme.dequantize(parts).view(weight.shape) - weight
    return float(((outputs @ error @ hessian) * error).sum())


@pytest.mark.parametrize("name", NAMES)
def test_rows_make_good_what_rows_lost(name: str) -> None:
    """Felt through G, what both sides' feedback loses is less; and its parts are of the same kind and order."""
    scheme = SCHEMES[name]
    weight, hessian = _case(2, 11, 256)
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(2, 11, 3, generator=g)
    outputs = mix @ mix.mT + 0.1 * torch.eye(11)
    one, two = feedback(weight, hessian, scheme), feedback(weight, hessian, scheme, outputs)
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    losses = [_felt(scheme, parts, weight, hessian, outputs) for parts in (one, two)]
    assert losses[1] < 0.6 * losses[0], losses
    swept = feedback(weight, hessian, scheme, outputs, sweeps=1)
    assert {k: (v.shape, v.dtype) for k, v in two.items()} == {k: (v.shape, v.dtype) for k, v in swept.items()}
    assert _felt(scheme, swept, weight, hessian, outputs) < 0.995 * losses[1], "a sweep takes off half a per cent"
    lone = feedback(weight[:1, :3], hessian[:1], scheme, outputs[:1, :3, :3])  # a row a group, one block a row
    assert lone[""].shape == two[""][:1, :3].shape
    exact, felt, eye = weight.double(), hessian.double(), torch.eye(11, dtype=torch.float64).expand(2, 11, 11)
    same = scheme.dequantize(feedback(exact, felt, scheme, eye)) == scheme.dequantize(feedback(exact, felt, scheme))
    assert float(same.float().mean()) > 0.999, "rows that are not felt together stay alone"  # float32 has near ties


@pytest.mark.usefixtures("few_steps")
def test_rows_come_back_in_their_order() -> None:
    """Four groups take every fourth row each; rows that are not felt together are rounded as they are alone."""
    weight, hessian = _case(1, 10, 64)
    weight, hessian = weight.double(), hessian.double()
    eye = torch.eye(10, dtype=torch.float64).unsqueeze(0)
    together, alone = (feedback(weight, hessian, SCHEMES["nf4"], outputs) for outputs in (eye, None))
    assert torch.equal(together["absmax"], alone["absmax"])
    same = SCHEMES["nf4"].dequantize(together) == SCHEMES["nf4"].dequantize(alone)
    assert float(same.float().mean()) > 0.999
    mix = torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    outputs = mix @ mix.mT + 0.1 * eye
    felt = feedback(weight, hessian, SCHEMES["nf4"], outputs)
    losses = [_felt(SCHEMES["nf4"], parts, weight, hessian, outputs) for parts in (felt, alone)]
    assert losses[0] < 0.8 * losses[1], losses


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q6_k", "q4_k", "iq4_nl"])
def test_bytes_mean_the_same_to_gguf_py(name: str) -> None:
    weight, hessian = _case(1)
    parts = feedback(weight, hessian, SCHEMES[name])
    found = gguf.quants.dequantize(parts[""][0].numpy(), gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(found, SCHEMES[name].dequantize(parts)[0].numpy())
    assert _loss(SCHEMES[name], {"": parts[""]}, weight, hessian) < 0.6 * _loss(
        SCHEMES[name], SCHEMES[name].quantize(weight), weight, hessian
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_does_not_depend_on_the_others(name: str) -> None:
    weight, hessian = _case(4, 8, 256)
    whole = feedback(weight, hessian, SCHEMES[name])
    alone = feedback(weight[2:3], hessian[2:3], SCHEMES[name])
    same = [(whole[part][2:3] == alone[part]).float().mean() for part in whole]
    assert min(map(float, same)) > 0.98, "but for float32 sums of another order"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zero", "constant", "tiny", "huge", "outlier", "zero column", "dead inputs"])
def test_odd_weights_and_inputs(name: str, kind: str) -> None:
    weight, hessian = _case(2, 8, 256)
    if kind == "zero":
        weight.zero_()
    elif kind == "constant":
        weight.fill_(0.01)
    elif kind in ("tiny", "huge"):
        weight *= {"tiny": 1e-6, "huge": 1e5}[kind]
    elif kind == "outlier":
        weight[:, :, 7] *= 1000
    elif kind == "zero column":
        hessian[:, 5] = 0
        hessian[:, :, 5] = 0
    else:
        hessian.zero_()
    scheme = SCHEMES[name]
    for parts in (feedback(weight, hessian, scheme), search(weight, None, scheme)):
        found = scheme.dequantize(parts).view(weight.shape)
        assert bool(found.isfinite().all())
        assert float((found - weight).square().sum()) <= 1.0 * float(weight.square().sum()) + 1e-30


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_rounded_to_the_nearest_without_correlation(name: str) -> None:
    """With H = 1 and no damping there is nothing to make good: feedback is the search, up to the order of blocks."""
    weight, _ = _case(1, 8, 256)
    scheme = SCHEMES[name]
    eye = torch.eye(256).unsqueeze(0)
    found = scheme.dequantize(feedback(weight, eye, scheme, damp=0.0)).view(weight.shape)
    torch.testing.assert_close(found, scheme.dequantize(search(weight, None, scheme)).view(weight.shape))


def test_blocks_go_by_power_and_stay_together() -> None:
    power = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0))
    grid = grid_of(SCHEMES["q4_k"], torch.zeros(2, 1, 1024))
    order = module._order(power, grid)
    for row, own in zip(order, power, strict=True):
        assert sorted(row.tolist()) == list(range(1024))
        blocks = row.view(-1, 256) // 256
        assert bool((blocks == blocks[:, :1]).all())
        sums = own.view(-1, 256).sum(-1)[blocks[:, 0]]
        assert bool((sums.diff() <= 0).all())
        assert bool((row.view(-1, 32) // 32 == (row.view(-1, 32) // 32)[:, :1]).all())
        assert bool((own[row].view(-1, 32).diff(dim=-1) <= 0).all())


def test_scales_of_nf4_are_bfloat16() -> None:
    """Kernels read a scale that is a bfloat16 in one word, any other in two."""
    weight, hessian = _case()
    stock = SCHEMES["nf4"].quantize(weight)["absmax"]
    assert not torch.equal(stock, stock.bfloat16().float()), "float32 weights: the reference's scales are not"
    for parts in (search(weight, None, SCHEMES["nf4"]), feedback(weight, hessian, SCHEMES["nf4"])):
        assert torch.equal(parts["absmax"], parts["absmax"].bfloat16().float())
        assert not torch.equal(parts["absmax"], stock.bfloat16().float()), "chosen, not the largest"
