"""What `dgq bench` is made of, as far as that needs no GPU: shapes, random weights, routing, arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from micro import micro_config, write_micro

from dgq.convert.bench.shapes import SCHEMES, RandomWeights, plan_of_shapes, zipf_spread
from dgq.convert.cli.__main__ import main
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.quant.schemes.registry import SCHEMES as ALL
from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import expected_tensors

REAL = Path(__file__).parent.parent / "golden" / "real26b"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_are_the_real_ones(scheme: str) -> None:
    plan = plan_of_shapes("26b", scheme)
    tensors = json.loads((REAL / "tensors.json").read_text())["tensors"]
    for tensor in plan.weights:
        assert list(tensor.shape) == tensors[str(tensor.source)]["shape"]
    assert len(plan.weights) == len(expected_tensors(plan.source.config))
    if scheme == "q4_k_m":
        types = json.loads((REAL / "gguf.Q4_K_M.types.json").read_text())
        types = types.get("tensors", types)
        assert {t.name: t.scheme.name for t in plan.tensors} == dict(types)


@pytest.mark.parametrize("recipe", ["nvfp4-w4a16", "bnb4"])
def test_random_weights_run(recipe: str, tmp_path: Path) -> None:
    config = micro_config()
    config["text_config"] |= {"intermediate_size": 128, "moe_intermediate_size": 64}
    source = open_source(str(write_micro(tmp_path / "micro", config, shards=0)), weights=False)
    plan = make_plan(source, find_recipe("nvfp4" if recipe[0] == "n" else "bnb4", recipe))
    weights = RandomWeights(plan, "cpu")
    for tensor in plan.weights:
        made = weights[str(tensor.source)]
        assert made.shape == tensor.shape and made.scheme is ALL[tensor.scheme.name]
        assert made.dequantize().isfinite().all()
    model = Model(source.config, weights, "cpu", torch.float32)
    logits = model.decode(torch.zeros(1, source.config.canvas, dtype=torch.int64), model.new_cache(1))
    assert logits.isfinite().all() and logits.std() > 0


def test_routing_is_as_uneven_as_words() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, 128, generator=generator) * zipf_spread(128, 8)
    counts = scores.topk(8).indices.flatten().bincount(minlength=128) / 20_000
    assert counts[0] > 0.4 and counts[:4].sum() > 5 * counts[32:36].sum() and counts[120:].mean() < 0.03
    assert bool((counts[4:].unfold(0, 8, 8).mean(1).diff() < 0).all()), "falls with the expert's number"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name an artifact, or --shapes 26b"),
        (["--shapes", "26b", "--schemes", "int3"], "unknown 'int3'"),
        (["--shapes", "26b", "--schemes", "nf4:even"], "unknown 'nf4:even'"),
    ],
)
def test_bad_requests(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
def test_no_gpu() -> None:
    result = CliRunner().invoke(main, ["bench", "--shapes", "26b", "--schemes", "nf4"])
    assert result.exit_code == 2 and "no CUDA device is visible" in result.stderr
    result = CliRunner().invoke(main, ["run", "tiny", "a", "--vram", "12GiB"])
    assert result.exit_code == 2 and "--vram: is for bfloat16 on a GPU" in result.stderr
