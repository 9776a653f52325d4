"""The sums of STATS as llama.cpp's importance matrix, for llama-quantize and for `dgq convert --imatrix`.

    in_sum2   sum of x² of a weight's input, over prompts and canvases together      (quant/files/imatrix.py)
    counts    tokens of it

The names are those of a .gguf. STATS name one weight for all readers of an input; here each reader has an entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dgq.convert.calibration.stats import READERS
from dgq.convert.layerwise.samples import KINDS
from dgq.convert.resume.target import check_target
from dgq.convert.source.checkpoint import Source
from dgq.quant.files.imatrix import write_imatrix
from dgq.runtime.shape.names import gguf_name

Tensors = dict[str, torch.Tensor]


def export_once(draft: Path, path: Path, source: Source, tensors: Tensors, about: dict[str, Any]) -> None:
    """Write the imatrix to `path`, unless the same one is there already: the same work may have written it and then
    broken off. InputError if another file is there. draft: where it may lie for the comparison."""
    export_imatrix(draft, source, tensors, about)
    if not (path.is_file() and path.read_bytes() == draft.read_bytes()):
        check_target(path)
        export_imatrix(path, source, tensors, about)


def export_imatrix(path: Path, source: Source, tensors: Tensors, about: dict[str, Any]) -> None:
    """Write the sums of STATS' tensors as an imatrix. about: STATS' metadata."""
    entries = {}
    for name, entry in imatrix_entries(tensors).items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        for reader in (kind, *READERS.get(kind, ())):
            same = name.replace(kind, reader)
            if same in source.text and (known := gguf_name(same)) is not None:
                entries[known] = entry
    write_imatrix(path, entries, about["data"]["name"], about["rounds"], about["tokens"] // about["rounds"])


def imatrix_entries(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight -> in_sum2 (E or 1, in) and counts (E or 1,) float32, of prompts and canvases together."""
    entries = {}
    for key, sums in tensors.items():
        if key.endswith(".sum2"):
            name = key.removesuffix(".sum2")
            count = tensors[name + ".count"].reshape(-1, KINDS).sum(-1).float()
            entries[name] = (sums.reshape(len(count), 2, -1).sum(1), count)
    return entries
