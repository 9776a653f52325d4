"""A model's passes by kernels, in bfloat16 on a GPU: block.py's layer in few launches, none of which waits for the
host.

    x ───────────────────────────────────────(+)──┬────────────────────────────────────────────(+)── × scalar ── x
    normed ─ qkv ─ place ─> slots ─ attend ─ o ─┘ mixed ─┬─ gate·up ─ gelu · ─ down ──┬─ fed ───┘             normed
                                                         └─ router ─ route ─ experts ─┘

Weights that share their input are multiplied in one product: q, k and v; gate and up. Each layer leaves its result in x
and hands the next layer's normed input on. Logits stay bfloat16 and uncapped: the sampler's kernels cap them. The last
product of a step makes the expected embedding for the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dgq.runtime.adapters.adapter import SIDES
from dgq.runtime.engine.beside import Sides, both_sides, experts_beside, gated_mlp, linear
from dgq.runtime.kernels import dense, fused, moe
from dgq.runtime.model.layers import embedding_scale
from dgq.runtime.model.memory import PREFILL
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.slots import CanvasView, PromptView
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER
from dgq.runtime.shape.pictured import Pictures
from dgq.runtime.shape.settings import SamplerConfig

View = CanvasView | PromptView


@dataclass(frozen=True)
class Pass:
    """What all layers of one pass share. rotations: cos and sin of the tokens' positions, for sliding layers (True) and
    full ones; causal: whether this is the encoder's pass; reach: see cached_attention.Mask."""

    rotations: dict[bool, tuple[Tensor, Tensor]]
    view: View
    causal: bool
    reach: Tensor | None


class Fast:
    """The session.Backend of a model whose weights were repacked for the kernels."""

    prefill = PREFILL

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.capturable = model.device.type == "cuda"
        side = torch.cuda.Stream() if self.capturable else None
        self._layers = [FastLayer(model, index, side) for index in range(len(model.layers))]
        assert model.kernels is not None and model.kernels.table is not None
        condition = DECODER + "self_conditioning."
        self._gate_up, self._down = model.kernels.gated(condition + "gate_up"), model.kernels.linear(condition + "down")
        self._changes = mlp_changes(model, condition, self._gate_up)
        table = model.kernels.table
        self._table = PlainTable(table) if isinstance(table, Tensor) else table
        self._scale = embedding_scale(self.config.hidden, self.dtype)
        self._room = torch.empty(0, self.config.vocab, dtype=self.dtype, device=self.device)

    @property
    def kind(self) -> str:
        """Which kind of choice of adapters the rows have made: what is captured for one is of no use for another."""
        return self._model.choice.kind if self._model.choice else "none"

    def reserve(self, rows: int) -> None:
        if self._model.choice is not None:
            self._model.choice.grow(rows)

    def new_state(self, rows: int, sampler: SamplerConfig) -> FastState:
        positions = rows * self.config.canvas
        if len(self._room) < positions:  # once only: the first state is the largest
            self._room = torch.empty(positions, self.config.vocab, dtype=self.dtype, device=self.device)
        return FastState(self.config, self._table, rows, sampler, self._room[:positions])

    def decode(self, state: FastState, view: CanvasView) -> Tensor:
        """Logits (rows * canvas, vocab), bfloat16 and not capped."""
        eps, factor = self.config.norm_eps, self._scale
        ordered = self._gate_up.packed
        soft = fused.norm(
            state.soft, self._model.condition_norm, eps, scale=state.scale, factor=factor, ordered=ordered
        )
        self._look(view)
        signal = gated_mlp(soft, self._gate_up, self._down, (self._changes[0][False], self._changes[1][False]))
        x = fused.norm(self._embed(state.canvas), None, eps, plus=signal)
        return self._table.head(self._run(x, view, self._model.decoder_scalars, causal=False))

    def encode(self, ids: Tensor, view: View) -> None:
        self._run(self._embed(ids), view, self._model.encoder_scalars, causal=True)

    def encode_prompt(self, ids: Tensor, view: PromptView, images: Pictures | None) -> None:
        x, reach = self._embed(ids), None
        if images is not None:
            images.put_into(x)
            reach = torch.cat((images.behind, images.ahead))
        self._run(x, view, self._model.encoder_scalars, causal=True, reach=reach)

    def _look(self, view: View) -> None:
        if self._model.choice is not None:
            self._model.choice.look(*view.span)

    def _embed(self, ids: Tensor) -> Tensor:
        return self._table.rows(ids.flatten(), self._scale)

    def _run(
        self, x: Tensor, view: View, scalars: Sequence[Tensor], causal: bool, reach: Tensor | None = None
    ) -> Tensor:
        """Send x (rows * tokens, hidden), which is overwritten, through all layers -> normed for the head."""
        self._look(view)
        tokens = len(x) // len(view.lengths)
        rotations = {s: fused.rotations(view.lengths, f, tokens) for s, f in self._model.frequencies.items()}
        around = Pass(rotations, view, causal, reach)
        first, eps = self._layers[0], self.config.norm_eps
        normed = fused.norm(x, first.norm("input_layernorm"), eps, ordered=first.ordered)
        for layer, scalar in zip(self._layers, scalars, strict=True):
            after, ordered = self._model.final_norm, False
            if layer.index + 1 < len(self._layers):
                following = self._layers[layer.index + 1]
                after, ordered = following.norm("input_layernorm"), following.ordered
            normed = layer(x, normed, around, scalar, after, ordered)
        return normed


def mlp_changes(model: Model, prefix: str, gate_up: dense.Gated) -> tuple[Sides, Sides]:
    """What adapters add to an MLP's gate and up, and to its down. prefix: of its weights' canonical names."""
    inner, hidden = gate_up.inner, model.config.hidden
    halves = [(f"{prefix}{part}_proj.weight", inner) for part in ("gate", "up")]
    down = [(prefix + "down_proj.weight", hidden)]
    return both_sides(model.choice, halves, gate_up.packed), both_sides(model.choice, down, False)


class FastLayer:
    """block.Layer by kernels. It changes x in place; its input was normed by the layer before, and it norms the next
    layer's. side: a stream on which the MLP runs beside the experts."""

    def __init__(self, model: Model, index: int, side: torch.cuda.Stream | None) -> None:
        layer, config = model.layers[index], model.config
        prefix = f"{DECODER}layers.{index}."
        routed = model.routed(index)
        assert routed is not None
        self.index, self.sliding, self._side = index, layer.shape.is_sliding, side
        self._config, self._shape, self._routed = config, layer.shape, routed
        self._norms = layer.norms
        assert model.kernels is not None
        offload = model.kernels.offload
        self._offload = offload if offload and index in offload else None
        self._qkv, self._o = (model.kernels.linear(f"{prefix}self_attn.{name}") for name in ("qkv", "o"))
        self._gate_up, self._down = (
            model.kernels.gated(prefix + "mlp.gate_up"),
            model.kernels.linear(prefix + "mlp.down"),
        )
        self._router = layer.weights["router.proj.weight"].parts[""]
        self._changes = self._all_changes(model, prefix)
        self._router_scale = layer.weights["router.scale"].dequantize(torch.float32)
        self._per_expert_scale = layer.weights["router.per_expert_scale"].dequantize(torch.float32)

    def _all_changes(self, model: Model, prefix: str) -> dict[str, Sides]:
        """Product -> what adapters add to it."""
        attention = [
            (f"{prefix}self_attn.{part}_proj.weight", self._rows(part))
            for part in ("q", "k", "v")
            if part != "v" or self._shape.has_v_proj
        ]
        output, router = prefix + "self_attn.o_proj.weight", prefix + "router.proj.weight"
        gate_up, down = mlp_changes(model, prefix + "mlp.", self._gate_up)
        self._experts_changes = {
            side == "encoder": experts_beside(model.choice, side, prefix + "experts.", model.config.experts)
            for side in SIDES
        }
        return {
            "qkv": both_sides(model.choice, attention, self._qkv.packed),
            "o": both_sides(model.choice, [(output, model.config.hidden)], self._o.packed),
            "gate_up": gate_up, "down": down,
            "router": both_sides(model.choice, [(router, model.config.experts)], False),
        }  # fmt: skip

    def _rows(self, part: str) -> int:
        heads = self._config.heads if part == "q" else self._shape.kv_heads
        return heads * self._shape.head_dim

    @property
    def ordered(self) -> bool:
        """Whether the columns of its input must be in the order of repack.in_order(), which packed weights need."""
        return self._qkv.packed

    def norm(self, name: str) -> Tensor:
        """A norm's weight, float32."""
        return self._norms[name + ".weight"]

    def __call__(self, x: Tensor, normed: Tensor, around: Pass, scalar: Tensor, after: Tensor, ordered: bool) -> Tensor:
        """Change x (n, hidden) in place -> its norm by `after`, the next norm's weight. normed: x, normed for this
        layer. scalar: the layer's, one element. ordered: whether the result's columns must be ordered."""
        eps, norm = self._config.norm_eps, self.norm
        seen = self._attention(normed, around)
        inputs = norm("pre_feedforward_layernorm"), norm("pre_feedforward_layernorm_2")
        weights = norm("post_attention_layernorm"), *inputs
        feed = fused.mixed(x, seen, weights, self._router_scale, eps, ordered=self._gate_up.packed)
        mlp, routed = self._both(feed, around.causal)
        ends = norm("post_feedforward_layernorm_1"), norm("post_feedforward_layernorm_2")
        return fused.fed(x, mlp, routed, (*ends, norm("post_feedforward_layernorm"), after), scalar, eps, ordered)

    def _both(self, feed: fused.Feed, causal: bool) -> tuple[Tensor, Tensor]:
        """The results of the MLP, (n, hidden), and of the experts, (n, k, hidden). In a graph the MLP, whose products
        are too small to fill the GPU, runs beside router and experts."""
        if self._side is None or not torch.cuda.is_current_stream_capturing():
            return self._mlp(feed, causal), self._experts(feed, causal)
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            mlp = self._mlp(feed, causal)
        routed = self._experts(feed, causal)
        here.wait_stream(self._side)
        return mlp, routed

    def _mlp(self, feed: fused.Feed, causal: bool) -> Tensor:
        changes = self._changes["gate_up"][causal], self._changes["down"][causal]
        return gated_mlp(feed.dense, self._gate_up, self._down, changes)

    def _experts(self, feed: fused.Feed, causal: bool) -> Tensor:
        scores = functional.linear(feed.router, self._router)
        if (change := self._changes["router"][causal]) is not None:
            scores = change.add(scores, feed.router)
        chosen, share = fused.route(scores, self._per_expert_scale, self._config.top_k)
        if self._offload is not None:
            self._offload.arrive(self.index)
        if (beside := self._experts_changes[causal]) is None:
            parts = moe.parts(feed.routed, chosen, share, *self._routed)
        else:
            parts = beside.parts(feed.routed, chosen, share, self._routed)
        if self._offload is not None:
            self._offload.leave(self.index)
        return parts

    def _attention(self, x: Tensor, around: Pass) -> Tensor:
        shape, config, view = self._shape, self._config, around.view
        queries, keys_too = config.heads * shape.head_dim, (config.heads + shape.kv_heads) * shape.head_dim
        parts = linear(x, self._qkv, self._changes["qkv"][around.causal])
        q, k = parts[:, :queries], parts[:, queries:keys_too]
        v = parts[:, keys_too:] if shape.has_v_proj else k
        norms = self.norm("self_attn.q_norm"), self.norm("self_attn.k_norm")
        cache = fused.KeyValues(*view.room(self.index))
        q = fused.place(q, k, v, norms, around.rotations[self.sliding], cache, config.norm_eps)
        mask = fused.Mask(config.window if self.sliding else None, around.causal, reach=around.reach)
        seen = fused.attend(q, cache, mask, ordered=self._o.packed)
        view.close(self.index)
        return linear(seen.view(len(x), -1), self._o, self._changes["o"][around.causal])


class FastState:
    """The session.State of Fast. soft (rows * canvas, hidden) times scale (rows * canvas,) is the expected embedding
    that the next step is conditioned on; zero before the first step. probabilities: memory for the sampler's."""

    def __init__(
        self,
        config: ModelConfig,
        table: PlainTable | dense.Table,
        rows: int,
        sampler: SamplerConfig,
        probabilities: Tensor,
    ) -> None:
        device = probabilities.device
        self._table, self._probabilities = table, probabilities
        self._all = fused.Denoising.new(rows, config.canvas, config.vocab, config.softcap, sampler, device)
        self.canvas, self.argmax, self.accepted = self._all.canvas, self._all.argmax, self._all.accepted
        self.took, self.scale = self._all.took, self._all.scale
        self.soft = torch.zeros(rows * config.canvas, config.hidden, dtype=torch.bfloat16, device=device)
        self._shape = rows, config.canvas, config.vocab

    def begin(self, random: CounterRandom, rows: Tensor, block: int) -> None:
        missing = len(self.took) - len(rows)
        self._all.start(random.seed, random.numbers[rows].tolist() + [0] * missing)
        fused.begin(self._all, torch.full_like(self._all.block, block))
        self._all.done[len(rows) :] = 1
        self.soft.zero_()

    def decide(self, logits: Tensor) -> None:
        fused.sample(self._all, logits.view(self._shape), self._probabilities)
        fused.decide(self._all)

    def soften(self) -> None:
        self._table.soft_embed(self._probabilities, out=self.soft)

    def mean_entropy(self) -> Tensor:
        return self._all.mean.clone()

    def flag(self) -> Tensor:
        return (self._all.done.all() + 2 * self._all.mean.isnan().any()).int()[None]


class PlainTable:
    """What dense.Table does, for an embedding (vocab, hidden) in bfloat16."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def rows(self, ids: Tensor, factor: float) -> Tensor:
        return functional.embedding(ids, self._table) * factor

    def head(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._table)

    def soft_embed(self, probabilities: Tensor, out: Tensor) -> Tensor:
        return fused.soft_embed(probabilities, self._table, out=out)
