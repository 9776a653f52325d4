"""Brings the tensors of a checkpoint under their canonical names, whatever program saved it.

    module.model.decoder.norm.weight              ->  model.decoder.norm.weight       wrappers: DDP, FSDP, compile, peft
    decoder.norm.weight                           ->  model.decoder.norm.weight       the inner model, saved by itself
    model.language_model.norm.weight              ->  model.decoder.norm.weight       Gemma 4's name of the text model
    ….moe.experts.3.up_proj.weight                ->  ….experts.3.up_proj.weight      vLLM's, Mixtral's and MLX's names
    model.encoder.language_model.norm.weight      ->  model.decoder.norm.weight       tied weights under the other name
    lm_head.weight                                ->  model.decoder.embed_tokens.weight
    ….experts.3.gate_proj.weight                  ->  ….experts.gate_up_proj          experts apart (experts.py)
    model.decoder.rotary_emb.…_inv_freq           ->  left out                        buffers that are computed anew
    no encoder layer_scalar at all                ->  the decoder's stand in          NeMo AutoModel's export
    no vision tensor, but a vision_config         ->  a text model                    NeMo AutoModel's export
    vision tensors, but no vision_config          ->  a text model, they are left out

Only header entries are looked at. Each step that changes something adds a notice. Everything else stays as it is, and
check_tensors() refuses what is missing or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgq.quant.files.hf_dir import INDEX, Elsewhere, read_index, read_json
from dgq.quant.types import Spec
from dgq.runtime.files.experts import Shapes, joined, owner_of
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, VISION

HEAD = "lm_head.weight"
PEFT = "base_model.model."
WRAPPERS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
BUFFERS = ("inv_freq", "embed_scale", "position_ids")  # ends of names of buffers that transformers computes itself
SCALAR = ".layer_scalar"
_EXPERTS = re.compile(r"\.(?:moe|mlp|block_sparse_moe)\.experts\.|\.experts\.switch_glu\.")
_MIXTRAL = re.compile(r"(\.experts\.\d+\.)w([123])\.")
_PROJECTIONS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_GEMMA = "model.language_model."


@dataclass(frozen=True)
class Canonical:
    """The tensors of a checkpoint. specs: canonical name -> header entry; vision: the vision tensors that it must hold,
    {} for a text model; notices: a line for every difference from a plain checkpoint."""

    specs: dict[str, Spec]
    vision: dict[str, tuple[int, ...]]
    notices: tuple[str, ...]


def tied_name(name: str) -> str | None:
    """The weight that shares its values with `name`, a weight of the encoder or the head. None for all others."""
    if name == HEAD:
        return EMBEDDING
    if name.startswith(ENCODER) and not name.endswith("layer_scalar"):
        return DECODER + name.removeprefix(ENCODER)
    return None


def stored_tensors(path: Path, elsewhere: Elsewhere | None = None) -> dict[str, Spec]:
    """The header entries of a directory, whose index may list tied weights that were left out of its files. elsewhere:
    the files of its weights, if these are not there."""
    return read_index(path, lambda name: tied_name(name) is not None, elsewhere)


def index_notices(path: Path, specs: Mapping[str, Spec]) -> list[str]:
    """A notice if the index of a local directory lists tied weights that are in none of its files."""
    listed = read_json(path / INDEX).get("weight_map") if (path / INDEX).is_file() else None
    absent = [name for name in listed or () if name not in specs]
    if not absent or not isinstance(listed, dict):
        return []
    return [f"{INDEX} lists {len(absent)} tied weights that no file holds ({absent[0]}): not needed"]


def canonical(specs: Mapping[str, Spec], text: Shapes, vision: Shapes) -> Canonical:
    """Sort out the names of an unquantised checkpoint. specs: header entries by the names in the files; text, vision:
    the shapes that its config.json announces, by canonical name."""
    tensors, notices = _renamed(specs, text, vision)
    for step in (joined, _without_buffers, _with_tied, _with_encoder_scalars):
        tensors, lines = step(tensors, text)
        notices += lines
    return _with_or_without_tower(tensors, notices, vision)


def canonical_packed(specs: Mapping[str, Spec], vision: Shapes) -> Canonical:
    """The same for a quantised directory, whose layout joins its experts: other programs' names, and the tower."""
    names = {name: _plain_name(name) for name in specs}
    decoder = any(name.startswith(DECODER) for name in names.values())
    names = {name: _of_decoder(plain, decoder) for name, plain in names.items()}
    return _with_or_without_tower(*_taken(specs, names), vision=vision)


Step = tuple[dict[str, Spec], list[str]]


def _plain_name(name: str) -> str:
    """The name without what wrappers and other programs add to it."""
    bare = ".".join(word for word in name.split(".") if word not in WRAPPERS).removeprefix(PEFT)
    bare = _MIXTRAL.sub(lambda match: f"{match[1]}{_PROJECTIONS[match[2]]}.", _EXPERTS.sub(".experts.", bare))
    for tower in VISION:  # Gemma 4 has no encoder above it
        if bare.startswith(tower.replace("encoder.", "", 1)):
            return bare.replace("model.", "model.encoder.", 1)
    return f"model.{bare}" if bare.startswith(("decoder.", "encoder.")) else bare


def _of_decoder(name: str, decoder: bool) -> str:
    """Gemma 4's name of a text tensor as the decoder's, if the files have no tensors of a decoder."""
    return DECODER + name.removeprefix(_GEMMA) if name.startswith(_GEMMA) and not decoder else name


def _renamed(specs: Mapping[str, Spec], text: Shapes, vision: Shapes) -> Step:
    """Canonical names instead of other programs', where these are names of the model."""

    def is_known(name: str) -> bool:
        owner = owner_of(name)
        parts = (name, tied_name(name), f"{owner}.down_proj", tied_name(f"{owner}.down_proj"))
        return name in vision or any(part in text for part in parts)

    decoder = any(_plain_name(name).startswith(DECODER) for name in specs)
    names = {}
    for name in specs:
        plain = _plain_name(name)
        choices = (name, plain, _of_decoder(plain, decoder))
        names[name] = next((choice for choice in choices if is_known(choice) or choice.endswith(BUFFERS)), name)
    return _taken(specs, names)


def _taken(specs: Mapping[str, Spec], names: Mapping[str, str]) -> Step:
    """The header entries under other names; as they are if two tensors had one name, which check_tensors() refuses."""
    renamed = [name for name, new in names.items() if new != name]
    if not renamed or len(set(names.values())) < len(names):
        return dict(specs), []
    first = renamed[0]
    line = f"{len(renamed)} of {len(specs)} tensors have another program's names ({first}): read as {names[first]}, …"
    return {names[name]: spec for name, spec in specs.items()}, [line]


def _without_buffers(specs: dict[str, Spec], text: Shapes) -> Step:
    extra = [name for name in specs if name.endswith(BUFFERS) and name not in text]
    if not extra:
        return specs, []
    line = f"{len(extra)} saved buffers ({extra[0]}, …): left out, they are computed from config.json"
    return {name: spec for name, spec in specs.items() if name not in extra}, [line]


def _with_tied(specs: dict[str, Spec], text: Shapes) -> Step:
    """Tied weights that were saved under their other name alone."""
    renamed: dict[str, str] = {}
    for name in specs:
        original = tied_name(name)
        if original is not None and original in text and original not in specs:
            renamed.setdefault(original, name)
    if not renamed:
        return specs, []
    original, first = next(iter(renamed.items()))
    line = f"{len(renamed)} tied weights are saved under their other name alone ({first}): read as {original}, …"
    rest = {name: spec for name, spec in specs.items() if name not in renamed.values()}
    return rest | {original: specs[name] for original, name in renamed.items()}, [line]


def _with_encoder_scalars(specs: dict[str, Spec], text: Shapes) -> Step:
    """The decoder's layer scalars for the encoder's, if the checkpoint has none of those."""
    wanted = {name: DECODER + name.removeprefix(ENCODER) for name in text if name.startswith(ENCODER)}
    scalars = {name: other for name, other in wanted.items() if name.endswith(SCALAR) and other in specs}
    if len(scalars) != len(wanted) or any(name in specs for name in wanted):
        return specs, []
    line = f"no encoder layer_scalar in any of {len(scalars)} layers: the decoder's are taken for the encoder"
    return specs | {name: specs[other] for name, other in scalars.items()}, [line]


def _with_or_without_tower(specs: dict[str, Spec], notices: list[str], vision: Shapes) -> Canonical:
    """A text model, unless both config.json and the files have a vision tower."""
    tower = [name for name in specs if name.startswith(VISION)]
    if tower and not vision:
        line = f"config.json has no vision_config, but the files hold {len(tower)} vision tensors: left out, text only"
        notices = [*notices, f"{line}; put the base model's vision_config back if it is to see images"]
        specs = {name: spec for name, spec in specs.items() if name not in tower}
    if vision and not tower:
        notices = [*notices, "config.json has a vision_config, but the files hold no vision tower: text only"]
    return Canonical(specs, dict(vision) if tower else {}, tuple(notices))
