"""A safetensors directory that may hold tied weights twice, as llm-compressor and trainers save them: the encoder's
copies of the decoder's weights, and lm_head's copy of the embedding. One of the two is listed. When it is read, it is
compared with the other, byte for byte. transformers' bitsandbytes saves the encoder's quant_states without the weights:
these are copies too.

input_global_scale is not compared, because encoder and decoder saw different activations. The decoder's is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import HFDir
from dgq.quant.formats.compressed_tensors import unfused
from dgq.quant.types import Spec
from dgq.runtime.files.canonical import tied_name

OWN = ("layer_scalar", "input_global_scale")  # last words of names that the encoder has values of its own for


class TiedDir(HFDir):
    """See the module. Global scales without dimensions (modelopt's, converted) are listed as [1], and stacks of
    `experts` experts in compressed-tensors' layout as a tensor a module."""

    def __init__(self, path: Path, stored: Mapping[str, Spec], experts: int) -> None:
        """stored: the directory's header entries."""
        specs = {name: _with_dimension(spec) for name, spec in unfused(stored, experts).items()}
        copies = {name: original for name in specs if (original := tied_name(name)) in specs and original is not None}
        super().__init__(path, {name: spec for name, spec in specs.items() if name not in copies})
        twins = {original: specs[copy] for copy, original in copies.items() if not copy.endswith(OWN)}
        self._twins = HFDir(path, twins)

    def tensor(self, name: str) -> torch.Tensor:
        """The listed tensor. InputError if its copy differs."""
        tensor = super().tensor(name)
        if name in self._twins.specs:
            copy, listed = self._twins.specs[name], self.specs[name]
            same = (copy.dtype, copy.shape) == (listed.dtype, listed.shape)
            if not same or not torch.equal(
                *(one.flatten().view(torch.uint8) for one in (tensor, self._twins.tensor(name)))
            ):
                raise InputError(f"{copy.file}: {copy.name} is not a copy of {name}; the model ties them")
        return tensor


def _with_dimension(spec: Spec) -> Spec:
    return replace(spec, shape=(1,)) if spec.name.endswith("_global_scale") and not spec.shape else spec
