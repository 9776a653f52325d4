"""A model's session.Passes by kernels, in bfloat16 on a GPU: block.py's layer in few launches, nothing waited for.

Weights that share their input are multiplied at once (q, k and v; gate and up), logits stay bfloat16 and uncapped, and
a step's last work is the expected embedding for the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dgq.runtime import fused, moe
from dgq.runtime.attention import attend, rope_tables, rotate
from dgq.runtime.layers import embedding_scale
from dgq.runtime.model import Model
from dgq.runtime.names import DECODER
from dgq.runtime.rng import CounterRandom
from dgq.runtime.settings import SamplerConfig
from dgq.runtime.slots import Canvas, Prompt

View = Canvas | Prompt


class Fast:
    """See session.Passes."""

    prefill = 2048

    def __init__(self, model: Model) -> None:
        self._model = model
        self.capturable = model.device.type == "cuda"
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self._layers = [FastLayer(model, index) for index in range(len(model.layers))]
        self._final_norm = model.final_norm.to(self.dtype)
        self._condition_norm = model.condition_norm.to(self.dtype)
        self._condition = model.joined[DECODER + "self_conditioning.self"], model.condition_mlp[2].parts[""]
        self._table = model.table.parts[""]
        self._scale = self.config.hidden**0.5

    def new_state(self, rows: int, sampler: SamplerConfig) -> FastState:
        return FastState(self._model, rows, sampler)

    def decode(self, ids: Tensor, soft: Tensor, view: Canvas) -> Tensor:
        """bfloat16 logits (rows, canvas, vocab), not capped."""
        eps = self.config.norm_eps
        signal = _gated_mlp(_norm(soft, self._condition_norm, eps), *self._condition)
        x = _norm(self._embed(ids) + signal, None, eps)
        masks = {sliding: view.decoder_mask(sliding) for sliding in (False, True)}
        x = self._run(x, masks, view, self._model.decoder_scalars)
        return functional.linear(_norm(x, self._final_norm, eps), self._table)

    def encode(self, ids: Tensor, view: Canvas) -> None:
        masks = {sliding: view.encoder_mask(sliding) for sliding in (False, True)}
        self._run(self._embed(ids), masks, view, self._model.encoder_scalars)

    def encode_prompt(self, ids: Tensor, view: Prompt) -> None:
        masks = {sliding: view.mask(sliding) for sliding in (False, True)}
        self._run(self._embed(ids), masks, view, self._model.encoder_scalars)

    def _embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._table) * embedding_scale(self.config.hidden, self._table)

    def _run(self, x: Tensor, masks: dict[bool, Tensor], view: View, scalars: Sequence[Tensor]) -> Tensor:
        positions = view.positions()
        tables = {s: rope_tables(f, positions, self.dtype) for s, f in self._model.frequencies.items()}
        for layer, scalar in zip(self._layers, scalars, strict=True):
            x = layer(x, tables[layer.sliding], masks[layer.sliding], view) * scalar
        return x


class FastLayer:
    """block.Layer, without the scalar."""

    def __init__(self, model: Model, index: int) -> None:
        layer, config = model.layers[index], model.config
        prefix = f"{DECODER}layers.{index}."
        routed = model.routed(index)
        assert routed is not None
        self._index, self._config, self._shape = index, config, layer.shape
        self.sliding, self._gate_up, self._down = layer.shape.is_sliding, *routed
        self._norms = {n: w.dequantize(model.dtype) for n, w in layer.weights.items() if "norm" in n}
        self._qkv, self._o = model.joined[prefix + "qkv"], layer.weights["self_attn.o_proj.weight"].parts[""]
        self._mlp = model.joined[prefix + "mlp"], layer.weights["mlp.down_proj.weight"].parts[""]
        self._router = layer.weights["router.proj.weight"].parts[""]
        scale = layer.weights["router.scale"].dequantize(torch.float32) * config.hidden**-0.5
        self._router_scale = scale.to(model.dtype)
        self._per_expert_scale = layer.weights["router.per_expert_scale"].dequantize(torch.float32)

    def __call__(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, view: View) -> Tensor:
        x = x + self._norm(
            self._attention(self._norm(x, "input_layernorm"), tables, mask, view), "post_attention_layernorm"
        )
        dense = _gated_mlp(self._norm(x, "pre_feedforward_layernorm"), *self._mlp)
        rows = x.flatten(0, 1)
        chosen, share = self._route(rows)
        rows = self._norm(rows, "pre_feedforward_layernorm_2")
        routed = moe.experts(rows, chosen, share, self._gate_up, self._down).view_as(x)
        both = self._norm(dense, "post_feedforward_layernorm_1") + self._norm(routed, "post_feedforward_layernorm_2")
        return x + self._norm(both, "post_feedforward_layernorm")

    def _attention(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, view: View) -> Tensor:
        shape, heads = self._shape, self._config.heads
        parts = functional.linear(x, self._qkv).view(*x.shape[:-1], -1, shape.head_dim)
        q, k = parts[..., :heads, :], parts[..., heads : heads + shape.kv_heads, :]
        v = parts[..., heads + shape.kv_heads :, :] if shape.has_v_proj else k
        q = rotate(self._norm(q, "self_attn.q_norm"), tables)
        k = rotate(self._norm(k, "self_attn.k_norm"), tables)
        v = _norm(v, None, self._config.norm_eps)
        keys, values = view.write(self._index, k.transpose(1, 2), v.transpose(1, 2))
        return functional.linear(attend(q, keys, values, mask), self._o)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = _norm(x, self._router_scale, self._config.norm_eps)
        scores = functional.linear(normed, self._router).softmax(-1, dtype=torch.float32)
        share, chosen = scores.topk(self._config.top_k, dim=-1)
        return chosen, share / share.sum(-1, keepdim=True) * self._per_expert_scale[chosen]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return _norm(x, self._norms[name + ".weight"], self._config.norm_eps)


class FastState:
    """See session.State."""

    def __init__(self, model: Model, rows: int, sampler: SamplerConfig) -> None:
        config, device = model.config, model.device
        self._table, self._hidden = model.table.parts[""], config.hidden
        self._all = fused.Denoising.new(rows, config.canvas, config.vocab, config.softcap, sampler, device)
        self.canvas, self.argmax, self.accepted = self._all.canvas, self._all.argmax, self._all.accepted
        self.took = self._all.took
        self.soft = torch.zeros(rows, config.canvas, config.hidden, dtype=model.dtype, device=device)
        self._weights = torch.zeros(rows * config.canvas, config.vocab, dtype=model.dtype, device=device)

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        self._all.start(random.seed, random.numbers[rows].tolist())
        fused.begin(self._all, torch.full_like(self._all.block, block))
        self.soft.zero_()

    def decide(self, logits: Tensor) -> None:
        fused.sample(self._all, logits, self._weights)
        fused.decide(self._all)
        soft = self._weights @ self._table
        scale = embedding_scale(self._hidden, soft)
        self.soft.copy_((soft.float() * self._all.scale[:, None]).to(soft.dtype).mul_(scale).view_as(self.soft))

    def mean_entropy(self) -> Tensor:
        return self._all.mean.clone()

    def flag(self) -> Tensor:
        return (self._all.done.all() + 2 * self._all.mean.isnan().any()).int()[None]


def _gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.gelu(gate, approximate="tanh") * up, down)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)
