"""What a user will need: memory on the GPU to run the artifact, memory and disk to make it.

Memory on the GPU is what the engine allocates for one answer in bfloat16 (runtime/model/memory.py counts the batch):

    weights       text only; experts as the kernels read them. The others packed, or decoded where there is room
    keys, values  sliding layers a window and a canvas, full layers every token
    canvas        logits, what the sampler makes of them
    activations   a part of a prompt on its way through a layer, cuBLAS
    vision        the tower in bfloat16 and one image in it; only where images are given

tests/full/test_plan_needs.py holds these against what runs allocate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgq.convert.calibration.input_scales import BATCH, CHATS, DRAFTS, TEXTS
from dgq.convert.layerwise.estimate import Needs, Sizes
from dgq.convert.layerwise.samples import TOKENS
from dgq.convert.plans import mmproj
from dgq.convert.plans.plan import Plan
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.write.pipeline import HEADER_ALLOWANCE
from dgq.convert.write.ram import RAM_BASE, converting_ram
from dgq.convert.write.refine import refinable
from dgq.runtime.files.images import checked_tokens
from dgq.runtime.files.mmproj import POOLING
from dgq.runtime.model import layers
from dgq.runtime.model.loading import decodes
from dgq.runtime.model.memory import (
    CONTEXT,
    SHORT,
    WORKSPACE,
    canvas_bytes,
    kv_bytes,
    layer_bytes,
    widest,
    working_bytes,
)
from dgq.runtime.model.placement import PLACES, place
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import EMBEDDING, layer_of

CONTEXTS = (4096, 32768, 131072, 262144)
CARDS = (12, 16, 24, 32, 48, 80)  # GB as they are sold: GiB on the card
WIDTH = 2  # bytes of an activation

HOST_LINKS = {"PCIe 4 x16": 25e9, "PCIe 5 x16": 55e9}  # bytes a second from pinned memory: assumed, measured

# Of a calibration over all weights: texts' prompts together, their canvas twice; each chat's prompt, and its drafts.
PASSES = TEXTS // BATCH * 3 + CHATS // BATCH * (BATCH + DRAFTS)


def needs(plan: Plan, threads: int, image_tokens: int | None = None) -> dict[str, Any]:
    """Everything below, for `dgq plan --json`; bytes are whole numbers. image_tokens: see vision()."""
    runtime = Runtime.of(plan)
    contexts = sorted({min(n, runtime.config.context) for n in CONTEXTS})
    by_context = {n: runtime.vram(n) for n in contexts}
    small = [card for card in CARDS if card not in by_context[contexts[0]]["fits"]]
    return {
        "vram_by_context": by_context,
        "vision": vision(plan, image_tokens),
        "offloaded": {card: away for card in small if (away := runtime.offloaded(card << 30)) is not None},
        "ram": ram(plan, threads),
        "disk": disk(plan),
        "with_stats": with_stats(plan),
    }


@dataclass(frozen=True)
class Runtime:
    """What the engine allocates for a plan's artifact."""

    config: ModelConfig
    text: list[PlannedTensor]

    @classmethod
    def of(cls, plan: Plan) -> Runtime:
        return cls(plan.source.config, [t for t in plan.text if t.source])

    def vram(self, context: int, rows: int = 1) -> dict[str, Any]:
        """Bytes on the GPU for answers of `context` tokens each, prompt and canvas included.

        parts: of the total, with packed weights; decoded: the total where all but the experts are decoded to bfloat16,
        which loading does on cards of `decoded_from` GB and more; fits: the CARDS that hold what they would be given.
        """
        sliding, full = kv_bytes(self.config, context, rows)
        parts = {
            "weights": self.weights(decode=False), "kv_sliding": sliding, "kv_full": full,
            "canvas": canvas_bytes(self.config, rows),
            "activations": layer_bytes(self.config, widest(self.config, context, rows)) + WORKSPACE,
        }  # fmt: skip
        total = sum(parts.values())
        decoded = total + self.weights(decode=True) - parts["weights"]
        given = {card: decoded if decodes(self.config, card << 30) else total for card in CARDS}
        return {
            "total": total,
            "parts": parts,
            "decoded": decoded,
            "decoded_from": next((card for card in CARDS if decodes(self.config, card << 30)), None),
            "fits": [card for card, needed in given.items() if needed <= (card << 30) - CONTEXT],
        }

    def weights(self, decode: bool) -> int:
        """The text weights as they are held: no vision, no input scales."""
        return sum(self._held(tensor, decode) for tensor in self.text)

    def _held(self, tensor: PlannedTensor, decode: bool) -> int:
        if len(tensor.shape) < 2:
            return tensor.nbytes
        if ".experts." not in str(tensor.source):
            if decode or "router" in str(tensor.source):
                return WIDTH * tensor.numel
            if tensor.source == EMBEDDING:
                return tensor.nbytes if tensor.scheme.gpu.embedding else WIDTH * tensor.numel
        return int(tensor.scheme.gpu.bits * tensor.numel) // 8

    def offloaded(self, budget: int) -> dict[str, Any] | None:
        """What `--vram` of so many bytes costs: layers whose experts wait in host memory, bytes that every step copies,
        and the milliseconds that takes, without which no step is done. on_gpu: bytes of weights there. None: the rest
        of the model does not fit."""
        experts: dict[int, int] = {}
        for tensor in self.text:
            layer = layer_of(str(tensor.source))
            if layer is not None and ".experts." in str(tensor.source):
                experts[layer] = experts.get(layer, 0) + self._held(tensor, decode=False)
        others = self.weights(decodes(self.config, budget)) - sum(experts.values())
        room = budget - others - CONTEXT - working_bytes(self.config, SHORT)
        if room < PLACES * max(experts.values()):
            return None
        placement = place([size for _, size in sorted(experts.items())], len(experts), room)
        return {
            "layers": len(placement.waiting),
            "host": sum(placement.waiting),
            "on_gpu": others + placement.on_gpu,
            "copied": placement.copied,
            "ms": {link: 1e3 * placement.copied / speed for link, speed in HOST_LINKS.items()},
        }


def vision(plan: Plan, most: int | None = None) -> dict[str, int] | None:
    """Bytes of the vision tower in bfloat16 and of a picture in it, where images are given; None without a tower. `dgq
    run` has it in memory before the model, programs beside it. An image is counted at its widest, in an MLP, with the
    mask of its attention, which grows with the square of its patches. most: image tokens of a picture, which take as
    many tokens of context and two around them; None for the model's setting."""
    tower = [tensor for tensor in plan.weights if tensor.vision]
    if not tower:
        return None
    tower_config = mmproj.described(plan.source)
    tokens = mmproj.soft_tokens(plan.source) if most is None else checked_tokens(most)
    patches = tokens * tower_config.count("pooling_kernel_size", POOLING) ** 2
    image = WIDTH * patches * (3 * tower_config.count("intermediate_size") + 6 * tower_config.count("hidden_size"))
    mask = (1 + WIDTH) * patches**2  # as transformers makes it, and as the kernel adds it
    weights = sum(WIDTH * tensor.numel for tensor in tower)
    return {"weights": weights, "image": image + mask, "image_tokens": tokens + 2}


def ram(plan: Plan, threads: int) -> dict[str, int]:
    """Peak bytes of memory while converting on the CPU. For recipes with activations, calibrating comes first: its own
    arrays, and the checkpoint mapped, which is fast only as far as it stays in memory between the passes."""
    needed = {"threads": threads, "convert": converting_ram(plan, threads)}
    if plan.recipe.activations is not None:
        logits = 4 * BATCH * plan.source.config.canvas * plan.source.config.vocab
        needed |= {
            "calibrate": RAM_BASE + 2 * logits + 2 * 4 * layers.DECODE_BUDGET,
            "calibrate_mapped": sum(spec.stop - spec.start for spec in plan.source.text.values()),
            "calibrate_passes": PASSES,
        }
    return needed


def with_stats(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes that `dgq calibrate` and `dgq convert --stats` take on each device, of its own memory (RAM, or VRAM):
    calibrate, convert: the least; at_once: from which on a layer's Hessians are made in one go. scratch: disk for the
    time of the conversion, beside the artifact, with all the samples that are used."""
    todo = [tensor for tensor in plan.tensors if refinable(tensor)]
    needs_by_device = {}
    for device in ("cpu", "cuda") if todo else ():
        needed = Needs(plan.source, device, Sizes.most(plan.source.config), todo)
        moments = needed.moments()
        sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
        needs_by_device[device] = {
            "scratch": TOKENS * needed.scratch,
            "calibrate": max(sums["head"], sums["layer"]),
            "convert": max(sums.values()),
            "at_once": max(sums.values()) + needed.hessians - moments["way back"]["Hessians"],
        }
    return needs_by_device


def disk(plan: Plan) -> dict[str, int]:
    """Bytes on disk: the artifact with its headers and small files, and what is yet to be downloaded."""
    artifact, download = plan.nbytes + HEADER_ALLOWANCE, 0
    if plan.source.where.repo is not None:
        specs = (plan.source.text | plan.source.vision).values()
        missing = {spec.file for spec in specs if not (plan.source.path / spec.file).is_file()}
        download = sum(spec.stop - spec.start for spec in specs if spec.file in missing)
    return {"artifact": artifact, "download": download, "total": artifact + download}
