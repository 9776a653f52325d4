"""LoRA adapters in peft's format, merged into the weights as they are read, a slice at a time.

    base_model.model.<module>.lora_A.weight   (r, in)      W + s B A, s = alpha / r, or alpha / sqrt(r) (rslora);
                              lora_B.weight   (out, r)     DoRA: every row of that to the length of its magnitude
    …experts[.base_layer].lora_A.weight       (E r, in)    expert e: A's rows from e r on, B's columns e, e + E, …
                          lora_B.weight       (out, r E)

<module> is counted from the whole model, or from the part of it that peft was given: model, decoder, the encoder's
language model. The sum is taken in float64 and rounded to the weight's dtype once, so that neither slices nor threads
change a bit. Settings of peft that dgq does not merge are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgq.convert.source.hashes import describe
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, HFDir, read_header, read_json
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, layer_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PLACES = ("", "model.", DECODER, ENCODER, "model.encoder.")  # of what peft was given, in the whole model
# Settings that change what the weights become, and the values with which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,), "lora_bias": (False,), "bias": ("none",), "modules_to_save": (None, []),
    "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "use_qalora": (False,),
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,), "use_bdlora": (None, False),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base's weights too
}  # fmt: skip
PIECE = 1 << 24  # elements of a whole weight merged at once


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight. a, b, magnitude: names of its tensors; experts: how many the weight has, 0
    for a matrix; transposed: in and out are the other way round, as peft before 0.18 had them for experts."""

    reader: HFDir
    a: str
    b: str
    scale: float
    experts: int = 0
    transposed: bool = False
    magnitude: str | None = None

    def merged(self, values: Tensor, start: int) -> Tensor:
        """Change values float64, which are rows (of experts: whole experts) of the weight from `start` on."""
        part = slice(start, start + len(values))
        a, b = self.reader.tensor(self.a), self.reader.tensor(self.b)
        if not self.experts:
            values = values + self.scale * (b[part].double() @ a.double())
            if self.magnitude is None:
                return values
            length = self.reader.tensor(self.magnitude)[part].double()
            longer: Tensor = length / values.norm(dim=1)
            return values * longer[:, None]
        a = a.view(self.experts, -1, a.shape[1])[part].double()
        b = b.view(len(b), -1, self.experts)[:, :, part].double().permute(2, 0, 1)
        change = b @ a
        return values + self.scale * (change.transpose(1, 2) if self.transposed else change)

    def same(self, other: Delta) -> bool:
        """Whether the other one adds the same numbers."""
        names = [(self.a, other.a), (self.b, other.b)]
        if self.magnitude and other.magnitude:
            names.append((self.magnitude, other.magnitude))
        alike = (self.scale, self.magnitude is None) == (other.scale, other.magnitude is None)
        return alike and all(torch.equal(self.reader.tensor(x), other.reader.tensor(y)) for x, y in names)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. deltas: canonical weight name -> what is added; about: what dgq.json holds of it; sides: of
    encoder and decoder, on which its layers were trained."""

    path: Path
    deltas: dict[str, Delta]
    about: dict[str, Any]
    sides: frozenset[str] = field(default_factory=frozenset)

    @property
    def notice(self) -> str:
        shared = ""
        if len(self.sides) == 1:
            shared = f"; trained on the {min(self.sides)} alone, and both sides share the weights that it changes"
        return f"adapter {self.path.name}: merged into {len(self.deltas)} weights{shared}"


class MergedDir(HFDir):
    """The tensors of a checkpoint, with adapters merged in one after the other as they are read."""

    def __init__(self, directory: HFDir, adapters: Sequence[Adapter]) -> None:
        super().__init__(directory.path, directory.specs)
        self._adapters = adapters

    def __getitem__(self, name: str) -> Packed:
        stored = super().__getitem__(name)
        return Packed(SCHEMES[FLOATS[self.specs[name].dtype]], stored.shape, {"": self.tensor(name)})

    def tensor(self, name: str) -> Tensor:
        spec = self.specs[name]
        if not any(name in adapter.deltas for adapter in self._adapters):
            return super().tensor(name)
        step = max(1, PIECE * spec.shape[0] // spec.numel)
        return torch.cat([self.rows(name, i, min(i + step, spec.shape[0])) for i in range(0, spec.shape[0], step)])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        stored = super().rows(name, start, stop)
        deltas = [adapter.deltas[name] for adapter in self._adapters if name in adapter.deltas]
        if not deltas:
            return stored
        values = stored.double()
        for delta in deltas:
            values = delta.merged(values, start)
        return values.to(stored.dtype)

    def row(self, name: str, *at: int) -> Tensor:
        if not any(name in adapter.deltas for adapter in self._adapters):
            return super().row(name, *at)
        first, *rest = at
        return self.rows(name, first, first + 1)[(0, *rest)]


def open_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read and check an adapter. shapes: of the checkpoint's weights, by canonical name. InputError for what
    is no LoRA adapter of this model, and for settings that dgq does not merge."""
    settings = read_json(path / CONFIG)
    _check_settings(path / CONFIG, settings)
    file = path / WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: no such file; dgq reads adapters that peft saved as safetensors")
    reader = HFDir(path, read_header(file))
    parts = _parts(reader, file)
    place = _place(parts, shapes, file)
    deltas: dict[str, Delta] = {}
    sides = set()
    for module, tensors in parts.items():
        delta, name, trained = _delta(reader, settings, file, place, module, tensors, shapes)
        if name == EMBEDDING:
            raise InputError(f"{file}: changes {module}, the embedding, which is the head as well; dgq merges no such")
        if layer_of(name) is not None:
            sides.add("encoder" if trained.startswith(ENCODER) else "decoder")
        if name in deltas and not delta.same(deltas[name]):
            raise InputError(
                f"{file}: {module} has other numbers than the same weight of the other side; encoder and decoder share"
                f" {name}, train one adapter for both"
            )
        deltas[name] = delta
    about = {"name": path.absolute().name, "files": {name: describe(path / name) for name in (CONFIG, WEIGHTS)}}
    return Adapter(path, deltas, about, frozenset(sides))


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {settings.get('peft_type')!r}; dgq merges LORA")
    for key, harmless in REFUSED.items():
        if key in settings and not any(type(settings[key]) is type(one) and settings[key] == one for one in harmless):
            raise InputError(f"{file}: {key} is {json.dumps(settings[key])[:60]}, which dgq does not merge")
    for key in ("r", "lora_alpha"):
        if type(settings.get(key)) not in (int, float) or not 0 < settings[key] < 1 << 20:
            raise InputError(f"{file}: {key} is {settings.get(key)!r}, not a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        found = settings.get(key) or {}
        if not isinstance(found, dict) or not all(type(v) in (int, float) and v > 0 for v in found.values()):
            raise InputError(f"{file}: {key} is no object of positive numbers")


_PART = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_(magnitude_vector)(?:\.weight)?)")


def _parts(reader: HFDir, file: Path) -> dict[str, dict[str, str]]:
    """Module, counted from what peft was given -> "A", "B", "magnitude_vector" -> tensor."""
    parts: dict[str, dict[str, str]] = {}
    for name, spec in reader.specs.items():
        match = _PART.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or match is None:
            raise InputError(f"{file}: {name} is no tensor of a LoRA layer that dgq merges")
        if spec.dtype not in FLOATS or not bool(reader.tensor(name).isfinite().all()):
            raise InputError(f"{file}: {name} is {spec.dtype}, or holds values that are not finite")
        parts.setdefault(match[1], {})[match[2] or match[3]] = name
    if not parts:
        raise InputError(f"{file}: holds no LoRA layer")
    for module, tensors in parts.items():
        if not {"A", "B"} <= tensors.keys():
            raise InputError(f"{file}: {module} lacks lora_A or lora_B")
    return parts


def _place(parts: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], file: Path) -> str:
    """What stands before the adapter's modules in the whole model."""
    for place in PLACES:
        if all(_candidates(place + module, shapes) for module in parts):
            return place
    odd = next(module for module in parts if not any(_candidates(place + module, shapes) for place in PLACES))
    raise InputError(f"{file}: {odd} is no layer of this model that holds a weight")


def _candidates(module: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Canonical names of the weights that a module of the whole model may have."""
    module = re.sub(r"(\.base_layer)+$", "", module)
    canonical = DECODER + module.removeprefix(ENCODER) if module.startswith(ENCODER) else module
    names = [canonical + ".weight", canonical + ".gate_up_proj", canonical + ".down_proj"]
    return [name for name in names if len(shapes.get(name, ())) > 1]


def _delta(
    reader: HFDir, settings: dict[str, Any], file: Path, place: str, module: str, tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Delta, str, str]:  # fmt: skip
    """What a module's tensors do, to which weight, and that weight's name on the side that was trained."""
    a, b = (reader.specs[tensors[part]].shape for part in "AB")
    for name in _candidates(place + module, shapes):
        *lead, out, width = shapes[name]
        experts = lead[0] if lead else 1
        matrix = len(a) == len(b) == 2 and a[0] == b[1] and a[0] % experts == 0 and a[0] > 0
        transposed = bool(lead) and matrix and (b[0], a[1]) == (width, out)
        if matrix and ((b[0], a[1]) == (out, width) or transposed):
            break
    else:
        raise InputError(f"{file}: {module} has lora_A {list(a)} and lora_B {list(b)}, which fit no weight there")
    trained = re.sub(r"(\.base_layer)+$", "", module) + ("." + name.rpartition(".")[2] if lead else "")
    rank = a[0] // experts
    r, alpha = (
        _setting(settings, key, pattern, trained)
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if r != rank:
        raise InputError(f"{file}: {module} has rank {rank}, {CONFIG} says {r}")
    magnitude = tensors.get("magnitude_vector")
    if bool(settings.get("use_dora")) != (magnitude is not None) or (
        magnitude and (lead or reader.specs[magnitude].shape != (out,))
    ):
        raise InputError(f"{file}: {module}: its magnitudes (DoRA) are missing, unexpected or of another shape")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    delta = Delta(reader, tensors["A"], tensors["B"], scale, lead[0] if lead else 0, transposed, magnitude)
    return delta, name, place + trained


def _setting(settings: dict[str, Any], key: str, patterns: str, module: str) -> float:
    """Of a module, as peft finds it: the first pattern that its name ends in."""
    for pattern, value in (settings.get(patterns) or {}).items():
        try:
            match = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise InputError(f"{CONFIG}: {patterns} has {pattern!r}, no regular expression ({error})") from None
        if match:
            return float(value)
    return float(settings[key])
