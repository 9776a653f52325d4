"""NVFP4 in modelopt's layout, which vLLM opens: one set of small tensors for each projection of each expert.

    …layers.L.experts.gate_up_proj (E, 2I, H)  ->  …layers.L.experts.E.gate_proj.  rows 0 to I
                                                   …layers.L.experts.E.up_proj.    rows I to 2I
    …layers.L.experts.down_proj    (E, H, I)   ->  …layers.L.experts.E.down_proj.
    …layers.L.mlp.up_proj.weight   (I, H)      ->  …layers.L.mlp.up_proj.        and other Linears, if not plain: read
                                                   here, written in dgq's own layout alone (quant/formats/own_layout.py)

                      weight          U8       [out, in/2]
                      weight_scale    F8_E4M3  [out, in/16]
                      weight_scale_2  F32      []             the same for gate and up: vLLM keeps only gate's
                      input_scale     F32      []             W4A4 only: activation amax / (6 * 448), or more

Everything else stays as it is in the checkpoint. config.json gains `quantization_config`, and hf_quant_config.json
says the same in modelopt's older words. Source: nvidia-modelopt 0.47, export_hf_checkpoint, which these equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes.nvfp4 import BLOCK, NVFP4
from dgq.quant.types import Entry, Packed, Scheme, Stored

HF_QUANT_CONFIG = "hf_quant_config.json"
W4A4, W4A16 = "NVFP4", "W4A16_NVFP4"
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Modelopt:
    """The layout. activations: whether each projection carries an input_scale (W4A4)."""

    activations: bool

    @property
    def slices(self) -> Scheme:
        return NVFP4

    def scheme_of(self, name: str) -> Scheme:
        return NVFP4

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        owner, _, last = name.rpartition(".")
        if owner.endswith(".experts"):
            return last in PROJECTIONS
        return len(shape) == 2 and name.endswith("_proj.weight")

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        groups = modules(name, shape)
        rows, columns = shape[-2] // len(groups[0]), shape[-1]
        tensors: dict[str, Entry] = {}
        for base in (base for group in groups for base in group):
            tensors[base + "weight"] = ("U8", (rows, columns // 2))
            tensors[base + "weight_scale"] = ("F8_E4M3", (rows, columns // BLOCK))
            tensors[base + "weight_scale_2"] = ("F32", ())
            if self.activations:
                tensors[base + "input_scale"] = ("F32", ())
        return tensors

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        if len(shape) == 2:
            assert piece.shape == shape, f"{name}: a matrix has one scale, and comes whole"
        matrices = [piece] if len(shape) == 2 else [piece[i] for i in range(piece.shape[0])]
        for matrix, group in zip(matrices, modules(name, shape)[start:], strict=False):
            rows = shape[-2] // len(group)
            for number, base in enumerate(group):
                own = matrix[number * rows : (number + 1) * rows].parts
                yield base + "weight", own[""]
                yield base + "weight_scale", own["weight_scale"]
                yield base + "weight_scale_2", own["weight_scale_2"][0, 0]
                if self.activations:
                    yield base + "input_scale", own["input_scale"][0, 0]

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight, copied together. InputError for scales no quantiser writes, or gate's unlike up's."""
        groups = modules(name, shape)
        bases = [base for group in groups for base in group]
        whole = {
            "": joined_bytes([stored.tensor(base + "weight") for base in bases]),
            "weight_scale": joined_bytes([checked_scales(stored, base + "weight_scale") for base in bases]),
        }
        whole = {suffix: found.view(*shape[:-1], -1) for suffix, found in whole.items()}
        for suffix in ("weight_scale_2", "input_scale") if self.activations else ("weight_scale_2",):
            found = torch.stack([shared_scalar(stored, [base + suffix for base in group]) for group in groups])
            whole[suffix] = found.view(-1, *(1 for _ in shape[1:])).expand(*shape[:-1], 1)
        return Packed(NVFP4, shape, whole)


def modules(name: str, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """An expert's modules, which share their scale_2, or the one Linear: their names up to the last point."""
    owner, _, last = name.rpartition(".")
    if last not in PROJECTIONS:
        return [(owner + ".",)]
    return [tuple(f"{owner}.{expert}.{part}." for part in PROJECTIONS[last]) for expert in range(shape[0])]


def joined_bytes(pieces: list[torch.Tensor]) -> torch.Tensor:
    dtype = pieces[0].dtype  # torch cannot concatenate 8-bit floats
    return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)


def checked_scales(stored: Stored, name: str) -> torch.Tensor:
    scales = stored.tensor(name)
    codes = scales.view(torch.uint8)
    if bool((codes >= 0x7F).any()):
        where = (codes >= 0x7F).nonzero()[0].tolist()
        code = int(codes[tuple(where)])
        kind = "not a number" if code & 0x7F == 0x7F else "negative"
        raise InputError(f"{stored.file(name)}: {name} holds scale code 0x{code:02X} ({kind}) at {where}; damaged")
    return scales


def shared_scalar(stored: Stored, names: list[str]) -> torch.Tensor:
    """One positive number that all the tensors hold."""
    values = [stored.tensor(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not 0 < float(value) < float("inf"):
            raise InputError(f"{stored.file(name)}: {name} is {float(value)}, expected a positive number; damaged")
    if any(float(value) != float(values[0]) for value in values):
        said = ", ".join(f"{name} is {float(value):.9g}" for name, value in zip(names, values, strict=True))
        raise InputError(f"{stored.file(names[0])}: {said}; gate and up must share it, loaders keep only one")
    return values[0].clone()


def quantization_config(layers: int, vision: bool, activations: bool, version: str) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = {"input_activations": dict(numbers)} if activations else {}
    return {
        "config_groups": {"group_0": group | {"weights": numbers, "targets": ["Linear"]}},
        "ignore": ignored(layers, vision),
        "quant_algo": W4A4 if activations else W4A16,
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if activations else {}),
        "producer": {"name": "dgq", "version": version},
        "quant_method": "modelopt",
    }


def hf_quant_config(layers: int, vision: bool, activations: bool, version: str) -> dict[str, Any]:
    """The content of hf_quant_config.json."""
    return {
        "producer": {"name": "dgq", "version": version},
        "quantization": {
            "quant_algo": W4A4 if activations else W4A16,
            "kv_cache_quant_algo": "FP8" if activations else None,
            "group_size": BLOCK,
            "exclude_modules": ignored(layers, vision),
        },
    }


def ignored(layers: int, vision: bool) -> list[str]:
    """Patterns of the modules that stay in 16 bit: all but the routed experts, in both stacks, sorted."""
    stacks = ("model.decoder.", "model.encoder.language_model.")
    patterns = ["lm_head", "model.decoder.self_conditioning*"]
    patterns += ["model.encoder.embed_vision*", "model.encoder.vision_tower*"] if vision else []
    patterns += [
        f"{stack}layers.{layer}.{part}*"
        for stack in stacks
        for layer in range(layers)
        for part in ("mlp", "router", "self_attn")
    ]
    return sorted(patterns)
