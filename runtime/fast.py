"""A model's session.Passes by kernels, in bfloat16 on a GPU: block.py's layer in few launches, nothing waited for.

    x ───────────────────────────────────────(+)──┬────────────────────────────────────────────(+)── × scalar ── x
    normed ─ qkv ─ place ─> slots ─ attend ─ o ─┘ mixed ─┬─ gate·up ─ gelu · ─ down ──┬─ fed ───┘             normed
                                                         └─ router ─ route ─ experts ─┘

Weights that share their input are multiplied at once (q, k and v; gate and up). Logits stay bfloat16 and uncapped, and
a step's last product is the expected embedding for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dgq.runtime import fused, moe
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
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.capturable = model.device.type == "cuda"
        side = torch.cuda.Stream() if self.capturable else None
        self._layers = [FastLayer(model, index, side) for index in range(len(model.layers))]
        self._condition = model.joined[DECODER + "self_conditioning.self"], model.condition_mlp[2].parts[""]
        self._table = model.table.parts[""]
        self._scale = embedding_scale(self.config.hidden, self._table)

    def new_state(self, rows: int, sampler: SamplerConfig) -> FastState:
        return FastState(self._model, rows, sampler)

    def decode(self, state: FastState, view: Canvas) -> Tensor:
        """bfloat16 logits (rows * canvas, vocab), not capped."""
        eps, factor = self.config.norm_eps, self.config.hidden**0.5
        soft = fused.norm(state.soft, self._model.condition_norm, eps, scale=state.scale, factor=factor)
        x = fused.norm(self._embed(state.canvas), None, eps, plus=_gated_mlp(soft, *self._condition))
        return functional.linear(self._run(x, view, self._model.decoder_scalars, causal=False), self._table)

    def encode(self, ids: Tensor, view: View) -> None:
        self._run(self._embed(ids), view, self._model.encoder_scalars, causal=True)

    encode_prompt = encode

    def _embed(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids.flatten(), self._table) * self._scale

    def _run(self, x: Tensor, view: View, scalars: Sequence[Tensor], causal: bool) -> Tensor:
        """x (rows * tokens, hidden), overwritten, through all layers -> normed for the head."""
        tokens = len(x) // len(view.lengths)
        turns = {s: fused.rotations(view.lengths, f, tokens) for s, f in self._model.frequencies.items()}
        normed = fused.norm(x, self._layers[0].norm("input_layernorm"), self.config.norm_eps)
        for layer, scalar in zip(self._layers, scalars, strict=True):
            following = self._layers[layer.index + 1 : layer.index + 2]
            after = following[0].norm("input_layernorm") if following else self._model.final_norm
            normed = layer(x, normed, turns[layer.sliding], view, scalar, after, causal)
        return normed


class FastLayer:
    """block.Layer on x in place, its input normed before and the next layer's after."""

    def __init__(self, model: Model, index: int, side: torch.cuda.Stream | None) -> None:
        layer, config = model.layers[index], model.config
        prefix = f"{DECODER}layers.{index}."
        routed = model.routed(index)
        assert routed is not None
        self.index, self.sliding, self._side = index, layer.shape.is_sliding, side
        self._config, self._shape, self._gate_up, self._down = config, layer.shape, *routed
        self._norms = layer.norms
        self._qkv, self._o = model.joined[prefix + "qkv"], layer.weights["self_attn.o_proj.weight"].parts[""]
        self._mlp = model.joined[prefix + "mlp"], layer.weights["mlp.down_proj.weight"].parts[""]
        self._router = layer.weights["router.proj.weight"].parts[""]
        self._router_scale = layer.weights["router.scale"].dequantize(torch.float32)
        self._per_expert_scale = layer.weights["router.per_expert_scale"].dequantize(torch.float32)

    def norm(self, name: str) -> Tensor:
        """A norm's weight, float32."""
        return self._norms[name + ".weight"]

    def __call__(
        self,
        x: Tensor,
        normed: Tensor,
        turns: tuple[Tensor, Tensor],
        view: View,
        scalar: Tensor,
        after: Tensor,
        causal: bool,
    ) -> Tensor:
        eps = self._config.norm_eps
        seen = self._attention(normed, turns, view, causal)
        feed = fused.mixed(
            x, seen, self.norm("post_attention_layernorm"), self.norm("pre_feedforward_layernorm"),
            self.norm("pre_feedforward_layernorm_2"), self._router_scale, eps,
        )  # fmt: skip
        dense, routed = self._both(feed)
        names = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "post_feedforward_layernorm")
        one, two, both = (self.norm(name) for name in names)
        return fused.fed(x, dense, routed, (one, two, both), scalar, after, eps)

    def _both(self, feed: fused.Feed) -> tuple[Tensor, Tensor]:
        """What MLP (n, hidden) and experts (n, k, hidden) make of it. In a graph the MLP, whose products are too small
        to fill the GPU, runs beside router and experts."""
        if self._side is None or not torch.cuda.is_current_stream_capturing():
            return _gated_mlp(feed.dense, *self._mlp), self._experts(feed)
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            dense = _gated_mlp(feed.dense, *self._mlp)
        routed = self._experts(feed)
        here.wait_stream(self._side)
        return dense, routed

    def _experts(self, feed: fused.Feed) -> Tensor:
        scores = functional.linear(feed.router, self._router)
        chosen, share = fused.route(scores, self._per_expert_scale, self._config.top_k)
        return moe.parts(feed.routed, chosen, share, self._gate_up, self._down)

    def _attention(self, x: Tensor, turns: tuple[Tensor, Tensor], view: View, causal: bool) -> Tensor:
        shape, config = self._shape, self._config
        queries, keys_too = config.heads * shape.head_dim, (config.heads + shape.kv_heads) * shape.head_dim
        parts = functional.linear(x, self._qkv)
        q, k = parts[:, :queries], parts[:, queries:keys_too]
        v = parts[:, keys_too:] if shape.has_v_proj else k
        norms = self.norm("self_attn.q_norm"), self.norm("self_attn.k_norm")
        keys, values, lengths = view.room(self.index)
        q = fused.place(q, k, v, norms, turns, keys, values, lengths, config.norm_eps)
        window = config.window if self.sliding else None
        seen = fused.attend(q, keys, values, lengths, window, causal)
        view.close(self.index)
        return functional.linear(seen.view(len(x), -1), self._o)


class FastState:
    """See session.State. soft (rows * canvas, hidden), scale (rows * canvas,): their product is the expected embedding
    that the next step is conditioned on, zero before the first."""

    def __init__(self, model: Model, rows: int, sampler: SamplerConfig) -> None:
        config, device = model.config, model.device
        self._table = model.table.parts[""]
        self._all = fused.Denoising.new(rows, config.canvas, config.vocab, config.softcap, sampler, device)
        self.canvas, self.argmax, self.accepted = self._all.canvas, self._all.argmax, self._all.accepted
        self.took, self.scale = self._all.took, self._all.scale
        self.soft = torch.zeros(rows * config.canvas, config.hidden, dtype=model.dtype, device=device)
        self._probabilities = torch.empty(len(self.soft), config.vocab, dtype=model.dtype, device=device)
        self._shape = rows, config.canvas, config.vocab

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        self._all.start(random.seed, random.numbers[rows].tolist())
        fused.begin(self._all, torch.full_like(self._all.block, block))
        self.soft.zero_()

    def decide(self, logits: Tensor) -> None:
        fused.sample(self._all, logits.view(self._shape), self._probabilities)
        fused.decide(self._all)

    def soften(self) -> None:
        fused.soft_embed(self._probabilities, self._table, out=self.soft)

    def mean_entropy(self) -> Tensor:
        return self._all.mean.clone()

    def flag(self) -> Tensor:
        return (self._all.done.all() + 2 * self._all.mean.isnan().any()).int()[None]


def _gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.gelu(gate, approximate="tanh") * up, down)
