"""What `dgq run` is asked for, and the model that it opens for it.

RunRequest --> open_run() --> OpenedRun: headers read and options checked, nothing loaded
                              answer.py: one prompt      conversation.py: turn after turn
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.device import chosen_device
from dgq.convert.source.models import open_model
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import Artifact
from dgq.runtime.model.model import default_dtype

if TYPE_CHECKING:
    from dgq.runtime.engine.engine import Rng
    from dgq.runtime.files.images import Vision
    from dgq.runtime.model.model import Model


@dataclass(frozen=True)
class RunRequest:
    """The model and the settings of its answers; prompts and images come later.

    model: an artifact's directory or .gguf, a checkpoint directory, a Hub id or "tiny".
    revision: branch, tag or commit of a Hub id. adapters: LoRA adapters to apply beside the weights.
    chat: whether prompts go through the chat template. thinking: the template's switch; None for its default.
    max_new_tokens, steps: the most of an answer, and of a canvas; None for those of generation_config.
    seed: the same seed gives the same text. rng: "counter", the same on every device, or "torch", transformers'.
    device: "auto", "cpu" or "cuda". dtype: of activations, "auto", "fp32" or "bf16".
    activations: "nvfp4" to round the experts' inputs as a W4A4 kernel does.
    vram: bytes of the GPU to use; experts beyond them wait in host memory.
    image_tokens: the most that an image becomes, one of images.IMAGE_TOKENS; None for the model's setting.
    """

    model: str
    revision: str | None = None
    adapters: tuple[AdapterLike, ...] = ()
    chat: bool = False
    thinking: bool | None = None
    max_new_tokens: int | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    activations: str | None = None
    rng: Rng = "counter"
    vram: int | None = None
    image_tokens: int | None = None


@dataclass(frozen=True)
class OpenedRun:
    """A request whose model is open: headers are read, and nothing is loaded. device: "cpu" or "cuda"."""

    request: RunRequest
    artifact: Artifact
    device: str
    dtype: torch.dtype

    @property
    def vision(self) -> Vision:
        """The model's way to take images. InputError if it has no vision tower."""
        return self.artifact.vision.with_tokens(self.request.image_tokens)

    def load(self) -> Model:
        """The model on its device. InputError for values that no quantiser writes."""
        return self.artifact.load(self.device, self.dtype, self.request.activations, self.request.vram)


def open_run(request: RunRequest, notice: Callable[[str], None] | None = None) -> OpenedRun:
    """Open the request's model. notice is called with each remark about it. InputError for everything that is wrong
    with it, for a device that is not there, and for `vram` where the runtime cannot bound it."""
    device = chosen_device(request.device)
    bounded = request.dtype != "fp32" and not request.activations and request.rng == "counter"
    if request.vram is not None and (device != "cuda" or not bounded):
        raise InputError("--vram: is for bfloat16 on a GPU, with --rng counter and without --activations")
    artifact = open_model(request.model, request.revision, request.adapters, notice)
    dtypes = {"auto": default_dtype(device), "fp32": torch.float32, "bf16": torch.bfloat16}
    return OpenedRun(request, artifact, device, dtypes[request.dtype])
