"""Brings the tensors of an unquantised checkpoint under their canonical names, whatever program saved it.

    module.model.decoder.norm.weight              ->  model.decoder.norm.weight       wrappers: DDP, FSDP, compile, peft
    decoder.norm.weight                           ->  model.decoder.norm.weight       the inner model, saved by itself
    model.encoder.language_model.norm.weight      ->  model.decoder.norm.weight       tied weights under the other name
    lm_head.weight                                ->  model.decoder.embed_tokens.weight
    model.decoder.rotary_emb.…_inv_freq           ->  left out                        buffers that are computed anew
    no encoder layer_scalar at all                ->  the decoder's stand in          NeMo AutoModel's export
    no vision tensor, but a vision_config         ->  a text model                    NeMo AutoModel's export

Only header entries are looked at. Each step that changes something adds a notice. Everything else stays as it is, and
check_tensors() refuses what is missing or unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dgq.quant.files.hf_dir import Elsewhere, read_index
from dgq.quant.types import Spec
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER, VISION

HEAD = "lm_head.weight"
PEFT = "base_model.model."
WRAPPERS = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
BUFFERS = ("inv_freq", "embed_scale", "position_ids")  # ends of names of buffers that transformers computes itself
SCALAR = ".layer_scalar"
Shapes = Mapping[str, tuple[int, ...]]


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


def canonical(specs: Mapping[str, Spec], text: Shapes, vision: Shapes) -> Canonical:
    """Sort out the names of a checkpoint. specs: header entries by the names in the files; text, vision: the shapes
    that its config.json announces, by canonical name."""
    tensors, notices = _unwrapped(specs, text, vision)
    for step in (_without_buffers, _with_tied, _with_encoder_scalars):
        tensors, lines = step(tensors, text)
        notices += lines
    towerless = bool(vision) and not any(name.startswith(VISION) for name in tensors)
    if towerless:
        notices.append("config.json has a vision_config, but the files hold no vision tower: text only")
    return Canonical(tensors, {} if towerless else dict(vision), tuple(notices))


Step = tuple[dict[str, Spec], list[str]]


def _unwrapped(specs: Mapping[str, Spec], text: Shapes, vision: Shapes) -> Step:
    """Names without the prefixes of wrappers, and with the `model.` that an inner model was saved without."""

    def is_known(name: str) -> bool:
        return name in text or name in vision or tied_name(name) in text

    names = {}
    for name in specs:
        bare = ".".join(word for word in name.split(".") if word not in WRAPPERS).removeprefix(PEFT)
        choices = (name, bare, f"model.{bare}")
        names[name] = next((choice for choice in choices if is_known(choice) or choice.endswith(BUFFERS)), name)
    renamed = [name for name, new in names.items() if new != name]
    if not renamed or len(set(names.values())) < len(names):  # two tensors of one name: check_tensors() refuses them
        return dict(specs), []
    first = renamed[0]
    line = f"{len(renamed)} of {len(specs)} tensors carry the names of a wrapper ({first}): read as {names[first]}, …"
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
