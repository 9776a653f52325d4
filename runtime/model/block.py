"""One transformer layer over packed weights. Encoder and decoder run the same layer with different scalars and masks.

x ── norm ── attention ── norm ──(+)──┬── norm ── MLP ───────── norm ──(+)── norm ──(+)── × scalar
└─────────────────────────────────┘   ├── norm_2 ── experts ── norm_2 ──┘            │
                                      ├── router (reads the raw residual) ─┘         │
                                      └──────────────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles
from dgq.runtime.model.attention import attend, rotate
from dgq.runtime.model.layers import STEADY_ROWS, Observer, experts, gated_mlp, linear, rms_norm
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER


class Keys(Protocol):
    """What a layer needs of a cache: see cache.Cache for the methods."""

    def starts(self, layer: int) -> list[int] | None: ...
    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class BatchKeys(Keys, Protocol):
    """The keys and values of a whole batch. stacked: whether each row is computed as though it were alone."""

    @property
    def stacked(self) -> bool: ...


class Layer:
    """Layer `index` of the model. weights: the layer's tensors by their names below "layers.N."; observe: see
    layers.Observer; routed: gate_up and down of the experts if they were repacked for the kernels."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: Mapping[str, Packed],
        dtype: torch.dtype,
        observe: Observer | None = None,
        routed: tuple[Tiles, Tiles] | None = None,
    ) -> None:
        self.index, self.shape = index, config.layers[index]
        self._observe = observe
        self._config = config
        self.weights = weights
        self.norms = {name: w.dequantize(torch.float32) for name, w in weights.items() if "norm" in name}
        self._dense = (weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"], weights["mlp.down_proj.weight"])
        self.experts = routed or (weights["experts.gate_up_proj"], weights["experts.down_proj"])
        self._router_scale = weights["router.scale"].dequantize(dtype)
        self._per_expert_scale = weights["router.per_expert_scale"].dequantize(dtype)

    def __call__(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: BatchKeys, scalar: Tensor
    ) -> Tensor:
        """x (rows, tokens, hidden) -> the same shape. tables: cos and sin of the tokens' positions; mask: see attend().
        Keys and values are written to the cache behind what it holds, and not committed."""
        return self.feed(self.mix(x, tables, mask, cache), STEADY_ROWS if cache.stacked else 1) * scalar

    def mix(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: Keys) -> Tensor:
        """The first half: attention, in which tokens see each other."""
        a = self._attention(self._norm(x, "input_layernorm"), tables, mask, cache)
        return x + self._norm(a, "post_attention_layernorm")

    def feed(self, x: Tensor, least: int = 1) -> Tensor:
        """The second half without the scalar: x (…, hidden), tokens of any sequences. least: see layers.experts()."""
        return x + self._norm(self.dense(x) + self.routed(x, least), "post_feedforward_layernorm")

    def dense(self, x: Tensor) -> Tensor:
        """The dense MLP's share of feed()."""
        found = gated_mlp(self._norm(x, "pre_feedforward_layernorm"), self._dense, self._observer("mlp."))
        return self._norm(found, "post_feedforward_layernorm_1")

    def routed(self, x: Tensor, least: int = 1) -> Tensor:
        """The experts' share of feed()."""
        return self._norm(self._experts(x, least), "post_feedforward_layernorm_2")

    def _attention(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: Keys) -> Tensor:
        w, eps = self.weights, self._config.norm_eps
        heads = (*x.shape[:-1], -1, self.shape.head_dim)
        watch = self._observer()

        def project(part: str) -> Tensor:
            name = f"self_attn.{part}_proj.weight"
            return linear(x, w[name], watch, name).view(heads)

        q, k = project("q"), project("k")
        v = project("v") if self.shape.has_v_proj else k
        q = rotate(self._norm(q, "self_attn.q_norm"), tables)
        k = rotate(self._norm(k, "self_attn.k_norm"), tables)
        v = rms_norm(v, None, eps)
        keys, values = cache.write(self.index, k.transpose(1, 2), v.transpose(1, 2))
        seen = attend(q, keys, values, mask, cache.starts(self.index))
        return linear(seen, w["self_attn.o_proj.weight"], watch, "self_attn.o_proj.weight")

    def _experts(self, x: Tensor, least: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen, share = self.route(rows)
        rows = self._norm(rows, "pre_feedforward_layernorm_2")
        gate_up, down = self.experts
        watch = None if isinstance(gate_up, Tiles) else self._observer("experts.")  # no kernel has an observer
        return experts(rows, chosen, share, gate_up, down, watch, least).view_as(x)

    def _observer(self, part: str = "") -> Observer | None:
        """An observer of names below `part` that passes the full names on to the model's observer."""
        observe, prefix = self._observe, f"{DECODER}layers.{self.index}.{part}"
        return None if observe is None else lambda name, *seen: observe(prefix + name, *seen)

    def route(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts: residual (tokens, hidden) -> numbers and shares (float32), both (tokens, top_k)."""
        x = rms_norm(residual, None, self._config.norm_eps) * self._router_scale * self._config.hidden**-0.5
        name = "router.proj.weight"
        scores = linear(x, self.weights[name], self._observer(), name).softmax(-1, dtype=torch.float32)
        share, chosen = scores.topk(self._config.top_k, dim=-1)
        share = share / share.sum(-1, keepdim=True)
        return chosen, share * self._per_expert_scale[chosen]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.norms[name + ".weight"], self._config.norm_eps)
