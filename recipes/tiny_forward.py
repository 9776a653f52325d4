"""One training pass of `tiny` through transformers' own modules, laid out so that it serves many canvases.

The modules and their weights are transformers' own; only the order in which they are called is ours, so that one pass
serves many canvases. A sequence of 256 tokens is encoded causally once. Then several canvases of 64 positions go
through the decoder together, as queries over [256 encoder keys ; their own keys]: a mask lets canvas k see the tokens
before its start (in sliding layers the last 63 of them) and itself, which is what generate() would show it. Rotary
positions are relative, so chats can be packed into a sequence, each in its own attention segment.

The experts run as one wide gated MLP whose hidden columns are multiplied by the routing weights (zero for experts not
chosen): the same function as a loop over experts, without a host sync.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PAD, BOS, CANVAS = 0, 2, 64
SLIDING, FULL = "sliding_attention", "full_attention"
Rope = tuple[Tensor, Tensor]
Routed = list[tuple[Tensor, Tensor]]  # probabilities and choices, a layer


class Keys:
    """The prefix cache as the attention modules want it: the encoder writes a layer's keys, the decoder reads them."""

    is_compileable = False

    class Layer:
        keys: Tensor
        values: Tensor

    def __init__(self, layers: int):
        self.layers = [Keys.Layer() for _ in range(layers)]

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        self.layers[index].keys, self.layers[index].values = keys, values
        return keys, values


def route(router: Any, x: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, dense routing weights (zero where not chosen) and who was chosen, each [tokens, experts]."""
    with torch.autocast(x.device.type, enabled=False):  # bf16 logits would tie
        probs = router.proj(router.norm(x.float()) * router.scale * router.scalar_root_size).softmax(-1)
    rank = (probs.unsqueeze(-2) > probs.unsqueeze(-1)).sum(-1)
    chosen = (rank < top_k).float()
    weights = probs * chosen
    return probs, weights / weights.sum(-1, keepdim=True) * router.per_expert_scale, chosen


def experts(module: Any, x: Tensor, weights: Tensor) -> Tensor:
    count, twice, hidden = module.gate_up_proj.shape
    h = functional.linear(x, module.gate_up_proj.reshape(count * twice, hidden)).unflatten(-1, (count, 2, twice // 2))
    h = module.act_fn(h[..., 0, :]) * h[..., 1, :] * weights.unsqueeze(-1).to(h.dtype)
    return functional.linear(h.flatten(-2), module.down_proj.permute(1, 0, 2).reshape(hidden, count * twice // 2))


def dropped(h: Tensor, share: Tensor | None) -> Tensor:
    """Dropout, its share [batch, 1, 1] a sequence's own."""
    return h if share is None else h * (torch.rand_like(h) >= share) / (1 - share)


def block(
    layer: Any, x: Tensor, rope: Rope, mask: Tensor, keys: Keys, top_k: int, drop: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of either side, as transformers' forward; also returns the router's probabilities and choices."""
    h, _ = layer.self_attn(
        layer.input_layernorm(x), position_embeddings=rope, attention_mask=mask, past_key_values=keys
    )
    x = x + dropped(layer.post_attention_layernorm(h), drop)
    dense = layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(x)))
    probs, weights, chosen = route(layer.router, x, top_k)
    sparse = layer.post_feedforward_layernorm_2(experts(layer.experts, layer.pre_feedforward_layernorm_2(x), weights))
    out = dropped(layer.post_feedforward_layernorm(dense + sparse), drop)
    return (x + out) * layer.layer_scalar, probs, chosen


def run_side(
    side: Any,
    rotary: Any,
    config: Any,
    x: Tensor,
    positions: Tensor,
    masks: dict[str, Tensor],
    keys: Keys,
    drop: Tensor | None,
) -> tuple[Tensor, Routed]:
    rope = {kind: rotary(x, positions, kind) for kind in (SLIDING, FULL)}
    routed = []
    for layer, kind in zip(side.layers, config.layer_types, strict=True):
        x, probs, chosen = block(layer, x, rope[kind], masks[kind], keys, config.top_k_experts, drop)
        routed.append((probs, chosen))
    return side.norm(x), routed


def masks_for(ids: Tensor, starts: Tensor, window: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Boolean masks [batch, 1, queries, keys] of the encoder and of the decoder."""
    segment = (ids == BOS).cumsum(-1)
    at = torch.arange(ids.shape[1], device=ids.device)
    causal = (at[:, None] >= at) & (segment[:, :, None] == segment[:, None, :])
    near = at[:, None] - at < window
    n = starts.shape[1]
    owner = torch.arange(n, device=ids.device).repeat_interleave(CANVAS)
    start = starts.repeat_interleave(CANVAS, dim=1)[:, :, None]
    before = (at < start) & (
        segment[:, None, :] == segment.gather(1, starts - 1).repeat_interleave(CANVAS, dim=1)[:, :, None]
    )
    own = (owner[:, None] == owner).expand(ids.shape[0], -1, -1)
    full = torch.cat([before, own], -1)
    slide = torch.cat([before & (at > start - window), own], -1)
    encoder = {FULL: causal[:, None], SLIDING: (causal & near)[:, None]}
    return encoder, {FULL: full[:, None], SLIDING: slide[:, None]}


def forward(
    model: Any,
    ids: Tensor,
    starts: Tensor,
    canvases: list[Tensor],
    temperature: Tensor,
    keep: Tensor,
    own: Tensor | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routed, Routed]:
    """Encoder logits, decoder logits and the routing of both.

    `canvases` [batch, n * 64] are decoded in turn; each one's logits, divided by `temperature`, condition the next
    where `keep` is 1. Only the last is differentiated, and only its logits are returned. Where `own` is true a token
    sampled from the logits before replaces the last canvas's. drop: see dropped().
    """
    config, decoder, encoder = model.config.text_config, model.model.decoder, model.model.encoder.language_model
    table, scale, cap = decoder.embed_tokens.weight, config.hidden_size**0.5, config.final_logit_softcapping
    enc_masks, dec_masks = masks_for(ids, starts, config.sliding_window)
    keys = Keys(config.num_hidden_layers)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    h, enc_routed = run_side(
        encoder, decoder.rotary_emb, config, functional.embedding(ids, table) * scale, positions, enc_masks, keys, drop
    )
    enc_logits = cap * torch.tanh(functional.linear(h, table).float() / cap)
    positions = (starts[:, :, None] + torch.arange(CANVAS, device=ids.device)).flatten(1)

    def decode(canvas: Tensor, soft: Tensor | None) -> tuple[Tensor, Routed]:
        x = functional.embedding(canvas, table) * scale
        x = decoder.self_conditioning(x, torch.zeros_like(x) if soft is None else soft)
        h, routed = run_side(decoder, decoder.rotary_emb, config, x, positions, dec_masks, keys, drop)
        return cap * torch.tanh(functional.linear(h, table).float() / cap), routed

    soft: Tensor | None = None
    last = canvases[-1]
    for canvas in canvases[:-1]:
        with torch.no_grad():
            logits = decode(canvas, soft)[0] / temperature
            soft = logits.softmax(-1).to(table.dtype) @ table * scale * keep
            if own is not None:
                gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)))
                last = torch.where(own, (logits + gumbel).argmax(-1), last)
    dec_logits, dec_routed = decode(last, soft)
    return enc_logits, dec_logits, enc_routed, dec_routed
