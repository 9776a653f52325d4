"""The model one layer at a time, over many sequences at once: for looking at what goes into its products.

    chunks of sequences          layer 0      layer 1      …       head
      prompt | canvases          ┌──────┐     ┌──────┐
      prompt | canvases   x ───> │ read │ ──> │ read │ ──> … ──>  logits of a chunk
      prompt | canvases          └──────┘     └──────┘
                            hidden states lie in a file between two layers

One layer's weights are in memory at a time, and one chunk's activations. The decoder of a layer reads only that layer's
keys, so prompt and canvases go through together: first attention, sequence by sequence; then the rest for all the
chunk's tokens at once, as experts like it. A chunk's results do not depend on the other chunks.

It also goes backwards: pull() makes the gradient at a layer's input of the one at its output, computing the layer anew.
The loss is the cross entropy of tokens drawn from the model's own distribution, so that the mean of a gradient's square
is the curvature of KL(this model || a changed one): what a change of a weight would be felt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from dgq.quant.schemes import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.attention import encoder_mask, rope_frequencies, rope_tables
from dgq.runtime.block import Layer
from dgq.runtime.config import ModelConfig
from dgq.runtime.layers import Observer, embed, gated_mlp, head, head_gradient, rms_norm, soft_embed
from dgq.runtime.names import DECODER, EMBEDDING, ENCODER

CONDITION = DECODER + "self_conditioning."
HEAD_TOKENS = 1 << 9  # of which logits are made at once: 512 MiB in float32 at 262,144
_PLAIN = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Chunk:
    """Some sequences. prompts: their ids; canvases (n, canvas) int64, those of a prompt together, in its order;
    owner: of each canvas, its prompt; kind (n,) int64: any label; prompts' tokens have label 0."""

    prompts: tuple[tuple[int, ...], ...]
    canvases: Tensor
    owner: tuple[int, ...]
    kind: Tensor

    @property
    def encoded(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens(self) -> int:
        return self.encoded + self.canvases.numel()


class Watch(Protocol):
    """An Observer of products; see layers. kinds int64 (tokens,) is set before: labels of the rows, or of the tokens
    that an expert's rows are counted by."""

    kinds: Tensor

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor: ...


Sense = Callable[[str, Tensor, Tensor, int | None], None]
"""Told of products on the way back: the weight's name, x (…, in) that went in, the gradient g (…, out) at what came
out, and the expert's number."""


class _Tap(torch.autograd.Function):
    """The identity, which tells the gradient that comes back through it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.tell = tell
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell(gradient)
        return gradient, None


class _Tapped:
    """A Watch by which `sense` is told of products on the way back."""

    kinds: Tensor

    def __init__(self, sense: Sense) -> None:
        self._sense = sense

    def __call__(self, name: str, x: Tensor, y: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor:
        kept = x.detach()

        def tell(gradient: Tensor) -> None:
            self._sense(name, kept, gradient, expert)

        tapped: Tensor = _Tap.apply(y, tell)  # type: ignore[no-untyped-call]
        return tapped


class States:
    """Hidden states of every chunk, flat (tokens, hidden), in an unbuffered file. tokens: of each chunk."""

    def __init__(self, file: BinaryIO, tokens: Sequence[int], hidden: int, dtype: torch.dtype) -> None:
        self.file, self._hidden, self._dtype = file, hidden, dtype
        self._starts = list(accumulate(tokens, initial=0))

    def write(self, number: int, x: Tensor) -> None:
        data = x.to(self._dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        at = self._starts[number] * self._hidden * self._dtype.itemsize
        while data:
            done = os.pwrite(self.file.fileno(), data, at)
            data, at = data[done:], at + done

    def read(self, number: int) -> Tensor:
        tokens = self._starts[number + 1] - self._starts[number]
        size, at = tokens * self._hidden * self._dtype.itemsize, self._starts[number] * self._hidden
        data = bytearray()
        while len(data) < size:
            piece = os.pread(self.file.fileno(), size - len(data), at * self._dtype.itemsize + len(data))
            if not piece:
                raise OSError(f"hidden states of chunk {number} end after {len(data)} of {size} bytes")
            data += piece
        return torch.frombuffer(data, dtype=self._dtype).view(tokens, self._hidden)


class _Keys:
    """The cache of one layer and one sequence: the prompt's keys, for the canvases behind it."""

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
    """The model over weights: any mapping canonical name -> Packed, each read when its layer's turn comes."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Packed], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self._weights = weights
        self._table = self._load(EMBEDDING)
        self._condition = {name: self._load(CONDITION + name) for name in self._below(CONDITION)}
        self._norm = self._load(DECODER + "norm.weight").dequantize(torch.float32)
        self._frequencies = {
            layer.is_sliding: rope_frequencies(config, layer).to(self.device) for layer in config.layers
        }

    @torch.inference_mode()
    def enter(self, chunk: Chunk, soft: Tensor | None, watch: Watch | None = None) -> Tensor:
        """Embed a chunk: (tokens, hidden), its prompts' tokens and then its canvases'. soft (n, canvas, hidden):
        expected embeddings that canvases are conditioned on; a row of zeros is no conditioning, as in the model."""
        return self._enter(chunk, soft, watch)

    @torch.enable_grad()
    def pull_enter(self, chunk: Chunk, soft: Tensor, gradient: Tensor, sense: Sense) -> None:
        """The way back through enter(): gradient (tokens, hidden) at what it returned."""
        soft = soft.to(self.device, self.dtype).requires_grad_()
        self._enter(chunk, soft, _Tapped(sense)).backward(gradient.to(self.device))

    def _enter(self, chunk: Chunk, soft: Tensor | None, watch: Watch | None) -> Tensor:
        ids = torch.tensor([token for prompt in chunk.prompts for token in prompt], device=self.device)
        canvases = embed(chunk.canvases.to(self.device), self._table, self.dtype)
        if soft is not None:
            soft = soft.to(self.device, self.dtype)
            on = soft.flatten(1).any(1)  # zeros go in nowhere, and would count as tokens
            if bool(on.any()):
                if watch is not None:
                    watch.kinds = self._kinds(chunk, on).to(self.device)
                found = rms_norm(soft[on], self._condition["pre_norm.weight"].dequantize(torch.float32), self._eps)
                gate, up, down = (self._condition[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
                added = gated_mlp(found, (gate, up, down), _below(watch, CONDITION))
                canvases = canvases.index_add(0, on.nonzero().flatten(), added)
        canvases = rms_norm(canvases, None, self._eps)
        return torch.cat((embed(ids, self._table, self.dtype), canvases.flatten(0, 1)))

    def layer(self, index: int, watch: Watch | None = None, sense: Sense | None = None) -> LayerOf:
        """Layer `index`, loaded, as a function of a chunk and its states. sense: what pull() tells."""
        watch = watch if sense is None else _Tapped(sense)
        prefix = f"{DECODER}layers.{index}."
        weights = {name: self._load(prefix + name) for name in self._below(prefix)}
        scalars = [self._load(f"{side}layers.{index}.layer_scalar").dequantize(self.dtype)
                   for side in (ENCODER, DECODER)]  # fmt: skip
        layer = Layer(self.config, index, weights, self.dtype, watch)
        return LayerOf(layer, scalars, self.config, self._frequencies[layer.shape.is_sliding], watch)

    @torch.inference_mode()
    def leave(self, chunk: Chunk, x: Tensor, watch: Watch | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Logits of a chunk's canvases, some at a time: which, (rows, canvas, vocab) float32."""
        for rows, normed in self._leaving(chunk, x):
            logits = head(normed, self._table, self.config.softcap)
            if watch is not None:
                watch.kinds = chunk.kind[rows].repeat_interleave(self.config.canvas).to(self.device)
                watch(EMBEDDING, normed, logits, None, None)
            yield rows, logits

    @torch.enable_grad()
    def pull_leave(self, chunk: Chunk, x: Tensor, seed: int, sense: Sense) -> Tensor:
        """The way back from the loss: the gradient at x (tokens, hidden). The tokens are drawn by `seed`. Of the head's
        products sense is told the gradient's size alone, (…, 1): the gradient is as wide as the vocabulary."""
        x = x.to(self.device).requires_grad_()
        drawn = torch.Generator(self.device).manual_seed(seed)
        for _, normed in self._leaving(chunk, x):
            with torch.no_grad():
                found, size = head_gradient(normed, self._table, self.config.softcap, drawn)
                sense(EMBEDDING, normed, size, None)
            normed.backward(found)
        assert x.grad is not None
        return x.grad

    def _leaving(self, chunk: Chunk, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What goes into the head, some canvases at a time."""
        step = max(1, HEAD_TOKENS // self.config.canvas)
        canvases = x[chunk.encoded :].view(*chunk.canvases.shape, -1)
        for start in range(0, len(canvases), step):
            rows = slice(start, start + step)
            yield rows, rms_norm(canvases[rows], self._norm, self._eps)

    @torch.inference_mode()
    def soften(self, logits: Tensor) -> Tensor:
        """The expected embedding that the next step is conditioned on: (…, vocab) -> (…, hidden)."""
        return soft_embed(logits, self._table, self.dtype)

    @property
    def _eps(self) -> float:
        return self.config.norm_eps

    def _kinds(self, chunk: Chunk, on: Tensor) -> Tensor:
        return chunk.kind[on.cpu()].repeat_interleave(self.config.canvas)

    def _below(self, prefix: str) -> list[str]:
        return [name[len(prefix) :] for name in self._weights if name.startswith(prefix)]

    def _load(self, name: str) -> Packed:
        weight = self._weights[name]
        if len(weight.shape) < 2:
            return weight.to(self.device)
        moved = weight.to(self.device)
        scale = {part: value for part, value in moved.parts.items() if part == "input_scale"}
        return Packed(SCHEMES[_PLAIN[self.dtype]], weight.shape, {"": moved.dequantize(self.dtype)} | scale)


class LayerOf:
    """One layer over chunks of sequences."""

    def __init__(
        self, layer: Layer, scalars: list[Tensor], config: ModelConfig, frequencies: Tensor, watch: Watch | None
    ) -> None:
        self.layer, self._scalars, self._watch, self._frequencies = layer, scalars, watch, frequencies
        self._window = config.window if layer.shape.is_sliding else None

    @torch.inference_mode()
    def __call__(self, chunk: Chunk, x: Tensor) -> Tensor:
        """x (tokens, hidden), prompts and then canvases -> the same."""
        return self._through(chunk, x.to(self._frequencies.device))

    @torch.enable_grad()
    def pull(self, chunk: Chunk, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at x of the one at what the layer makes of it."""
        x = x.to(self._frequencies.device).requires_grad_()
        self._through(chunk, x).backward(gradient.to(x.device))
        assert x.grad is not None
        return x.grad

    def mixed(self, chunk: Chunk, x: Tensor) -> Tensor:
        """After the first half of the layer, where tokens see each other: x (tokens, hidden) -> the same."""
        prompts, canvases = x[: chunk.encoded], x[chunk.encoded :].view(*chunk.canvases.shape, -1)
        mixed, later = [], []
        first = 0
        for number, (prompt, rows) in enumerate(
            zip(chunk.prompts, prompts.split([len(prompt) for prompt in chunk.prompts]), strict=True)
        ):
            keys = _Keys(self._window)
            mask = encoder_mask(0, len(prompt), 0, self._window, None, x.device)
            mixed.append(self._mix(rows[None], 0, mask, keys, torch.zeros(1, dtype=torch.int64))[0])
            own = slice(first, first + chunk.owner.count(number))
            first = own.stop
            if own.stop > own.start:
                later.append(self._mix(canvases[own], len(prompt), None, keys, chunk.kind[own]).flatten(0, 1))
        return torch.cat((*mixed, *later))

    def _through(self, chunk: Chunk, x: Tensor) -> Tensor:
        both = self.mixed(chunk, x)
        if self._watch is not None:
            canvas = chunk.canvases.shape[1]
            before = torch.zeros(chunk.encoded, dtype=torch.int64)
            self._watch.kinds = torch.cat((before, chunk.kind.repeat_interleave(canvas))).to(x.device)
        out = self.layer.feed(both)
        return torch.cat((out[: chunk.encoded] * self._scalars[0], out[chunk.encoded :] * self._scalars[1]))

    def _mix(self, x: Tensor, position: int, mask: Tensor | None, keys: _Keys, kind: Tensor) -> Tensor:
        if self._watch is not None:
            self._watch.kinds = kind.repeat_interleave(x.shape[1]).to(x.device)
        positions = torch.arange(position, position + x.shape[1], device=x.device).unsqueeze(0)
        return self.layer.mix(x, rope_tables(self._frequencies, positions, x.dtype), mask, keys)


def _below(watch: Watch | None, prefix: str) -> Observer | None:
    if watch is None:
        return None
    return lambda name, *seen: watch(prefix + name, *seen)
