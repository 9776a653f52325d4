"""An adapter as peft and trainers over it save them, opened and checked.

    base_model.model.<module>.lora_A.weight, lora_B.weight, lora_magnitude_vector     with or without ".default."

<module> is counted from the whole model, or from the part of it that peft was given: model, decoder, the encoder's
language model. Encoder and decoder run one set of weights, but peft trains factors for each module that it finds, so
that an adapter has deltas for each side. Settings of peft that change what the factors mean are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import FLOATS, HFDir, read_header, read_json
from dgq.runtime.adapters.delta import Delta, Named, Piece, twice
from dgq.runtime.adapters.patterns import first_match
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, VISION, layer_of

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
SIDES = ("encoder", "decoder")
PLACES = ("", "model.", DECODER, ENCODER, "model.encoder.")  # of what peft was given, in the whole model
# Settings that change what the weights become, and the values with which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,), "lora_bias": (False,), "bias": ("none",), "modules_to_save": (None, []),
    "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "use_qalora": (False,),
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,), "use_bdlora": (None, False),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base's weights too
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. deltas: of each side, canonical weight name -> what is added where that side runs; vision: of
    the tower and its projector, which the encoder's side alone has; left_out: of its vision layers, where the model has
    no tower."""

    path: Path
    name: str
    deltas: Mapping[str, Named]
    vision: Named = field(default_factory=dict)
    left_out: int = 0

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """Those of encoder and decoder whose layers it changes."""
        return tuple(side for side in SIDES if any(layer_of(name) is not None for name in self.deltas[side]))

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """The weights that both sides share and that it changes on one alone, or otherwise on the other."""
        encoder, decoder = (self.deltas[side] for side in SIDES)
        shared = [name for name in {**encoder, **decoder} if layer_of(name) is not None]
        return tuple(n for n in shared if n not in encoder or n not in decoder or not encoder[n].same(decoder[n]))

    @property
    def about_sides(self) -> str:
        """Of which side its factors are, in words."""
        if len(self.sides) == 1:
            return f"trained on the {self.sides[0]} alone"
        return "trained apart for encoder and decoder" if self.apart else "the same for encoder and decoder"

    @property
    def notice(self) -> str:
        """A line for whoever runs it."""
        count = sum(map(len, self.deltas.values())) + len(self.vision)
        lost = f"; {self.left_out} layers of a vision tower are left out, the model has none" if self.left_out else ""
        return f"adapter {self.name}: {count} LoRA layers, {self.about_sides}, applied beside the weights{lost}"


@dataclass(frozen=True)
class _Opening:
    """What the checks of one adapter have in common."""

    file: Path
    settings: Mapping[str, Any]
    reader: HFDir
    shapes: Mapping[str, tuple[int, ...]]
    place: str = ""


def open_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]], name: str | None = None) -> Adapter:
    """Read and check an adapter. shapes: of the model's weights, by canonical name, those of its vision tower among
    them if it has one. name: to choose it by, its directory's unless given. InputError for what is no LoRA adapter of
    this model, and for settings that change what its numbers mean."""
    settings = read_json(path / CONFIG)
    _check_settings(path / CONFIG, settings)
    file = path / WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: no such file; {_instead(path)}")
    reader = HFDir(path, read_header(file))
    parts = _parts(reader, file)
    towered = any(name.startswith(VISION) for name in shapes)
    opening = _Opening(file, settings, reader, shapes, _place(parts, shapes, file, settings, towered))
    deltas: dict[str, Named] = {side: {} for side in SIDES}
    vision: Named = {}
    left_out = 0
    for module, tensors in parts.items():
        if not towered and (opening.place + module).startswith(VISION):
            left_out += 1
            continue
        target, weight, delta = _delta(opening, module, tensors)
        if weight == EMBEDDING:
            raise InputError(f"{file}: changes {module}, the embedding, which is the head as well; dgq applies no such")
        _put(vision if weight.startswith(VISION) else deltas[target], weight, delta, f"{file}: {module}")
    return Adapter(path, name or path.absolute().name, deltas, vision, left_out)


def _put(named: Named, weight: str, delta: Delta, where: str) -> None:
    """Add a delta of a weight; single experts' are joined."""
    joined = named[weight].joined(delta) if weight in named else delta
    if len(joined.pieces) > 1 and (None in {piece.expert for piece in joined.pieces} or any(twice(joined.pieces))):
        raise InputError(f"{where} changes {weight}, which another module of this adapter changes as well")
    named[weight] = joined


def _instead(path: Path) -> str:
    """What to do about an adapter without safetensors."""
    if (path / PICKLED).is_file():
        return (
            f"{PICKLED} is pickled, and unpickling can run code; in an environment that you trust:"
            f" torch.load it, then safetensors.torch.save_file(…, '{WEIGHTS}')"
        )
    return "dgq reads adapters that peft saved as safetensors"


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {settings.get('peft_type')!r}; dgq applies LORA")
    for key, harmless in REFUSED.items():
        if key in settings and not any(type(settings[key]) is type(one) and settings[key] == one for one in harmless):
            raise InputError(f"{file}: {key} is {json.dumps(settings[key])[:60]}, which dgq does not apply")
    for key in ("r", "lora_alpha"):
        if type(settings.get(key)) not in (int, float) or not 0 < settings[key] < 1 << 20:
            raise InputError(f"{file}: {key} is {settings.get(key)!r}, not a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        values = settings.get(key) or {}
        if not isinstance(values, dict) or not all(type(v) in (int, float) and v > 0 for v in values.values()):
            raise InputError(f"{file}: {key} is no object of positive numbers")


_PART = re.compile(r"(.+)\.(?:lora_([AB])(?:\.[\w-]+)?\.weight|lora_(magnitude_vector)(?:\.[\w-]+)??(?:\.weight)?)")


def _parts(reader: HFDir, file: Path) -> dict[str, dict[str, str]]:
    """Module, counted from what peft was given -> "A", "B", "magnitude_vector" -> tensor."""
    parts: dict[str, dict[str, str]] = {}
    for name, spec in reader.specs.items():
        match = _PART.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise InputError(f"{file}: {name} is no tensor of a LoRA layer that dgq applies")
        if spec.dtype not in FLOATS or not bool(reader.tensor(name).isfinite().all()):
            raise InputError(f"{file}: {name} is {spec.dtype}, or holds values that are not finite")
        tensors, part = parts.setdefault(match[1], {}), match[2] or match[3]
        if part in tensors:
            raise InputError(f"{file}: {name} and {tensors[part]} are two adapters' in one file; save each alone")
        tensors[part] = name
    if not parts:
        raise InputError(f"{file}: holds no LoRA layer")
    for module, tensors in parts.items():
        if not {"A", "B"} <= tensors.keys():
            raise InputError(f"{file}: {module} lacks lora_A or lora_B")
    return parts


def _place(
    parts: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], file: Path, settings: Mapping[str, Any],
    towered: bool,
) -> str:  # fmt: skip
    """What stands before the adapter's modules in the whole model. The encoder's language model has the decoder's
    names; peft notes the class that it was given."""

    def fits(place: str, module: str) -> bool:
        whole = place + module
        return bool(_targets(whole, shapes)) or (not towered and whole.startswith(VISION))

    given = str((settings.get("auto_mapping") or {}).get("base_model_class"))
    for place in sorted(PLACES, key=lambda place: place == DECODER) if "Encoder" in given else PLACES:
        if all(fits(place, module) for module in parts):
            return place
    odd = next(module for module in parts if not any(fits(place, module) for place in PLACES))
    raise InputError(f"{file}: {odd} is no layer of this model that holds a weight")


_EXPERT = re.compile(r"(.+?)(?:\.(?:mlp|moe))?\.experts\.(\d{1,6})\.(gate|up|down)_proj")


@dataclass(frozen=True)
class _Target:
    """A weight that a module may have. shape: of what the module multiplies with; expert, first: as in Piece."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0


def _targets(module: str, shapes: Mapping[str, tuple[int, ...]]) -> list[_Target]:
    """The weights that a module of the whole model may have."""
    module = re.sub(r"(\.base_layer)+$", "", module)
    canonical = DECODER + module.removeprefix(ENCODER) if module.startswith(ENCODER) else module
    if (match := _EXPERT.fullmatch(canonical)) is not None:
        name = f"{match[1]}.experts.{'down' if match[3] == 'down' else 'gate_up'}_proj"
        if len(shapes.get(name, ())) != 3 or int(match[2]) >= shapes[name][0]:
            return []
        out, width = shapes[name][1:]
        rows = out if match[3] == "down" else out // 2
        return [_Target(name, (rows, width), int(match[2]), rows if match[3] == "up" else 0)]
    names = [canonical + end for end in (".weight", ".gate_up_proj", ".down_proj", ".linear.weight")]
    return [_Target(name, shapes[name]) for name in names if len(shapes.get(name, ())) > 1]


def _delta(opening: _Opening, module: str, tensors: Mapping[str, str]) -> tuple[str, str, Delta]:
    """The side that a module runs on, its weight, and what its tensors add to that."""
    reader, file, settings = opening.reader, opening.file, opening.settings
    a, b = (reader.specs[tensors[part]].shape for part in "AB")
    for target in _targets(opening.place + module, opening.shapes):
        *lead, out, width = target.shape
        experts = lead[0] if lead else 1
        matrix = len(a) == len(b) == 2 and a[0] == b[1] and a[0] % experts == 0 and a[0] > 0
        transposed = bool(lead) and matrix and (b[0], a[1]) == (width, out) != (out, width)
        if matrix and ((b[0], a[1]) == (out, width) or transposed):
            break
    else:
        raise InputError(f"{file}: {module} has lora_A {list(a)} and lora_B {list(b)}, which fit no weight there")
    trained = re.sub(r"(\.base_layer)+$", "", module) + ("." + target.name.rpartition(".")[2] if lead else "")
    rank = a[0] // experts
    r, alpha = (
        _setting(settings, key, pattern, trained)
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if r != rank:
        raise InputError(f"{file}: {module} has rank {rank}, {CONFIG} says {r}")
    magnitude = tensors.get("magnitude_vector")
    if bool(settings.get("use_dora")) != (magnitude is not None) or (
        magnitude and (len(opening.shapes[target.name]) > 2 or reader.specs[magnitude].shape != (out,))
    ):
        raise InputError(f"{file}: {module}: its magnitudes (DoRA) are missing, unexpected or of another shape")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    piece = Piece(tensors["A"], tensors["B"], scale, rank, target.expert, target.first, transposed)
    side = "encoder" if (opening.place + module).startswith(ENCODER) else "decoder"
    return side, target.name, Delta(reader, opening.shapes[target.name], (piece,), magnitude)


def _setting(settings: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """Of a module, as peft finds it: the first pattern that its name ends in."""
    values = settings.get(patterns) or {}
    pattern = first_match(values, module, f"{CONFIG}: {patterns}")
    return float(settings[key] if pattern is None else values[pattern])
