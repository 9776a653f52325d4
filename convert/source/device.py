"""Which device a command computes on: the one asked for, or a GPU if there is one."""

from __future__ import annotations

from dgq.quant.errors import InputError


def chosen_device(asked: str) -> str:
    """Return "cpu" or "cuda" for the --device option; auto takes a GPU if torch sees one. InputError for "cuda" without
    one."""
    import torch

    visible = torch.cuda.is_available()
    if asked == "cuda" and not visible:
        raise InputError("--device cuda: no CUDA device is visible to torch; use --device cpu")
    return asked if asked != "auto" else "cuda" if visible else "cpu"
