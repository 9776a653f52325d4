"""Copies of an NVFP4 artifact of `tiny` with one real fault each: what `dgq validate` must catch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dgq.quant.schemes.nf4 import NF4

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
LAYER = "model.decoder.layers."


def tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        found = load_file(path / FILE)
        change(found)
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path / FILE)

    return edit


def settings(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        found = json.loads((path / file).read_text())
        change(found)
        (path / file).write_text(json.dumps(found))

    return edit


def nibbles(found: Tensors) -> None:
    for name, weight in found.items():
        if name.startswith(LAYER + "2.experts.") and name.endswith("down_proj.weight"):
            found[name] = weight >> 4 | weight << 4


def exchanged(found: Tensors) -> None:
    for name in [name for name in found if name.startswith(LAYER + "3.experts.5.")]:
        other = name.replace(".experts.5.", ".experts.11.")
        found[name], found[other] = found[other], found[name]


def doubled(name: str, at: tuple[int, int]) -> Callable[[Tensors], None]:
    """A block scale, E4M3, times 2."""

    def change(found: Tensors) -> None:
        found[name].view(torch.uint8)[at] += 8

    return change


def coarse_router(found: Tensors) -> None:
    name = LAYER + "1.router.proj.weight"
    found[name] = NF4.dequantize(NF4.quantize(found[name].float())).bfloat16()


def no_conditioning(found: Tensors) -> None:
    found["model.decoder.self_conditioning.down_proj.weight"].zero_()


SCALE = LAYER + "4.experts.7.up_proj.weight_scale"
SCALAR = "model.encoder.language_model.layers.3.layer_scalar"

# name -> how it is made, and what the gate's lines must say: the tensor, or the layer and the part
FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "nibbles swapped": (tensors(nibbles), ("layers.2.experts.down_proj", "layer 2, experts")),
    "experts exchanged": (tensors(exchanged), ("layers.3.experts.", "layer 3, experts")),
    "scale doubled": (tensors(doubled(SCALE, (40, 3))), ("layers.4.experts.gate_up_proj",)),
    "encoder scalar is 1": (tensors(lambda found: found[SCALAR].fill_(1)), (SCALAR,)),
    "router in 4 bit": (tensors(coarse_router), ("layers.1.router.proj.weight",)),
    "no self-conditioning": (tensors(no_conditioning), ("self_conditioning.down_proj.weight", "self-conditioning")),
    "stale sampler": (
        settings("generation_config.json", lambda found: found["sampler_config"].update(entropy_bound=0.3)),
        ("sampler.entropy_bound is 0.3",),
    ),
    "wrong RoPE": (
        settings(
            "config.json",
            lambda found: found["text_config"]["rope_parameters"]["full_attention"].update(partial_rotary_factor=0.5),
        ),
        ("rope_partial is 0.5", "attention"),
    ),
}


# Faults that no limit of the gate has in common: each limit names one tensor or part, so both are named
TOGETHER = (
    ("nibbles swapped", "encoder scalar is 1", "stale sampler"),
    ("experts exchanged", "wrong RoPE"),
    ("scale doubled", "router in 4 bit"),
    ("no self-conditioning",),
)
assert sorted(name for names in TOGETHER for name in names) == sorted(FAULTS)


def write(good: Path, folder: Path, names: Sequence[str]) -> Path:
    path = folder / names[0].replace(" ", "-")
    shutil.copytree(good, path)
    for name in names:
        FAULTS[name][0](path)
    return path
