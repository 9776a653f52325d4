"""What is shared out among threads: the same bits from pools of any size, and the numbers it should be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgq.convert.layerwise import steady
from dgq.convert.write import refine
from dgq.quant.feedback.feedback import feedback
from dgq.quant.schemes.registry import SCHEMES


def products() -> list[tuple[Tensor, Tensor]]:
    """Of every kind that calibrating makes, forwards and back, each with the same in float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (torch.randn(shape, generator=generator) for shape in ((700, 300), (500, 300), (700, 500)))
    exact = [value.double().numpy() for value in (x, weight, g)]
    leaf, total = x.clone().requires_grad_(), torch.ones(300, 500)
    functional.linear(leaf, weight).backward(g)
    assert leaf.grad is not None
    found = [
        (leaf.grad, exact[2] @ exact[1]),
        (total.addmm_(x.t(), g), 1 + exact[0].T @ exact[2]),
        (x.t() @ g, exact[0].T @ exact[2]),
        (x.double().t() @ g.double(), exact[0].T @ exact[2]),
    ]
    with torch.inference_mode():
        found += [
            (functional.linear(x, weight), exact[0] @ exact[1].T),
            (functional.linear(x, weight, torch.ones(500)), exact[0] @ exact[1].T + 1),
            (functional.linear(x.view(7, 100, 300), weight), (exact[0] @ exact[1].T).reshape(7, 100, 500)),
            (x.view(7, 100, 300) @ weight.t(), (exact[0] @ exact[1].T).reshape(7, 100, 500)),
            (x[:3] @ weight[:3].t(), exact[0][:3] @ exact[1][:3].T),  # too small to cut
        ]
    return [(value, torch.from_numpy(wanted)) for value, wanted in found]


def test_products_of_any_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "PIECE", 1 << 22)
    sizes: list[int] = []
    pieces = steady._pieces
    monkeypatch.setattr(steady, "_pieces", lambda a, b: sizes.append(len(found := pieces(a, b))) or found)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with steady.one_thread("cpu") as pool, steady.shared_out(pool):
                assert torch.get_num_threads() == 1
                made.append(products())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for value, wanted in made[0]:
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=2e-4)
    for others in made[1:]:
        assert all(torch.equal(one, other) for (one, _), (other, _) in zip(made[0], others, strict=True))
    a_pool = sizes[: len(sizes) // 3]
    assert len(a_pool) == 9 and a_pool.count(1) == 1 and min(n for n in a_pool if n > 1) == 8 and sizes == 3 * a_pool


def test_elsewhere_torch_is_left_alone() -> None:
    before = torch.get_num_threads()
    with steady.one_thread("cuda") as pool, steady.shared_out(pool):
        assert pool is None and torch.get_num_threads() == before


def test_an_error_in_a_piece_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "PIECE", 1)
    with steady.one_thread("cpu") as pool, steady.shared_out(pool), pytest.raises(RuntimeError, match="mat1 and mat2"):
        torch.ones(200, 30) @ torch.ones(31, 200)


@pytest.mark.parametrize("joined", [False, True], ids=["G of each expert", "one G for all"])
def test_experts_are_quantised_each_for_itself(monkeypatch: pytest.MonkeyPatch, few_steps: None, joined: bool) -> None:
    monkeypatch.setattr(refine, "FEW", 1)
    weight, x, g = (torch.randn(5, n, m, generator=torch.Generator().manual_seed(n)) for n, m in
                    ((16, 64), (200, 64), (201, 16)))  # fmt: skip
    hessian, outputs = x.mT @ x, (g.mT @ g)[: 1 if joined else 5]
    scheme = SCHEMES["nvfp4"]
    with ThreadPoolExecutor(3) as pool:
        found = refine._few_at_once(hessian, outputs, scheme, 1, pool, weight)
    for i in range(5):
        own = outputs if joined else outputs[i : i + 1]
        alone = feedback(weight[i : i + 1], hessian[i : i + 1], scheme, own, sweeps=1)
        assert alone.keys() == found.keys()
        assert all(torch.equal(part[0], found[suffix][i]) for suffix, part in alone.items())
    assert refine._few_at_once(hessian, outputs, scheme, 0, None, weight).keys() == found.keys()
