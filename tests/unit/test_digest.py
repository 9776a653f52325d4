"""The digest that tells a model's weights from another's: STATS and references are held against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from micro import micro_config, micro_tensors, write_micro

from dgq.convert.source.checkpoint import open_source


def digest(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    return open_source(str(write_micro(folder, micro_config(), tensors))).digest()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("experts.down_proj", lambda weight: torch.cat((weight[:1], weight[1:].flip(0)))),
        ("experts.gate_up_proj", lambda weight: torch.cat((weight[:-1], -weight[-1:]))),
        ("self_attn.o_proj.weight", lambda weight: torch.cat((weight[:1], -weight[1:]))),
        ("input_layernorm.weight", lambda weight: weight * 2),
    ],
)
def test_what_changes_shows(name: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    """All experts but the first, the last expert, all rows but the first, a vector."""
    tensors = micro_tensors(micro_config())
    first = digest(tmp_path / "one", tensors)
    assert first == digest(tmp_path / "same", tensors)
    whole = f"model.decoder.layers.1.{name}"
    assert first != digest(tmp_path / "other", tensors | {whole: change(tensors[whole])})
