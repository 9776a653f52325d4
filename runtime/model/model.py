"""The text model: two passes over one set of packed weights.

    encode   prompt, later each finished block   causal          writes the cache
    decode   a noisy canvas                      bidirectional   reads the cache; logits for every canvas position

             canvas ids ── embed ──(+)── norm ── layers ── norm ── head ── logits
    logits of the step before ── softmax ── @ E ── MLP ──┘             (self-conditioning; zeros at the first step)

The weights are any mapping canonical name -> Packed, so that a BF16 checkpoint, a .gguf and a mixture of formats are
the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.types import Packed
from dgq.runtime.adapters.beside import Choice, changing, load_choice
from dgq.runtime.kernels.repack import Tiles
from dgq.runtime.model.attention import decoder_mask, encoder_mask, rope_frequencies, rope_tables
from dgq.runtime.model.block import BatchKeys, Layer
from dgq.runtime.model.cache import Cache
from dgq.runtime.model.layers import Observer, decoded, embed, gated_mlp, head, rms_norm, soft_embed
from dgq.runtime.model.loading import DEFAULT_OPTIONS, ForKernels, LoadOptions, load_for_kernels
from dgq.runtime.shape.config import LayerConfig, ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, VISION, check_tensors, expected_tensors
from dgq.runtime.shape.pictured import Pictures

if TYPE_CHECKING:
    from dgq.runtime.model.session import Session


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of activations on a device unless another is asked for: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


class Model:
    """DiffusionGemma's text model on one device.

    dtype: of activations, and what weights are decoded to; float32 on a CPU and bfloat16 elsewhere unless given.
    Norms, softmaxes, the router's probabilities and logits are float32 in any case.

    The model owns one session (session.py): the memory and the CUDA graphs of its last batch, which the next batch
    uses again if they fit it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Packed],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        source: str = "weights",
        observe: Observer | None = None,
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Check the weights and move them to the device; vision tensors are passed over. InputError for a missing,
        unknown or mis-shaped tensor, in which `source` names the file. observe: see layers.Observer."""
        expected = expected_tensors(config)
        # Names are checked now and shapes when each weight is read, since reading can be expensive.
        check_tensors({n: expected.get(n, ()) for n in weights if not n.startswith(VISION)}, expected, source)
        self.config, self._source = config, source
        self._session: Session | None = None
        self.device = torch.device(device)
        self.dtype = dtype or default_dtype(self.device)
        on_gpu = self.device.type == "cuda" and self.dtype == torch.bfloat16
        able = on_gpu and not options.activations and observe is None
        self.kernels: ForKernels | None = None
        self.choice = load_choice(options.adapters, options.active, weights, (self.device, self.dtype))
        self._observe, self._activations, self._keeps_decoded = observe, options.activations, False
        if able if options.kernels is None else options.kernels:
            changed = self.choice.adapters.changed if self.choice else frozenset()
            self.kernels = load_for_kernels(config, weights, self.device, source, options.vram, changed)
            self.weights = self.kernels.weights
        else:
            self.weights = self._load(weights, options.keep_decoded)
        self._build()

    def _build(self) -> None:
        """Make everything that is made of the weights: layers, scalars, norms, RoPE frequencies."""
        config, layers = self.config, range(len(self.config.layers))
        self.layers = self._layers("decoder")
        self._encoder_layers = self.layers if self.choice is None else self._layers("encoder")
        self.decoder_scalars = [self._vector(f"{DECODER}layers.{i}.layer_scalar", self.dtype) for i in layers]
        self.encoder_scalars = [self._vector(f"{ENCODER}layers.{i}.layer_scalar", self.dtype) for i in layers]
        self.final_norm = self._vector(DECODER + "norm.weight", torch.float32)
        self._condition = self._below(DECODER + "self_conditioning.")
        gate, up, down = (self._condition[f"{part}_proj.weight"] for part in ("gate", "up", "down"))
        self.condition_mlp = (gate, up, down)
        self.condition_norm = self._condition["pre_norm.weight"].dequantize(torch.float32)
        self.frequencies = {
            layer.is_sliding: rope_frequencies(config, layer).to(self.device) for layer in config.layers
        }

    def _layers(self, side: str) -> list[Layer]:
        """The layers as one side runs them: their products are changed by that side's adapters."""
        observe = changing(self.choice, side, self._observe)
        return [
            Layer(self.config, i, self._below(f"{DECODER}layers.{i}."), self.dtype, observe, self.routed(i))
            for i in range(len(self.config.layers))
        ]

    def use(self, choice: Choice) -> None:
        """Choose adapters by this choice from now on. What was captured for another one is given up."""
        self.drop_session()
        self.choice = choice
        self._build()

    @property
    def session(self) -> Session | None:
        """The session that the model owns, if a batch was started on one."""
        return self._session

    def keep_session(self, session: Session) -> Session:
        """Own this session, in the place of the one before."""
        self._session = session
        return session

    def drop_session(self) -> None:
        """Give up the session; its memory and graphs are free as soon as nobody else holds it."""
        self._session = None

    @property
    def table(self) -> Packed:
        """The embedding, (vocab, hidden): also the head."""
        return self.weights[EMBEDDING]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory; with kernels, of those on the GPU."""
        beside = self.choice.adapters.nbytes if self.choice else 0
        return beside + (
            self.kernels.nbytes if self.kernels else sum(weight.nbytes for weight in self.weights.values())
        )

    def replaced(self, weights: Mapping[str, Packed]) -> Model:
        """A copy of this model with other values of some weights, which shares all other weights with this one. Only
        models without kernels can be copied so."""
        if self.kernels is not None:
            raise ValueError("weights that were repacked for the kernels cannot be replaced")
        other = copy(self)
        other.drop_session()
        moved = self._moved(weights, weights)
        other.weights = self.weights | (self._all_decoded(moved) if self._keeps_decoded else moved)
        other._build()
        return other

    def new_cache(self, rows: int, capacity: int = 0) -> Cache:
        """An empty cache for a batch of `rows` rows. capacity: tokens, canvas included, to make room for at once."""
        return Cache(self.config, rows, self.device, self.dtype, capacity)

    @torch.inference_mode()
    def encode(
        self,
        ids: Tensor,
        cache: Cache,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        images: Pictures | None = None,
    ) -> None:
        """Append tokens to the cache: ids (rows, tokens) int64; the cache grows by `tokens`.

        positions: (rows or 1, tokens) int64; they count on from the cache, padding included, unless given. padding:
        (rows, tokens) bool, True where a row has no token, which may only be left of the row's first token. images:
        those among the tokens.
        """
        new = ids.shape[1]
        self._refuse_offloaded()
        if positions is None:
            positions = cache.positions(new)
        real = cache.seen(new, padding)
        masks: dict[bool, Tensor | None] = {
            layer.is_sliding: encoder_mask(
                cache.length, new, cache.held(i), self.config.window if layer.is_sliding else None, real, self.device,
                images,
            )
            for i, layer in self._one_of_each()
        }  # fmt: skip
        self.append(ids, positions, masks, cache, images)
        cache.commit(new, real)

    @torch.inference_mode()
    def decode(self, canvas: Tensor, cache: Cache, self_conditioning_logits: Tensor | None = None) -> Tensor:
        """Logits (rows, canvas, vocab) float32 for canvas (rows, canvas) int64; the cache is not changed.

        self_conditioning_logits: the previous step's, (rows, canvas, vocab) in any float dtype; None on the first step.
        """
        return self.logits(self.hidden(canvas, cache, self_conditioning_logits))

    @torch.inference_mode()
    def hidden(self, canvas: Tensor, cache: Cache, self_conditioning_logits: Tensor | None = None) -> Tensor:
        """The normed hidden states that decode() hands to the head: (rows, canvas, hidden) in the model's dtype."""
        self._refuse_offloaded()
        new = canvas.shape[1]
        masks = {
            layer.is_sliding: decoder_mask(cache.length, new, cache.held(i), cache.real)
            for i, layer in self._one_of_each()
        }
        logits = self_conditioning_logits
        soft = None if logits is None else soft_embed(logits, self.table, self.dtype)
        return self.refined(canvas, soft, cache.positions(new), masks, cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head's product, capped: hidden (…, hidden) -> (…, vocab) float32."""
        return head(hidden, self.table, self.config.softcap)

    def refined(
        self, ids: Tensor, soft: Tensor | None, positions: Tensor, masks: Mapping[bool, Tensor | None], cache: BatchKeys
    ) -> Tensor:
        """hidden() on any cache. soft: (rows, canvas, hidden), the expected embedding under the previous step's logits;
        positions: (rows or 1, canvas); masks: for sliding layers (True) and full ones, as attention.attend() takes
        them."""
        x = self._conditioned(embed(ids, self.table, self.dtype), soft)
        x = self._run(x, positions, masks, cache, (self.layers, self.decoder_scalars))
        return rms_norm(x, self.final_norm, self.config.norm_eps)

    def append(
        self,
        ids: Tensor,
        positions: Tensor,
        masks: Mapping[bool, Tensor | None],
        cache: BatchKeys,
        images: Pictures | None = None,
    ) -> None:
        """encode() on any cache; the tokens are written and not committed."""
        x = embed(ids, self.table, self.dtype)
        if images is not None:
            images.put_into(x)
        self._run(x, positions, masks, cache, (self._encoder_layers, self.encoder_scalars))

    def _refuse_offloaded(self) -> None:
        if self.kernels is not None and self.choice is not None and self.choice.adapters.changes_experts:
            raise InputError("an adapter changes experts: by kernels, only generate() with rng=counter applies it")
        if self.kernels is not None and self.kernels.offload is not None:
            raise InputError("experts are in host memory (--vram): only generate() with rng=counter brings them")

    def refuse_weights(self) -> NoReturn:
        """Explain logits that are not a number: InputError naming the first weight that holds such a value."""
        for name, weight in self.weights.items():
            pieces = [weight] if len(weight.shape) < 3 else [weight[e] for e in range(weight.shape[0])]
            if not all(bool(piece.dequantize(torch.float32).isfinite().all()) for piece in pieces):
                raise InputError(f"{self._source}: {name} holds values that are not finite; the file is damaged")
        raise InputError(f"{self._source}: the logits are not a number, though every weight is; try --dtype fp32")

    def _conditioned(self, x: Tensor, soft: Tensor | None) -> Tensor:
        if soft is not None:
            soft = rms_norm(soft, self.condition_norm, self.config.norm_eps)
            # Before the first step the signal is zero, and so is the output of an MLP without biases.
            watch = changing(self.choice, "decoder", None, DECODER + "self_conditioning.")
            x = x + gated_mlp(soft, self.condition_mlp, watch)
        return rms_norm(x, None, self.config.norm_eps)

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        masks: Mapping[bool, Tensor | None],
        cache: BatchKeys,
        side: tuple[list[Layer], list[Tensor]],
    ) -> Tensor:
        """x (rows, tokens, hidden) through all layers. side: the layers as encoder or decoder runs them, and its
        scalars."""
        if self.choice is not None:
            self.choice.begin(*x.shape[:2])
        tables = {sliding: rope_tables(f, positions, self.dtype) for sliding, f in self.frequencies.items()}
        for layer, scalar in zip(*side, strict=True):
            sliding = layer.shape.is_sliding
            x = layer(x, tables[sliding], masks[sliding], cache, scalar)
        return x

    def _one_of_each(self) -> list[tuple[int, LayerConfig]]:
        """One sliding and one full layer with their numbers: all layers of a kind share a mask."""
        return list({layer.is_sliding: (i, layer) for i, layer in enumerate(self.config.layers)}.values())

    def _load(self, weights: Mapping[str, Packed], keep_decoded: int) -> dict[str, Packed]:
        loaded = self._moved(weights, expected_tensors(self.config))
        if self._activations and not any("input_scale" in weight.parts for weight in loaded.values()):
            raise InputError(
                f"{self._source}: holds no input scales, which --activations {self._activations} needs (W4A4)"
            )
        elements = sum(weight.numel for weight in loaded.values())
        self._keeps_decoded = elements * self.dtype.itemsize <= keep_decoded
        return self._all_decoded(loaded) if self._keeps_decoded else loaded

    def _moved(self, weights: Mapping[str, Packed], names: Iterable[str]) -> dict[str, Packed]:
        """The named weights, their shapes checked, on the device."""
        shapes, moved = expected_tensors(self.config), {}
        for name in names:
            weight = weights[name]
            check_tensors({name: weight.shape}, {name: shapes[name]}, self._source)
            kept = {k: v for k, v in weight.parts.items() if k != "input_scale" or self._activations}
            moved[name] = Packed(weight.scheme, weight.shape, kept).to(self.device)
        return moved

    def _all_decoded(self, weights: dict[str, Packed]) -> dict[str, Packed]:
        # Vectors keep their precision: norms are computed in float32 whatever the model's dtype is.
        return {name: decoded(w, self.dtype) if len(w.shape) > 1 else w for name, w in weights.items()}

    def _below(self, prefix: str) -> dict[str, Packed]:
        return {name[len(prefix) :]: weight for name, weight in self.weights.items() if name.startswith(prefix)}

    def routed(self, index: int) -> tuple[Tiles, Tiles] | None:
        """gate_up and down of layer `index`'s experts as the kernels read them; None without kernels."""
        if self.kernels is None:
            return None
        offload = self.kernels.offload
        return offload.weights(index) if offload and index in offload else self.kernels.experts[index]

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[name].dequantize(dtype)
