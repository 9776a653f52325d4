"""How much memory calibrating and refining take: counted from shapes, a term each, at the moments when most is there.

    head         the table of embeddings; logits of some canvases, and what is made of them
    layer        a layer's weights; the part of them that is decoded; activations, of a sequence in the first half of
                 the layer and of FEED_TOKENS in the second
    way back     the same with what gradients keep; Hessians
    quantising   Hessians; those of a few experts, being inverted; these experts' weights

At every moment there are hidden states of a chunk of samples. On the CPU all of it is RAM, in float32 but for stored
weights. On a GPU it lies there, in bfloat16 but for logits and Hessians, and RAM holds a weight on its way to the GPU
and hidden states on theirs.

tests/full/test_budget.py holds these figures against what is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.passes import DRAFTED
from dgq.convert.layerwise.samples import CHUNK, LONGEST, PER_PROMPT, TOKENS, Document
from dgq.convert.layerwise.schedule import Hessian, at_once
from dgq.convert.layerwise.stream import FEED_TOKENS, HEAD_TOKENS
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source
from dgq.runtime.model import layers
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, EMBEDDING, layer_of

BASE = {"cpu": 360 << 20, "cuda": 1280 << 20}  # RAM of Python and torch, and of CUDA's libraries
WORKSPACE = {"cpu": 128 << 20, "cuda": 64 << 20}  # of libraries, on the device: MKL's, malloc's; cuBLAS's, cuSOLVER's

# Bytes for each element, by the width of an activation: measured with torch's profiler on the CPU.
FED: dict[int, tuple[float, float]] = {4: (16, 16), 2: (14, 8)}  # forwards: picks x hidden, picks x inner
FED_BACK: dict[int, tuple[float, float]] = {4: (24, 16), 2: (22.25, 8)}
MIXED = {4: (16, 14, 14), 2: (11, 8, 14)}  # forwards: tokens x queries, keys and values, hidden
MIXED_BACK = {4: (26, 23, 23), 2: (22, 7, 23)}
SCORES = 8  # heads x tokens x keys, where the kernel keeps them
LOGITS = 4  # times: as they are, as probabilities, the cap's slope, the draw
STATES, STATES_BACK = {"cpu": 3, "cuda": 4}, {"cpu": 5, "cuda": 6}  # times the chunk; a GPU's last is being written
STATES_BESIDE = 14  # in RAM beside a GPU: two read, two ahead, one written; the first pass' four; up to powers of two
HOOKED = 16  # a product's inputs and outputs, to a hook: in float64, squared; in float32, weighted
INVERTED = 4  # times a Hessian: itself, damped, factor, inverse
WITH_G, WITHOUT_G = 4, 11  # times a weight in float32, quantised with G (a group of rows at a time) and without
TRIED = 12 << 10  # a row's candidates for the scales of some columns, without G

Moments = dict[str, dict[str, int]]  # moment -> what takes memory then -> bytes


class Sizes(NamedTuple):
    """Of the samples, in tokens: the largest chunk, the longest prompt, the canvases behind it; drafts: of those that
    the model writes together; given: of canvases whose conditioning, the sampler's, lies in RAM in bfloat16."""

    chunk: int
    prompt: int
    canvases: int
    drafts: int = 0
    given: int = 0

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Sizes:
        each = [
            (
                chunk.run_tokens,
                max(map(len, chunk.prompts)),
                2 * chunk.canvases.shape[1] * max(map(chunk.owner.count, chunk.owner)),
            )
            for chunk in chunks
        ]
        given = sum(len(chunk.given) * chunk.canvases.shape[1] for chunk in chunks)
        chunk, prompt, canvases = (max(column) for column in zip(*each, strict=True))
        return cls(chunk, prompt, canvases, given=given)

    @classmethod
    def most(cls, config: ModelConfig, documents: Sequence[Document] = (), walked: int = 0) -> Sizes:
        """What samples.chunks() makes at most. walked: prompts behind which the sampler goes; what a step gives
        is there beside what is kept of those before."""
        prompt, canvases = min(LONGEST, config.context), 2 * PER_PROMPT * config.canvas
        drafts = [min(LONGEST, len(d.ids)) + 2 * config.canvas for d in documents if d.open]
        together = sum(sorted(drafts)[-DRAFTED:])
        given = 2 * config.canvas * min(walked, TOKENS // (1 + canvases))
        return cls(max(CHUNK, prompt + canvases, together), prompt, canvases, sum(drafts), given)


class Needs:
    """Bytes at each moment, on the device that computes. sizes: of the samples; todo: weights to refine, or none;
    width: bytes of an activation, if not the device's usual ones."""

    def __init__(
        self, source: Source, device: str, sizes: Sizes, todo: Sequence[PlannedTensor] = (), width: int | None = None
    ) -> None:
        self._config, self._device, self._sizes, self._todo = source.config, device, sizes, todo
        self._width = width or (4 if device == "cpu" else 2)
        self._held = {
            name: spec.numel * (2 if spec.dtype == "BF16" else self._width) for name, spec in source.text.items()
        }
        self._largest = max(spec.numel * 4 if spec.dtype == "F32" else spec.numel * 2 for spec in source.text.values())

    @property
    def scratch(self) -> int:
        """Bytes a token of hidden states on the disk while refining: each layer's, and two more."""
        return (len(self._config.layers) + 2) * self._config.hidden * self._width

    def moments(self) -> Moments:
        fixed = {"libraries": WORKSPACE[self._device]}
        if self._device == "cpu":
            fixed = {"libraries": WORKSPACE["cpu"] + BASE["cpu"], "trajectories": self._given()}
        config, sizes = self._config, self._sizes
        states = sizes.chunk * config.hidden * self._width
        drafts = sizes.drafts * config.hidden * self._width
        each = 3 * config.hidden * config.expert_intermediate
        moments: Moments = {
            "head": fixed | {
                "embeddings": self._held[EMBEDDING],
                "decoded": self._decoded(min(layers.DECODE_BUDGET, config.vocab * config.hidden)),
                "logits": LOGITS * 4 * config.vocab * max(config.canvas, HEAD_TOKENS),
                "hidden states": STATES[self._device] * states + drafts,
            },
            "layer": fixed | {
                "weights": self._layer(),
                "decoded": self._decoded(min(layers.DECODE_BUDGET, config.experts * each)),
                "activations": self._activations(FED, MIXED),
                "hidden states": STATES[self._device] * states + drafts,
            },
        }  # fmt: skip
        if self._todo:
            moments["way back"] = fixed | {
                "weights": self._layer(),
                "decoded": self._decoded(max(self._matrices())),
                "activations": self._activations(FED_BACK, MIXED_BACK),
                "hidden states": STATES_BACK[self._device] * states,
                "Hessians": self._least(),
            }
            moments["quantising"] = fixed | {
                "matrices, weights": max(
                    _quantising(Hessian.of(t), *((n, t.shape[-2]) if len(t.shape) == 3 else (1, n)))
                    for t in self._todo
                    for n in [at_once(t, self._device)]
                ),
                "Hessians": self._least(),
            }
        return moments

    @property
    def hessians(self) -> int:
        """Of all weights of a layer, the largest sum."""
        layers: dict[int | None, int] = {}
        for tensor in self._todo:
            gathered = Hessian.of(tensor)
            size = gathered.shared + gathered.apart * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
            layer = layer_of(str(tensor.source))
            layers[layer] = layers.get(layer, 0) + size
        return max(layers.values(), default=0)

    def ram(self) -> dict[str, int]:
        """Beside a GPU."""
        states = self._sizes.chunk * self._config.hidden * self._width
        return {
            "libraries": BASE["cuda"], "a weight": self._largest, "hidden states": STATES_BESIDE * states,
            "trajectories": self._given(),
        }  # fmt: skip

    def _given(self) -> int:
        return 2 * self._sizes.given * self._config.hidden

    def _layer(self) -> int:
        layer = (f"{DECODER}layers.{i}." for i in range(len(self._config.layers)))
        return max(sum(n for name, n in self._held.items() if name.startswith(prefix)) for prefix in layer)

    def _decoded(self, elements: int) -> int:
        """Weights as they are multiplied, the last ones and the next; in bfloat16 they are stored so."""
        return 2 * self._width * elements if self._width == 4 else 0

    def _matrices(self) -> Iterable[int]:
        config = self._config
        yield 2 * config.hidden * config.expert_intermediate
        yield config.hidden * config.intermediate
        yield from (config.hidden * config.heads * layer.head_dim for layer in config.layers)

    def _activations(self, fed: dict[int, tuple[float, float]], mixed: dict[int, tuple[int, int, int]]) -> int:
        config, sizes = self._config, self._sizes
        tokens = min(FEED_TOKENS[self._device], sizes.chunk)
        hidden, inner = fed[self._width]
        feed = tokens * config.top_k * (hidden * config.hidden + inner * config.expert_intermediate)
        hooked = HOOKED * tokens * (config.hidden + config.intermediate)
        most = int(feed + hooked)
        sequence = sizes.prompt + sizes.canvases
        scores = SCORES * config.heads * max(sizes.prompt**2, sizes.canvases * (sizes.prompt + config.canvas))
        for layer in config.layers:
            queries, keys = config.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            a, b, c = mixed[self._width]
            hooked = HOOKED * sizes.canvases * queries
            most = max(most, sequence * (a * queries + b * keys + c * config.hidden) + scores + hooked)
        return most

    def _least(self) -> int:
        """Of the Hessians that have to be there at once: all that experts share, and those quantised together."""
        return max(
            gathered.shared + gathered.apart * (at_once(tensor, self._device) if len(tensor.shape) == 3 else 1)
            for tensor in self._todo
            for gathered in [Hessian.of(tensor)]
        )


def _quantising(hessian: Hessian, count: int, rows: int) -> int:
    """Bytes while `count` experts, or `rows` rows of a matrix, are quantised, beside what was gathered."""
    h = 4 * count * hessian.columns**2
    g = 4 * (1 if hessian.joined else count) * hessian.rows**2 * hessian.outputs
    weight = 4 * count * rows * hessian.columns
    weight = WITH_G * weight if hessian.outputs else WITHOUT_G * weight + TRIED * rows
    return max(INVERTED * h, 2 * h + INVERTED * g) + weight
