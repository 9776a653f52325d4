"""Which device a command computes on."""

from __future__ import annotations

from dgq.quant.errors import InputError


def chosen_device(asked: str) -> str:
    """ "cpu" or "cuda" for the --device option; auto takes a GPU where torch sees one. InputError if there is none."""
    import torch

    visible = torch.cuda.is_available()
    if asked == "cuda" and not visible:
        raise InputError("--device cuda: no CUDA device is visible to torch; use --device cpu")
    return asked if asked != "auto" else "cuda" if visible else "cpu"
