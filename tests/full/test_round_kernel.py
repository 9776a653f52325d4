"""The kernels of error feedback, rounding a scale group's columns and ggml's searches, against torch's loops.

On a GPU where there is one; else under Triton's interpreter, which must be on before triton is imported and so gets a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dgq.quant.schemes import nf4, nvfp4

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
ROWS = (88, 1408) if CUDA else (33,)
here = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="no GPU: done by test_under_the_interpreter")
POSITIVE = torch.tensor(nvfp4.VALUES)
GRIDS = {  # levels, columns of a scale
    "nvfp4": (torch.cat((-POSITIVE[1:].flip(0), POSITIVE)), 16),
    "nf4": (nf4.QUANT_MAP, 64),
    "q8_0": (torch.arange(-127.0, 128), 32),
    "q5_0": (torch.arange(-16.0, 16), 32),
    "q6_k": (torch.arange(-32.0, 32), 16),
    "q4_k": (torch.arange(0.0, 16), 32),
}


def _oracle(x: Tensor, scale: Tensor, low: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
    """codes and errors of every candidate (C, B, rows, sub), and their losses."""
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    bounds = (levels[:-1] + levels[1:]) / 2
    left = x.expand(len(scale), *x.shape).clone()
    codes, error = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    for i in range(x.shape[-1]):
        code = torch.bucketize((left[..., i] - low) * inverse, bounds)
        codes[..., i] = code
        error[..., i] = (left[..., i] - (levels[code] * scale + low)) / factor[:, i, i].unsqueeze(-1)
        for k in range(i + 1, x.shape[-1]):
            left[..., k] -= error[..., i] * factor[:, i, k].unsqueeze(-1)
    return codes, error, error.square().sum(-1)


def _case(name: str, experts: int, rows: int, shared: bool = False) -> tuple[Tensor, ...]:
    """x and factor as feedback.py has them: a few columns of more. Rows 1 to 4 are zero, without scales, constant, and
    with some scales zero."""
    g = torch.Generator().manual_seed(rows)
    levels, sub = GRIDS[name]
    mix = torch.randn(1 if shared else experts, sub + 32, sub + 32, generator=g) / 8 + torch.eye(sub + 32)
    factor = torch.linalg.cholesky(mix.double() @ mix.double().mT, upper=True).float().to(DEVICE)
    factor = factor.expand(experts, -1, -1)[:, 16:-16, 16:-16]
    x = (torch.randn(experts, rows, sub + 32, generator=g) * 0.02)[..., 16:-16]
    x[:, 1], x[:, 3] = 0, 0.01
    step = (x.amax(-1) - x.amin(-1)) / (levels[-1] - levels[0])
    scale = torch.stack([step * f for f in (0.8, 0.9, 1.0, 1.1)])
    scale[:, :, 2], scale[1:3, :, 4] = 0, 0
    low = x.amin(-1).expand_as(scale) * torch.tensor([1, 0.95, 0.9, 0.85]).view(-1, 1, 1)
    low = low if name == "q4_k" else torch.zeros_like(scale)
    return tuple(value.to(DEVICE) for value in (x, scale, low, factor, levels))


def _check(*case: Tensor) -> None:
    from dgq.quant.feedback.round_kernel import round_columns

    codes, error, best = round_columns(*case)
    assert (codes.dtype, best.dtype) == (torch.uint8, torch.int64)
    all_codes, all_errors, loss = _oracle(*case)
    least = loss.gather(0, best.unsqueeze(0))[0]
    assert float((least <= loss.amin(0) * (1 + 1e-4)).float().mean()) >= 0.99
    assert float((best == loss.argmin(0)).float().mean()) >= 0.99
    pick = best[None, :, :, None].expand(1, *codes.shape)
    same = codes == all_codes.gather(0, pick)[0]
    assert float(same.float().mean()) >= 0.999, f"{int((~same).sum())} of {same.numel()} codes differ"
    rows = same.all(-1)  # a code that differs takes the rest of its row along
    wanted = all_errors.gather(0, pick)[0]
    torch.testing.assert_close(error[rows], wanted[rows], rtol=1e-3, atol=1e-3 * float(wanted.abs().amax()))
    assert float(error.square().sum()) == pytest.approx(float(loss.amin(0).sum()), rel=1e-4)


@here
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", GRIDS)
def test_it_is_the_loop(name: str, rows: int) -> None:
    _check(*_case(name, 128 if CUDA else 2, rows))


@here
@pytest.mark.parametrize("name", ["q6_k", "q4_k"])
def test_one_factor_for_all_and_columns_first(name: str) -> None:
    x, *others = _case(name, 3, 7, shared=True)
    assert others[2].stride(0) == 0
    _check(x.mT.contiguous().mT, *others)


@here
@pytest.mark.parametrize("name", ["nvfp4", "q8_0", "q4_k"])
def test_a_midpoint_goes_down_and_the_first_of_equals_is_taken(name: str) -> None:
    levels, sub = GRIDS[name]
    middle = ((levels[:-1] + levels[1:]) / 2).repeat(sub)[: 9 * sub].view(1, 9, sub)
    scale = torch.ones(2, 1, 9)
    case = [v.to(DEVICE) for v in (middle, scale, torch.zeros_like(scale), torch.eye(sub).unsqueeze(0), levels)]
    _check(*case)
    from dgq.quant.feedback.round_kernel import round_columns

    codes, _, best = round_columns(*case)
    assert torch.equal(codes, _oracle(*case)[0][0]) and not best.any()


@here
def test_a_nan_is_treated_as_torch_does() -> None:
    x, scale, *others = _case("q5_0", 2, 7)
    x[1, 0, 3], scale[2, 0, 5] = float("nan"), float("inf")
    from dgq.quant.feedback.round_kernel import round_columns

    codes, error, best = round_columns(x, scale, *others)
    all_codes, all_errors, loss = _oracle(x, scale, *others)
    assert torch.equal(best, loss.argmin(0)) and int(best[0, 5]) == 2
    assert torch.equal(codes[1, 0], all_codes[0, 1, 0])
    torch.testing.assert_close(error[1, 0], all_errors[0, 1, 0], equal_nan=True)


@here
def test_levels_it_cannot_do() -> None:
    x, scale, low, factor, levels = _case("q5_0", 2, 7)
    from dgq.quant.feedback.round_kernel import round_columns

    with pytest.raises(ValueError, match="32 levels that are not uniform"):
        round_columns(x, scale, low, factor, levels * 2)


@here
@pytest.mark.parametrize("kind", ["qx", "qkx"])
def test_searches_find_what_ggml_finds(kind: str) -> None:
    from dgq.quant.schemes.ggml import search, search_kernel

    g = torch.Generator().manual_seed(3)
    positions, blocks = (16 if kind == "qx" else 32), (100_000 if CUDA else 70)
    x = torch.randn(positions, blocks, generator=g) * torch.rand(blocks, generator=g)
    x[:, 1], x[:, 2], x[:, 3], x[3, 4] = 0, x[:, 2].abs() + 0.1, -x[:, 3].abs(), 20
    weight = torch.rand(positions, blocks, generator=g).square() + 0.01
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    arguments = (32, x, weight) if kind == "qx" else (15, x, weight, -0.9, 0.05, 36)
    found = getattr(search_kernel, f"make_{kind}_quants")(*arguments)
    wanted = getattr(search, f"make_{kind}_quants")(*arguments)[: len(found)]
    same = torch.stack([torch.isclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True)]).all(0)
    assert bool(same[:5].all()) and float(same.float().mean()) > 0.985

    def loss(scale: Tensor, rest: Tensor | float = 0.0) -> Tensor:
        low, high = (-32, 31) if kind == "qx" else (0, 15)
        level = ((x + rest) * torch.where(scale != 0, 1 / scale, 0)).round().clamp(low, high)
        return ((level * scale - rest - x).square() * weight).sum(0)

    assert float(loss(*found).sum()) < 1.0005 * float(loss(*wanted).sum())


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernel itself is tested")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton 3.6 interprets with numpy < 2.4")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    done = subprocess.run(
        [*command, "--import-mode=importlib", "-o", "addopts=", "--durations=6"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(not CUDA, reason="CUDA graphs want a GPU")
@pytest.mark.parametrize("name", GRIDS)
def test_recorded_columns_are_the_same(name: str) -> None:
    """The first weight of a shape is rounded kernel by kernel, the second recorded, the rest replayed."""
    from dgq.quant.feedback.feedback import DAMP, _Columns, grid_of
    from dgq.quant.schemes.registry import SCHEMES

    g = torch.Generator().manual_seed(7)
    x = torch.randn(4, 2048, 512, generator=g).to(DEVICE)
    whole = (torch.randn(4, 96, 512, generator=g) * 0.02).to(DEVICE)
    grid = grid_of(SCHEMES[name], whole)
    columns = _Columns(x.mT @ x, grid, DAMP, 4)
    for rows in (whole[:, :32], whole[:, 32:64], whole[:, 64:], whole[:, :7], whole[:, 32:64], whole[:, 7:14] * 3):
        found, wanted = columns.rounded(rows), columns._rounded(rows)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[suffix].view(torch.uint8), wanted[suffix].view(torch.uint8)) for suffix in found)
    assert [one is not None for one in columns._recorded.values()] == [True, True]
