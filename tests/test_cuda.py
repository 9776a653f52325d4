"""The runtime on CUDA against itself on the CPU. Skipped where there is no GPU (CI has none); run by hand, figures in LOG.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dgq.runtime.artifact import open_artifact
from dgq.runtime.engine import generate
from dgq.runtime.model import Model

TINY_A = Path(__file__).parent / "golden" / "tinyA"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("keep", (0, 1 << 28), ids=("packed", "decoded once"))
@pytest.mark.parametrize("path", (TINY_A, TINY_A / "reference.Q4_K_M.gguf"), ids=("bf16", "gguf"))
def test_float32_logits_equal_the_cpu_s(path: Path, keep: int) -> None:
    if path.is_dir():
        from dgq.convert.generate import open_model

        artifact = open_model(str(path))
    else:
        artifact = open_artifact(path)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(5, 500, (2, 50), generator=generator)
    canvas = torch.randint(5, 500, (2, artifact.config.canvas), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        model = Model(artifact.config, artifact.weights, device, torch.float32, keep_decoded=keep)
        cache = model.new_cache(2)
        model.encode(prompt.to(device), cache)
        plain = model.decode(canvas.to(device), cache)
        found.append(torch.stack((plain, model.decode(canvas.to(device), cache, plain))).cpu())
    difference = float((found[0] - found[1]).abs().max())
    print(f"{path.name}: CPU and CUDA differ by at most {difference:.2e}")
    assert difference < 1e-3


def test_bf16_on_cuda_generates() -> None:
    artifact = open_artifact(TINY_A / "reference.Q4_K_M.gguf")
    model = Model(artifact.config, artifact.weights, "cuda", keep_decoded=0)
    assert model.dtype == torch.bfloat16
    results = [generate(model, [[2, 300, 301], [2, 9]], artifact.generation, 40, seed=5, steps=4) for _ in range(2)]
    assert results[0].tokens == results[1].tokens
    assert all(0 <= token < artifact.config.vocab for row in results[0].tokens for token in row)
