"""The model one layer at a time, over many sequences at once, with hooks on its products.

    chunks of sequences          layer 0      layer 1      …       head
      prompt | canvases          ┌──────┐     ┌──────┐
      prompt | canvases   x ───> │ read │ ──> │ read │ ──> … ──>  logits of a chunk
      prompt | canvases          └──────┘     └──────┘
                            hidden states lie in a file between two layers

In memory are one layer's weights at a time (stored as they are if they are BF16, and then decoded piece by piece), a
chunk's hidden states, and the table of embeddings only before and after the layers. The decoder of a layer reads only
that layer's keys, so prompt and canvases go through together: first attention, sequence by sequence; then the rest,
FEED_TOKENS tokens at a time, which are many, because experts want many. A chunk's results do not depend on the other
chunks.

The model is gone through backwards as well: pull() makes the gradient at a layer's input of the one at its output. It
computes the layer anew, by the same steps in turn. The loss is the cross entropy of tokens that are drawn from the
distribution of the model itself. The mean of a gradient's square then is the curvature of KL(this model || a changed
one), which says how much a change of a weight matters in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.hooks import BackwardHook, ForwardHook, GradientTap
from dgq.quant.types import Packed
from dgq.runtime.model.attention import encoder_mask, rope_frequencies, rope_tables
from dgq.runtime.model.block import Layer
from dgq.runtime.model.layers import Observer, decoded, embed, gated_mlp, head, head_gradient, rms_norm, soft_embed
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER

CONDITION = DECODER + "self_conditioning."
HEAD_TOKENS = 1 << 9  # of which logits are made at once: 512 MiB in float32 at 262,144
FEED_TOKENS = {
    "cpu": 1 << 11,
    "cuda": 1 << 13,
}  # through a layer's second half at once; of the 26B each holds 0.6 MB


class _PromptKeys:
    """The cache of one layer and one sequence: the prompt's keys and values, for the canvases behind it."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._held: tuple[Tensor, Tensor] | None = None

    def starts(self, layer: int) -> None:
        return None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._held is None:
            last = slice(None) if self._window is None else slice(1 - self._window, None)
            self._held = keys[:, :, last], values[:, :, last]
            return keys, values
        k, v = (torch.cat((old.expand(len(new), -1, -1, -1), new), 2)
                for old, new in zip(self._held, (keys, values), strict=True))  # fmt: skip
        return k, v


class Stream:
    """The model over any mapping canonical name -> Packed, of which a weight is read when its layer's turn comes."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Packed], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self._weights = weights
        self._embedding: Packed | None = None
        self._condition = {name: self._load(CONDITION + name) for name in self._below(CONDITION)}
        self._norm = self._load(DECODER + "norm.weight").dequantize(torch.float32)
        self._frequencies = {
            layer.is_sliding: rope_frequencies(config, layer).to(self.device) for layer in config.layers
        }

    @torch.inference_mode()
    def enter(self, chunk: Chunk, soft: Tensor | None, hook: ForwardHook | None = None) -> Tensor:
        """Embed a chunk: (tokens, hidden), its prompts' tokens and then its canvases'. soft (n, canvas, hidden):
        expected embeddings that canvases are conditioned on; a row of zeros is no conditioning, as in the model."""
        return self._enter(chunk, soft, hook)

    @torch.enable_grad()
    def pull_enter(self, chunk: Chunk, soft: Tensor, gradient: Tensor, hook: BackwardHook) -> None:
        """The way back through enter(): gradient (tokens, hidden) at what it returned."""
        soft = soft.to(self.device, self.dtype).requires_grad_()
        self._enter(chunk, soft, GradientTap(hook)).backward(gradient.to(self.device))

    def _enter(self, chunk: Chunk, soft: Tensor | None, hook: ForwardHook | None) -> Tensor:
        ids = torch.tensor([token for prompt in chunk.prompts for token in prompt], device=self.device)
        canvases = embed(chunk.canvases.to(self.device), self._table, self.dtype)
        if soft is not None:
            soft = soft.to(self.device, self.dtype)
            on = soft.flatten(1).any(1)  # zeros go in nowhere, and would count as tokens
            if bool(on.any()):
                if hook is not None:
                    hook.kinds = self._kinds(chunk, on).to(self.device)
                normed = rms_norm(soft[on], self._condition["pre_norm.weight"].dequantize(torch.float32), self._eps)
                gate, up, down = (self._condition[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
                added = gated_mlp(normed, (gate, up, down), _below(hook, CONDITION))
                canvases = canvases.index_add(0, on.nonzero().flatten(), added)
        canvases = rms_norm(canvases, None, self._eps)
        return torch.cat((embed(ids, self._table, self.dtype), canvases.flatten(0, 1)))

    def layer(self, index: int, hook: ForwardHook | None = None, backward: BackwardHook | None = None) -> LayerOf:
        """Layer `index`, loaded, as a function of a chunk and its states. backward: the hook of pull(), with which
        `hook` is not called."""
        self.forget()
        hook = hook if backward is None else GradientTap(backward)
        prefix = f"{DECODER}layers.{index}."
        weights = {name: self._load(prefix + name) for name in self._below(prefix)}
        scalars = [self._load(f"{side}layers.{index}.layer_scalar").dequantize(self.dtype)
                   for side in (ENCODER, DECODER)]  # fmt: skip
        layer = Layer(self.config, index, weights, self.dtype, hook)
        return LayerOf(layer, scalars, self.config, self._frequencies[layer.shape.is_sliding], hook)

    def changed(self, layer: LayerOf, weights: Mapping[str, Packed]) -> LayerOf:
        """`layer` with other values of some of its weights, named in full; the rest is shared with it."""
        old, prefix = layer.layer, f"{DECODER}layers.{layer.layer.index}."
        changed = dict(old.weights) | {name.removeprefix(prefix): weight for name, weight in weights.items()}
        return LayerOf(
            Layer(self.config, old.index, changed, self.dtype), layer.scalars, self.config,
            self._frequencies[old.shape.is_sliding], None,
        )  # fmt: skip

    @torch.inference_mode()
    def leave(self, chunk: Chunk, x: Tensor, hook: ForwardHook | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Logits of a chunk's canvases, some at a time: which, (rows, canvas, vocab) float32."""
        for rows, normed in self._leaving(chunk, x):
            logits = head(normed, self._table, self.config.softcap)
            if hook is not None:
                hook.kinds = chunk.kind[rows].repeat_interleave(self.config.canvas).to(self.device)
                hook(EMBEDDING, normed, logits, None, None)
            yield rows, logits

    @torch.enable_grad()
    def pull_leave(self, chunk: Chunk, x: Tensor, seed: int, hook: BackwardHook) -> Tensor:
        """The way back from the loss: the gradient at x (tokens, hidden). The tokens are drawn by `seed`. For the
        head's products the hook gets the gradient's size alone, (…, 1): the gradient is as wide as the vocabulary."""
        x = x.to(self.device).requires_grad_()
        drawn = torch.Generator(self.device).manual_seed(seed)
        for _, normed in self._leaving(chunk, x):
            with torch.no_grad():
                gradient, size = head_gradient(normed, self._table, self.config.softcap, drawn)
                hook(EMBEDDING, normed, size, None)
            normed.backward(gradient)
        return _gradient(x)

    def _leaving(self, chunk: Chunk, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What goes into the head, some canvases at a time: which, and (rows, canvas, hidden)."""
        step = max(1, HEAD_TOKENS // self.config.canvas)
        canvases = x[chunk.encoded :].view(*chunk.canvases.shape, -1)
        for start in range(0, len(canvases), step):
            rows = slice(start, start + step)
            yield rows, rms_norm(canvases[rows], self._norm, self._eps)

    @torch.inference_mode()
    def soften(self, logits: Tensor) -> Tensor:
        """The expected embedding that the next step is conditioned on: (…, vocab) -> (…, hidden)."""
        return soft_embed(logits, self._table, self.dtype)

    def forget(self) -> None:
        """Drop the table of embeddings to make room; it is read again when it is wanted."""
        self._embedding = None

    @property
    def _table(self) -> Packed:
        if self._embedding is None:
            self._embedding = self._load(EMBEDDING)
        return self._embedding

    @property
    def _eps(self) -> float:
        return self.config.norm_eps

    def _kinds(self, chunk: Chunk, on: Tensor) -> Tensor:
        return chunk.kind[on.cpu()].repeat_interleave(self.config.canvas)

    def _below(self, prefix: str) -> list[str]:
        return [name[len(prefix) :] for name in self._weights if name.startswith(prefix)]

    def _load(self, name: str) -> Packed:
        weight = self._weights[name].to(self.device)
        if len(weight.shape) < 2 or weight.scheme.name == "bf16":
            return weight
        return decoded(weight, self.dtype)


class LayerOf:
    """One layer over chunks of sequences."""

    def __init__(
        self, layer: Layer, scalars: list[Tensor], config: ModelConfig, frequencies: Tensor, hook: ForwardHook | None
    ) -> None:
        self.layer, self.scalars, self._hook, self._frequencies = layer, scalars, hook, frequencies
        self._window = config.window if layer.shape.is_sliding else None

    @torch.inference_mode()
    def __call__(self, chunk: Chunk, x: Tensor) -> Tensor:
        """x (tokens, hidden), prompts and then canvases -> the same."""
        return self._through(chunk, x.to(self._frequencies.device))

    @torch.enable_grad()
    def pull(self, chunk: Chunk, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at x of the one at what the layer makes of it."""
        x, gradient = (value.to(self._frequencies.device) for value in (x, gradient))
        with torch.no_grad():
            both = self.mixed(chunk, x)
        middle, below = torch.empty_like(x), torch.empty_like(x)
        for part in self._parts(x):
            mixed = both[part].requires_grad_()
            self._fed(chunk, mixed, part).backward(gradient[part])
            middle[part] = _gradient(mixed)
        for sequence in _sequences(chunk):
            inputs = [x[rows].detach().requires_grad_() for rows in sequence.rows]
            outputs = self._mix(chunk, inputs, sequence)
            torch.autograd.backward(outputs, [middle[rows] for rows in sequence.rows])
            for rows, leaf in zip(sequence.rows, inputs, strict=True):
                below[rows] = _gradient(leaf)
        return below

    def _through(self, chunk: Chunk, x: Tensor) -> Tensor:
        both = self.mixed(chunk, x)
        return torch.cat([self._fed(chunk, both[part], part) for part in self._parts(both)])

    def mixed(self, chunk: Chunk, x: Tensor) -> Tensor:
        """The first half, in which the tokens of a sequence see each other."""
        mixed = [self._mix(chunk, [x[rows] for rows in s.rows], s) for s in _sequences(chunk)]
        return torch.cat([part for place in (0, 1) for parts in mixed for part in parts[place : place + 1]])

    def _mix(self, chunk: Chunk, x: list[Tensor], sequence: _Sequence) -> list[Tensor]:
        """x: the prompt's tokens, and those of the canvases behind it, if there are any -> the same."""
        prompt = x[0]
        keys = _PromptKeys(self._window)
        mask = encoder_mask(0, len(prompt), 0, self._window, None, prompt.device)
        mixed = [self._attended(prompt[None], 0, mask, keys, torch.zeros(1, dtype=torch.int64))[0]]
        for rows in x[1:]:
            canvases = rows.view(-1, chunk.canvases.shape[1], rows.shape[-1])
            mixed.append(self._attended(canvases, len(prompt), None, keys, chunk.kind[sequence.canvases]).flatten(0, 1))
        return mixed

    def _attended(self, x: Tensor, position: int, mask: Tensor | None, keys: _PromptKeys, kind: Tensor) -> Tensor:
        if self._hook is not None:
            self._hook.kinds = kind.repeat_interleave(x.shape[1]).to(x.device)
        positions = torch.arange(position, position + x.shape[1], device=x.device).unsqueeze(0)
        return self.layer.mix(x, rope_tables(self._frequencies, positions, x.dtype), mask, keys)

    def _fed(self, chunk: Chunk, x: Tensor, part: slice) -> Tensor:
        """The second half for tokens `part` of the chunk, of whatever sequences."""
        if self._hook is not None:
            kinds = chunk.kind.repeat_interleave(chunk.canvases.shape[1])
            self._hook.kinds = torch.cat((kinds.new_zeros(chunk.encoded), kinds))[part].to(x.device)
        decoder = torch.arange(part.start, part.stop, device=x.device).unsqueeze(1) >= chunk.encoded
        return self.layer.feed(x) * torch.where(decoder, self.scalars[1], self.scalars[0])

    def _parts(self, x: Tensor) -> Iterator[slice]:
        step = FEED_TOKENS[x.device.type]
        return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


class _Sequence(NamedTuple):
    """A prompt and its canvases. rows: their tokens among the chunk's, one slice or two; canvases: which they are."""

    rows: list[slice]
    canvases: slice


def _sequences(chunk: Chunk) -> Iterator[_Sequence]:
    size = chunk.canvases.shape[1]
    token = first = 0
    for number, prompt in enumerate(chunk.prompts):
        last = first + chunk.owner.count(number)
        rows = [slice(token, token + len(prompt)), slice(chunk.encoded + first * size, chunk.encoded + last * size)]
        yield _Sequence(rows if last > first else rows[:1], slice(first, last))
        token, first = token + len(prompt), last


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _below(hook: ForwardHook | None, prefix: str) -> Observer | None:
    if hook is None:
        return None
    return lambda name, *seen: hook(prefix + name, *seen)
