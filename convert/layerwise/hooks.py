"""Hooks: who sees the model's products while chunks go through it.

ForwardHook     y = W x on the way forward: sees x and y, and may give another y in its place
BackwardHook    on the way back: sees x and the gradient g at y
GradientTap     a ForwardHook that carries a BackwardHook: it leaves y as it is, and keeps x until g comes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class ForwardHook(Protocol):
    """An Observer of products (runtime/model/layers.py), which knows of what kind the tokens are.

    kinds: int64 (tokens,), set before the products: the labels of the rows (Chunk.kind, 0 for prompts); for an expert's
    product the labels of the layer's tokens, among which `tokens` are those that the expert's rows are of.
    """

    kinds: Tensor

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor: ...


BackwardHook = Callable[[str, Tensor, Tensor, int | None], None]
"""Called on the way back with a weight's name, x (…, in) that went into the product, the gradient g (…, out) at what
came out, and the expert's number."""


class _Tap(torch.autograd.Function):
    """The identity. It hands over the gradient that comes back through it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.receive(gradient)
        return gradient, None


class GradientTap:
    """A ForwardHook that calls a BackwardHook when the gradients come back."""

    kinds: Tensor

    def __init__(self, hook: BackwardHook) -> None:
        self._hook = hook

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        entered = x.detach()

        def receive(gradient: Tensor) -> None:
            self._hook(name, entered, gradient, expert)

        tapped: Tensor = _Tap.apply(y, receive)  # type: ignore[no-untyped-call]
        return tapped
