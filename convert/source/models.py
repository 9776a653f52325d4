"""Opens whatever dgq can run: an artifact, or the BF16 source of one.

a .gguf, or a directory whose config.json or files say that it is quantised     runtime/files/artifact.py opens it
USER/NAME with a dgq.json in it                                                 the same, fetched whole
a checkpoint directory, USER/NAME of one, `tiny`                                checkpoint.py opens it

LoRA adapters are applied beside the weights of any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dgq.convert.source.adapter import AdapterChoice, AdapterLike
from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.hub import TINY, Located, fetch_artifact, is_hub_id, locate
from dgq.quant.files.hf_dir import read_json
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.folders import refuse_other
from dgq.runtime.files.quantization import quantization

PROVENANCE = "dgq.json"  # the file that makes a directory an artifact of dgq; convert/write/provenance.py writes it


def open_model(
    model: str,
    revision: str | None = None,
    adapters: Sequence[AdapterLike] = (),
    notice: Callable[[str], None] | None = None,
) -> Artifact:
    """Open an artifact or a BF16 source from its headers.

    model: a path, a Hub id or `tiny`. revision: branch, tag or commit of a Hub id. adapters: directories or Hub ids of
    LoRA adapters to apply beside the weights; if none of them is without a name, the first named one is active until a
    request chooses. notice is called with each remark about the weights, and with a line for each adapter. InputError
    for everything that is wrong with the model or an adapter.
    """
    opened = _with_adapters(_open(model, revision), [AdapterChoice.of(one) for one in adapters])
    if notice is not None:
        for line in opened.remarks:
            notice(line)
    return opened


def _open(model: str, revision: str | None) -> Artifact:
    if is_artifact(model):
        return open_artifact(model)
    if is_hub_id(model):  # Its headers are checked before its weights are fetched.
        if (small := published(model, revision)) is not None:
            return open_artifact(fetch_artifact(model, small.revision).path)
        revision = open_source(model, revision, weights=False).where.revision
    source = open_source(model, revision)
    source.check_copies()
    return Artifact("safetensors", source.path, source.path, source.config, source.generation, source)


def _with_adapters(artifact: Artifact, choices: Sequence[AdapterChoice]) -> Artifact:
    if not choices:
        return artifact
    opened = [choice.open(artifact.shapes) for choice in choices]
    always = [adapter.name for choice, adapter in zip(choices, opened, strict=True) if choice.name is None]
    return artifact.with_adapters(opened, always or [opened[0].name])


def published(repo: str, revision: str | None) -> Located | None:
    """The small files of a Hub repository that holds an artifact of dgq; None for any other repository."""
    small = locate(repo, revision, weights=False)
    return small if (small.path / PROVENANCE).is_file() else None


def is_artifact(model: str) -> bool:
    """Whether it is quantised: a file, a directory with a .gguf and no safetensors, or one whose config.json has a
    quantization. Everything else is a source; `tiny` is the embedded one. InputError for folders that hold no model."""
    if model == TINY:
        return False
    path = Path(model)
    if path.is_file():
        return True
    refuse_other(path)
    if not any(path.glob("*.safetensors")):
        return any(path.glob("*.gguf"))
    config = path / "config.json"
    return config.is_file() and quantization(path, read_json(config)) is not None
