"""Which device a command computes on."""

from __future__ import annotations

import re

from dgq.quant.errors import InputError

_UNITS = {"": 1 << 30, "GiB": 1 << 30, "GB": 10**9, "G": 1 << 30, "MiB": 1 << 20, "MB": 10**6}


def chosen_device(asked: str) -> str:
    """ "cpu" or "cuda" for the --device option; auto takes a GPU where torch sees one. InputError if there is none."""
    import torch

    visible = torch.cuda.is_available()
    if asked == "cuda" and not visible:
        raise InputError("--device cuda: no CUDA device is visible to torch; use --device cpu")
    return asked if asked != "auto" else "cuda" if visible else "cpu"


def memory_size(text: str | None, option: str = "--vram") -> int | None:
    """Bytes of "12GiB", "12GB" or "12" (GiB). InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS or not 0 < float(match[1]) < 1e6:
        raise InputError(f"{option} {text}: expected a size such as 12GiB")
    return int(float(match[1]) * _UNITS[match[2]])
