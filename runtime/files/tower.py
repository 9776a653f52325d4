"""transformers' own vision tower and projector over an artifact's vision tensors. They turn an image's patches into
soft tokens as wide as the text model.

    patches ── tower (bidirectional layers, pooling) ── norm ── projection ── (soft tokens, hidden)

The tower is never quantised. It takes one image at a time, so that its memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.shape.vision import EMBED, TOWER, expected_vision


@dataclass(frozen=True)
class Patches:
    """An image for the tower: values (1, patches, 3 * side²) float32 of 0 to 1, positions (1, patches, 2) x and y, -1
    where there is none; soft_tokens: what it becomes."""

    values: Tensor
    positions: Tensor
    soft_tokens: int


class Tower:
    """The tower on a device."""

    def __init__(
        self,
        config: Mapping[str, Any],
        hidden: int,
        read: Callable[[str], Tensor],
        source: str,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """config: config.json's vision_config; hidden: the text model's width; read: a canonical vision tensor. dtype:
        of weights and activations. InputError naming `source` for settings that transformers refuses."""
        from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
        from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
        from transformers.utils import logging

        self._source, self._device = source, torch.device(device)
        logging.disable_progress_bar()
        weights = {name: read(name).to(dtype) for name in expected_vision({"vision_config": config}, hidden, source)}
        tower = {name.removeprefix(TOWER): weights[name] for name in weights if name.startswith(TOWER)}
        try:
            vision_config = Gemma4VisionConfig.from_dict(dict(config))
            self._tower = Gemma4VisionModel.from_pretrained(None, config=vision_config, state_dict=tower, dtype=dtype)
        except Exception as error:  # whatever odd settings lead the library into
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{source}: transformers does not build this vision tower ({what})") from None
        with torch.device("meta"):
            self._project = DiffusionGemmaMultimodalEmbedder(vision_config, SimpleNamespace(hidden_size=hidden))
        projection = {name.removeprefix(EMBED): weights[name] for name in weights if name.startswith(EMBED)}
        self._project.load_state_dict(projection, assign=True)
        self._tower, self._project = self._tower.to(self._device).eval(), self._project.to(self._device).eval()

    @torch.inference_mode()
    def __call__(self, patches: Patches) -> Tensor:
        """An image's soft tokens, (soft tokens, hidden) in the tower's dtype."""
        values, positions = patches.values.to(self._device), patches.positions.to(self._device)
        seen: Tensor = self._project(self._tower(values, positions).last_hidden_state)
        if len(seen) != patches.soft_tokens:
            raise InputError(f"{self._source}: gives {len(seen)} tokens for an image of {patches.soft_tokens}")
        if not bool(seen.isfinite().all()):
            raise InputError(f"{self._source}: the vision tower makes values that are not finite; the file is damaged")
        return seen
