"""What a user will need: memory on the GPU to run the artifact, memory and disk to make it.

Memory on the GPU is what the runtime allocates for one answer in 16 bit, counted at the moments when most is there:

    always     weights (text only); keys and values: sliding layers a window and a canvas, full layers every token
    prompt     + the prompt's own cache, which is then copied into the answer's; masks, repeated for groups of heads
    step       + the last step's logits: raw, scaled, as self-conditioning; weights being decoded
    sampling   + float32 arrays of canvas x vocabulary: two steps' logits, probabilities, log-probabilities, products

tests/test_plan_needs.py holds these against what a run allocates; a change in runtime/ that moves them shows there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgq.convert.calibrate import BATCH, CHATS, DRAFTS, TEXTS
from dgq.convert.memory import Needs, Sizes
from dgq.convert.pipeline import HEADER_ALLOWANCE
from dgq.convert.plan import Plan, PlannedTensor
from dgq.convert.refine import TOKENS, refinable
from dgq.convert.slices import SLICE
from dgq.runtime import layers
from dgq.runtime.config import ModelConfig
from dgq.runtime.engine import PREFILL
from dgq.runtime.model import KEEP_DECODED
from dgq.runtime.names import EMBEDDING, VISION
from dgq.runtime.rng import PIECE

CONTEXTS = (4096, 32768, 131072, 262144)
CARDS = (12, 16, 24, 32, 48, 80)  # GB as they are sold: GiB on the card
CARD_RESERVED = 640 << 20  # of a card: CUDA's context, a desktop
WORKSPACE = 32 << 20  # cuBLAS's on a Hopper GPU; less on others
WIDTH = 2  # bytes of an activation

# Bytes an element of a weight that is being decoded to bf16, temporaries and result. A plain bf16 weight is not copied.
DECODING = {
    "bf16": 0.0, "f16": 2.0, "f32": 2.0, "nvfp4": 17.0, "nf4": 17.0, "nf4_dq": 17.0,
    "q4_k": 7.25, "q5_0": 7.125, "q6_k": 7.25, "q8_0": 6.0,
}  # fmt: skip
NUMBER_A_ROW = ("nvfp4", "nf4_dq")  # schemes with a part of 4 bytes a row, in memory only

# Measured: Python with torch; and bytes for each element of the slices at work: as read, encoded, waiting to be written
# (and, for ggml, in float32).
RAM_BASE = 320 << 20
RAM_ELEMENT = {"nvfp4": 8, "bnb4": 8, "gguf": 24}

# Of a calibration over all weights: texts' prompts together, their canvas twice; each chat's prompt, and its drafts.
PASSES = TEXTS // BATCH * 3 + CHATS // BATCH * (BATCH + DRAFTS)


def needs(plan: Plan, threads: int) -> dict[str, Any]:
    """Everything below, for `dgq plan --json`; bytes are whole numbers."""
    runtime = Runtime.of(plan)
    contexts = sorted({min(n, runtime.config.context) for n in CONTEXTS})
    return {
        "vram_by_context": {n: runtime.vram(n) for n in contexts},
        "ram": ram(plan, threads),
        "disk": disk(plan),
        "with_stats": with_stats(plan),
    }


def kv_bytes(config: ModelConfig, context: int, new: int) -> tuple[int, int]:
    """Keys and values in 16 bit of sliding layers, which have room for `new` tokens behind the window, and of full
    ones, with room for the context."""
    found = [0, 0]
    for layer in config.layers:
        tokens = min(context, config.window - 1 + new) if layer.is_sliding else context
        found[not layer.is_sliding] += 2 * WIDTH * tokens * layer.kv_heads * layer.head_dim
    return found[0], found[1]


@dataclass(frozen=True)
class Runtime:
    """What runtime/ allocates for a plan's artifact. decoding: DECODING, or zeros where weights are kept decoded."""

    config: ModelConfig
    text: list[PlannedTensor]
    decoding: Mapping[str, float]

    @classmethod
    def of(cls, plan: Plan) -> Runtime:
        text = [tensor for tensor in plan.weights if not str(tensor.source).startswith(VISION)]
        kept = WIDTH * sum(tensor.numel for tensor in text) <= KEEP_DECODED
        return cls(plan.source.config, text, dict.fromkeys(DECODING, 0.0) if kept else DECODING)

    def vram(self, context: int) -> dict[str, Any]:
        """Peak bytes on the GPU for one answer: `context` tokens of prompt, answer and canvas.

        parts: of the total, which is that of the largest moment; moments: what each takes on top of weights and keys
        and values; fits: the CARDS that hold the total.
        """
        sliding, full = kv_bytes(self.config, context, self.config.canvas)
        base = {"weights": self.weights(), "kv_sliding": sliding, "kv_full": full}
        moments = {
            "prompt": max(self._prompt(max(1, context - self.config.canvas)), key=_size),
            "step": max(self._step(), key=_size),
            "sampling": max(self._sampling(), key=_size),
        }
        peak = max(moments, key=lambda when: _size(moments[when]))
        parts = base | moments[peak]
        return {
            "total": _size(parts),
            "parts": parts,
            "peak": peak,
            "moments": {when: _size(found) for when, found in moments.items()},
            "fits": [card for card in CARDS if _size(parts) <= (card << 30) - CARD_RESERVED],
        }

    def weights(self) -> int:
        """The text weights as they are held: no vision, no input scales, those of small models decoded."""
        if not any(self.decoding.values()):
            return sum(WIDTH * t.numel if len(t.shape) > 1 else t.nbytes for t in self.text)
        rows = sum(t.numel // t.shape[-1] for t in self.text if t.scheme.name in NUMBER_A_ROW)
        return sum(t.scheme.nbytes(t.shape) for t in self.text) + 4 * rows

    def _prompt(self, prompt: int) -> Iterator[dict[str, int]]:
        """The prompt's last PREFILL tokens: an attention of either kind, then the rest of a layer."""
        config = self.config
        tokens = min(PREFILL, prompt)
        keys = {False: prompt, True: min(prompt, config.window - 1 + tokens)}
        masks = tokens * sum(keys.values())
        cache = sum(kv_bytes(config, prompt, tokens))
        for layer in {layer.is_sliding: layer for layer in config.layers}.values():
            # the heads of a group are folded into the tokens, and the mask repeated for them: as bool, then as bf16
            repeated = (1 + WIDTH) * config.heads // layer.kv_heads * tokens * keys[layer.is_sliding]
            folded = 3 * WIDTH * tokens * config.heads * layer.head_dim  # queries, the same by group, answers
            yield _moment(masks + repeated + folded, cache=cache)
        for activations, decoded in self._layer(tokens):
            yield _moment(masks + activations, decoded=decoded, cache=cache)

    def _step(self) -> Iterator[dict[str, int]]:
        """A step after the first, while the last one's logits are there three times."""
        config = self.config
        logits, conditioning = self._logits()
        before = 2 * logits + conditioning
        for activations, decoded in self._layer(config.canvas):
            yield _moment(activations, before, decoded)
        chunk = min(config.vocab, max(1, layers.DECODE_BUDGET // config.hidden))  # rows of the table
        name = next(t.scheme.name for t in self.text if t.source == EMBEDDING)
        decoding = self._decoding(name, chunk * config.hidden)
        decoded = WIDTH * chunk * config.hidden if decoding else 0
        decoding += decoded if chunk < config.vocab else 0  # the rows before them
        hidden = config.canvas * config.hidden * (2 * WIDTH + 4)
        product = config.canvas * chunk * (WIDTH + 4)
        yield _moment(canvas=before + 2 * logits)  # the softmax: its input cast, and its result
        yield _moment(hidden, before + conditioning, decoding)
        yield _moment(hidden, before + logits, decoding)
        yield _moment(hidden, before + logits + product, decoded)

    def _sampling(self) -> Iterator[dict[str, int]]:
        logits, conditioning = self._logits()
        draw = 2 * 8 * self.config.canvas * min(PIECE, self.config.vocab)  # float64, and padded
        yield _moment(canvas=4 * logits + conditioning + draw)
        yield _moment(canvas=6 * logits + conditioning)

    def _logits(self) -> tuple[int, int]:
        """Bytes of a canvas's logits in float32, and in 16 bit."""
        elements = self.config.canvas * self.config.vocab
        return 4 * elements, WIDTH * elements

    def _layer(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(activations, decoded) of a layer's moments: norms of the queries in float32, the largest dense product,
        experts being decoded, their answers combined."""
        config = self.config
        stream = 5 * WIDTH * tokens * config.hidden
        queries = tokens * config.heads * max(layer.head_dim for layer in config.layers)
        picks = tokens * config.top_k * config.hidden
        dense = [t for t in self.text if len(t.shape) == 2 and t.source != EMBEDDING]
        held, decoding = self._experts()
        yield stream + (WIDTH + 3 * 4) * queries, 0
        yield stream, max(self._decoding(t.scheme.name, t.numel) for t in dense)
        yield stream + 2 * WIDTH * picks, decoding
        yield stream + (3 * WIDTH + 8) * picks, held

    def _experts(self) -> tuple[int, int]:
        """Bytes of the experts decoded together, and the most while the next ones are decoded, over all layers."""
        config = self.config
        each = 3 * config.hidden * config.expert_intermediate
        group = min(config.experts, max(1, layers.DECODE_BUDGET // each))
        most = (0, 0)
        found = ([t for t in self.text if str(t.source).endswith(end)] for end in ("s.gate_up_proj", "s.down_proj"))
        for pair in zip(*found, strict=True):
            wanted = [self._decoding(t.scheme.name, group * t.numel // config.experts) for t in pair]
            sizes = [WIDTH * group * t.numel // config.experts if n else 0 for t, n in zip(pair, wanted, strict=True)]
            before = sizes if group < config.experts else [0, 0]
            both = max(sum(before) + wanted[0], sizes[0] + before[1] + wanted[1])
            most = max(most[0], sum(sizes)), max(most[1], both)
        return most

    def _decoding(self, scheme: str, elements: int) -> int:
        return int(self.decoding[scheme] * elements)


def _size(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _moment(activations: int = 0, canvas: int = 0, decoded: int = 0, cache: int = 0) -> dict[str, int]:
    return {"prompt_cache": cache, "activations": WORKSPACE + activations, "canvas": canvas, "decoded": decoded}


def ram(plan: Plan, threads: int) -> dict[str, int]:
    """Peak bytes of memory while converting on the CPU. For recipes with activations, calibrating comes first: its own
    arrays, and the checkpoint mapped, which is fast only as far as it stays in memory between the passes."""
    slices: list[int] = []
    for tensor in plan.weights:
        row = tensor.numel // tensor.shape[0] if tensor.shape else 1
        size = min(tensor.numel, max(SLICE["cpu"], row))
        slices += [size] * min(threads, -(-tensor.numel // size))
    found = {"threads": threads, "convert": RAM_BASE + RAM_ELEMENT[plan.recipe.format] * sum(sorted(slices)[-threads:])}
    if plan.recipe.activations is not None:
        logits = 4 * BATCH * plan.source.config.canvas * plan.source.config.vocab
        found |= {
            "calibrate": RAM_BASE + 2 * logits + 2 * 4 * layers.DECODE_BUDGET,
            "calibrate_mapped": sum(spec.stop - spec.start for spec in plan.source.text.values()),
            "calibrate_passes": PASSES,
        }
    return found


def slices_ram(plan: Plan) -> tuple[int, int]:
    """Bytes of RAM to convert without STATS: in any case, and for each thread at most."""
    return RAM_BASE, ram(plan, 1)["convert"] - RAM_BASE


def with_stats(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes that `dgq calibrate` and `dgq convert --stats` take on each device, of its own memory (RAM, or VRAM):
    calibrate, convert: the least; at_once: from which on a layer's Hessians are made in one go. scratch: disk for the
    time of the conversion, beside the artifact, with all the samples that are used."""
    todo = [tensor for tensor in plan.tensors if refinable(tensor)]
    found = {}
    for device in ("cpu", "cuda") if todo else ():
        needed = Needs(plan.source, device, Sizes.most(plan.source.config), todo)
        moments = needed.moments()
        sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
        found[device] = {
            "scratch": TOKENS * needed.scratch,
            "calibrate": max(sums["head"], sums["layer"]),
            "convert": max(sums.values()),
            "at_once": max(sums.values()) + needed.hessians - moments["way back"]["Hessians"],
        }
    return found


def disk(plan: Plan) -> dict[str, int]:
    """Bytes on disk: the artifact with its headers and small files, and what is yet to be downloaded."""
    artifact, download = plan.nbytes + HEADER_ALLOWANCE, 0
    if plan.source.where.repo is not None:
        specs = (plan.source.text | plan.source.vision).values()
        missing = {spec.file for spec in specs if not (plan.source.path / spec.file).is_file()}
        download = sum(spec.stop - spec.start for spec in specs if spec.file in missing)
    return {"artifact": artifact, "download": download, "total": artifact + download}
