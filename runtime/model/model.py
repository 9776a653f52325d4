"""The text model: two passes over one set of packed weights.

    encode   prompt, later each finished block   causal          writes the cache
    decode   a noisy canvas                      bidirectional   reads the cache; logits for every canvas position

             canvas ids ── embed ──(+)── norm ── layers ── norm ── head ── logits
    logits of the step before ── softmax ── @ E ── MLP ──┘             (self-conditioning; zeros at the first step)

The weights are any mapping canonical name -> Packed, so a BF16 checkpoint, a .gguf and a mixture are the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.quant.types import Packed
from dgq.runtime.kernels.repack import Tiles
from dgq.runtime.model.attention import decoder_mask, encoder_mask, rope_frequencies, rope_tables
from dgq.runtime.model.block import Batch, Layer
from dgq.runtime.model.cache import Cache
from dgq.runtime.model.layers import Observer, decoded, embed, gated_mlp, head, rms_norm, soft_embed
from dgq.runtime.model.loading import ForKernels, decodes, for_kernels, read_ahead
from dgq.runtime.model.memory import CONTEXT, GIB, SHORT, working_bytes
from dgq.runtime.shape.config import LayerConfig, ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, VISION, check_tensors, expected_tensors
from dgq.runtime.shape.pictured import Pictures

if TYPE_CHECKING:
    from dgq.runtime.model.session import Session

# Models whose weights, decoded, stay below this many bytes are decoded once instead of at every use. The 26B is far
# above on any machine, the small models that tests and first tries run on are far below.
KEEP_DECODED = 1 << 28


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Of activations: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


class Model:
    """DiffusionGemma's text model on one device.

    dtype: of activations, and what weights are decoded to; float32 on CPU and bfloat16 elsewhere unless given.
    Norms, softmaxes, the router's probabilities and logits are float32 in any case. In bfloat16 on a GPU the routed
    experts are repacked for moe.py's kernels, unless something looks at their products: observe, or activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Packed],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        source: str = "weights",
        keep_decoded: int = KEEP_DECODED,
        activations: str | None = None,
        observe: Observer | None = None,
        kernels: bool | None = None,
        vram: int | None = None,
    ) -> None:
        """Check and move the weights. InputError for a missing, unknown or mis-shaped tensor; source is the file's
        name in it. Vision tensors are passed over. keep_decoded: see KEEP_DECODED, 0 = decode at every use.

        activations: None, or "nvfp4" to round the inputs of weights that carry an input scale, as W4A4 kernels do.
        observe: sees every product of the layers; see layers.Observer. kernels: whether to repack weights for the
        kernels; as said above unless given, and only bfloat16 can. vram: bytes of the GPU to use, all unless given.
        """
        expected = expected_tensors(config)
        # names now, shapes when each weight was read: reading can be expensive
        check_tensors({n: expected.get(n, ()) for n in weights if not n.startswith(VISION)}, expected, source)
        self.config, self._source = config, source
        self.session: Session | None = None  # the memory and graphs of the last batch
        self.device = torch.device(device)
        self.dtype = dtype or default_dtype(self.device)
        able = self.device.type == "cuda" and self.dtype == torch.bfloat16 and not activations and observe is None
        self.kernels: ForKernels | None = None
        self._observe, self._activations, self._keeps_decoded = observe, activations, False
        if able if kernels is None else kernels:
            self.kernels = self._load_for_kernels(weights, vram)
            self.weights = self.kernels.weights
        else:
            self.weights = self._load(weights, keep_decoded)
        self._build()

    def _build(self) -> None:
        """Everything that is made of the weights."""
        config, layers = self.config, range(len(self.config.layers))
        self.layers = [
            Layer(config, i, self._below(f"{DECODER}layers.{i}."), self.dtype, self._observe, self.routed(i))
            for i in layers
        ]
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

    @property
    def table(self) -> Packed:
        """The embedding, (vocab, hidden): also the head."""
        return self.weights[EMBEDDING]

    @property
    def nbytes(self) -> int:
        """Of the weights in memory."""
        return self.kernels.nbytes if self.kernels else sum(weight.nbytes for weight in self.weights.values())

    def replaced(self, weights: Mapping[str, Packed]) -> Model:
        """This model with these weights in the place of its own; it shares all others with this one, which stays. Only
        without kernels."""
        if self.kernels is not None:
            raise ValueError("weights that were repacked for the kernels cannot be replaced")
        other = copy(self)
        other.session = None
        moved = self._moved(weights, weights)
        other.weights = self.weights | (self._all_decoded(moved) if self._keeps_decoded else moved)
        other._build()
        return other

    def new_cache(self, rows: int, capacity: int = 0) -> Cache:
        """An empty cache for a batch of `rows`; capacity: tokens to make room for at once, the canvas included."""
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
        """Append tokens to the cache: ids (rows, tokens) int64; the cache grows by `tokens`. images: those in them.

        positions (rows or 1, tokens) default to counting on from the cache, padding included. padding (rows, tokens)
        bool, True where a row has no token; only on the left of a row's first token does it make sense.
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
        """Logits (rows, canvas, vocab) float32 for canvas (rows, canvas) int64; the cache is as before afterwards.

        self_conditioning_logits (rows, canvas, vocab), any float dtype: the previous step's, None on the first.
        """
        return self.logits(self.hidden(canvas, cache, self_conditioning_logits))

    @torch.inference_mode()
    def hidden(self, canvas: Tensor, cache: Cache, self_conditioning_logits: Tensor | None = None) -> Tensor:
        """What decode() hands to the head: (rows, canvas, hidden) in the model's dtype, normed."""
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
        """(…, hidden) -> (…, vocab) float32."""
        return head(hidden, self.table, self.config.softcap)

    def refined(
        self, ids: Tensor, soft: Tensor | None, positions: Tensor, masks: Mapping[bool, Tensor | None], cache: Batch
    ) -> Tensor:
        """hidden() on any cache. soft (rows, canvas, hidden): the expected embedding under the previous step's logits;
        positions (rows or 1, canvas); masks: by is_sliding, see attention.attend()."""
        x = self._conditioned(embed(ids, self.table, self.dtype), soft)
        x = self._run(x, positions, masks, cache, self.decoder_scalars)
        return rms_norm(x, self.final_norm, self.config.norm_eps)

    def append(
        self,
        ids: Tensor,
        positions: Tensor,
        masks: Mapping[bool, Tensor | None],
        cache: Batch,
        images: Pictures | None = None,
    ) -> None:
        """encode() on any cache, without committing."""
        x = embed(ids, self.table, self.dtype)
        if images is not None:
            images.put_into(x)
        self._run(x, positions, masks, cache, self.encoder_scalars)

    def _refuse_offloaded(self) -> None:
        if self.kernels is not None and self.kernels.offload is not None:
            raise InputError("experts are in host memory (--vram): only generate() with rng=counter brings them")

    def refuse_weights(self) -> NoReturn:
        """After logits that are not a number: InputError naming the first weight that holds such a value."""
        for name, weight in self.weights.items():
            pieces = [weight] if len(weight.shape) < 3 else [weight[e] for e in range(weight.shape[0])]
            if not all(bool(piece.dequantize(torch.float32).isfinite().all()) for piece in pieces):
                raise InputError(f"{self._source}: {name} holds values that are not finite; the file is damaged")
        raise InputError(f"{self._source}: the logits are not a number, though every weight is; try --dtype fp32")

    def _conditioned(self, x: Tensor, soft: Tensor | None) -> Tensor:
        if soft is not None:
            soft = rms_norm(soft, self.condition_norm, self.config.norm_eps)
            # Before the first step the signal is zero, and so is the MLP's output: it has no biases.
            x = x + gated_mlp(soft, self.condition_mlp)
        return rms_norm(x, None, self.config.norm_eps)

    def _run(
        self, x: Tensor, positions: Tensor, masks: Mapping[bool, Tensor | None], cache: Batch, scalars: list[Tensor]
    ) -> Tensor:
        tables = {sliding: rope_tables(f, positions, self.dtype) for sliding, f in self.frequencies.items()}
        for layer, scalar in zip(self.layers, scalars, strict=True):
            sliding = layer.shape.is_sliding
            x = layer(x, tables[sliding], masks[sliding], cache, scalar)
        return x

    def _one_of_each(self) -> list[tuple[int, LayerConfig]]:
        """A sliding and a full layer: all of a kind share one mask."""
        return list({layer.is_sliding: (i, layer) for i, layer in enumerate(self.config.layers)}.values())

    def _load_for_kernels(self, weights: Mapping[str, Packed], vram: int | None) -> ForKernels:
        if find_spec("triton") is None:
            raise InputError("bfloat16 on a GPU needs Triton: pip install triton, or use --dtype fp32")
        shapes = expected_tensors(self.config)
        names = sorted(shapes, key=lambda name: ".experts." in name)
        read = map(partial(self._checked, shapes), read_ahead(weights, names, self.device))
        if self.device.type != "cuda":
            return for_kernels(names, read, self._source, decode=False)
        whole = torch.cuda.mem_get_info()[1]
        if vram is None:
            return for_kernels(names, read, self._source, decodes(self.config, whole))

        def room() -> int:
            others = torch.cuda.memory_allocated() + CONTEXT + working_bytes(self.config, SHORT)
            left = vram - others
            if left <= 0:  # more is asked of it when the size of a layer's experts is known
                raise InputError(
                    f"--vram: {vram / GIB:.1f} GiB is too little; all but the routed experts takes {others / GIB:.1f}"
                )
            return left

        return for_kernels(names, read, self._source, decodes(self.config, min(vram, whole)), room)

    def _checked(self, shapes: Mapping[str, tuple[int, ...]], read: tuple[str, Packed]) -> tuple[str, Packed]:
        name, weight = read
        check_tensors({name: weight.shape}, {name: shapes[name]}, self._source)
        parts = {key: part for key, part in weight.parts.items() if key != "input_scale"}
        return name, Packed(weight.scheme, weight.shape, parts)

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
        """Checked, and on the device."""
        shapes, moved = expected_tensors(self.config), {}
        for name in names:
            weight = weights[name]
            check_tensors({name: weight.shape}, {name: shapes[name]}, self._source)
            kept = {k: v for k, v in weight.parts.items() if k != "input_scale" or self._activations}
            moved[name] = Packed(weight.scheme, weight.shape, kept).to(self.device)
        return moved

    def _all_decoded(self, weights: dict[str, Packed]) -> dict[str, Packed]:
        # vectors keep their precision: norms are computed in float32 whatever the dtype
        return {name: decoded(w, self.dtype) if len(w.shape) > 1 else w for name, w in weights.items()}

    def _below(self, prefix: str) -> dict[str, Packed]:
        return {name[len(prefix) :]: weight for name, weight in self.weights.items() if name.startswith(prefix)}

    def routed(self, index: int) -> tuple[Tiles, Tiles] | None:
        """Layer `index`'s experts if they were loaded for the kernels."""
        if self.kernels is None:
            return None
        offload = self.kernels.offload
        return offload.weights(index) if offload and index in offload else self.kernels.experts[index]

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[name].dequantize(dtype)
