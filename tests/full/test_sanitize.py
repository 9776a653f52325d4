"""sanitize.py, made for compute-sanitizer on a GPU, launches what it says, and notices a kernel that it does not."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
import sanitize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton.runtime.)?interpreter"),
]
QUICK = [  # under the interpreter, and every kernel
    "experts nvfp4, 1 tokens", "linear nvfp4", "many tokens nvfp4", "table q8_0", "norms 72", "route 1", "place 3",
    "attend 64, causal", "step over 512", "round q6_k", "search", "session",
]  # fmt: skip


def test_every_kernel_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", DEVICE, "--only", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["launches"].keys() == sanitize.kernels().keys() and min(found["launches"].values()) > 0
    assert len(found["launches"]) >= 25


def test_a_kernel_that_is_not_launched_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = sanitize.cases(DEVICE)
    monkeypatch.setattr(
        sanitize, "cases", lambda _: {name: every[name] for name in ("search 16", "picks beyond a block")}
    )
    assert sanitize.main(["--device", DEVICE]) == 1
    missing = json.loads(capsys.readouterr().out.splitlines()[-1])["not_launched"]
    assert "search_kernel._qkx" in missing and "moe_kernels.sort_picks" not in missing
    assert len(missing) == len(sanitize.kernels()) - 3
