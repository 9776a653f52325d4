"""What `dgq eval` can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dgq.convert.source.adapter import AdapterLike
from dgq.convert.source.device import chosen_device
from dgq.quant.errors import InputError


@dataclass(frozen=True)
class EvaluateOptions:
    """What `dgq eval` can be asked for.

    tasks: names of tasks or groups of lm-evaluation-harness. task_folders: folders of YAML files, whose tasks can be
    named beside the harness's own; they may name Python functions, which then run.
    against: SRC, the BF16 model, evaluated first; revision: of SRC on the Hub. adapters: applied beside SRC's weights
    and those of each artifact that was made without adapters.
    output: the JSON file to create. report: a directory of `dgq validate` that judged these artifacts; the scores are
    added to it.
    limit: prompts of a task at most. shots: worked examples before a prompt, None for the task's own number.
    seed: of the random tokens. steps: of a canvas at most; max_new_tokens: of an answer at most; None for the model's
    and the task's. thinking: the chat template's switch; thoughts are not scored.
    unsafe_code: whether a task may run the code that the model wrote.
    device, dtype, vram (bytes of the GPU to use): as in `dgq run`.
    """

    tasks: Sequence[str]
    task_folders: Sequence[Path] = ()
    against: str | None = None
    output: Path = Path("evaluation.json")
    report: Path | None = None
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    steps: int | None = None
    max_new_tokens: int | None = None
    thinking: bool | None = None
    unsafe_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    vram: int | None = None
    revision: str | None = None
    adapters: Sequence[AdapterLike] = ()

    def placement(self) -> tuple[str, torch.dtype]:
        """The device and the activations' dtype. InputError for a device that is not there, and for vram without a
        GPU."""
        device = chosen_device(self.device)
        usual = torch.float32 if device == "cpu" else torch.bfloat16
        dtype = {"auto": usual, "fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]
        if self.vram is not None and (device != "cuda" or dtype != torch.bfloat16):
            raise InputError("--vram: is for bfloat16 on a GPU")
        return device, dtype
