"""What LoRA adapters beside the weights cost a denoising step, at the shapes of the 26B with random weights, on a GPU.

    python tests/benchmarks/bench_adapter.py [--schemes nvfp4 bf16] [--rank 16] [--rows 1 4] [--context 1024]
        [--steps 16] [--experts]

The adapters are random, of one rank, over all linear layers of attention and dense MLP, for encoder and decoder apart;
--experts: over every expert as well. For each scheme and number of rows, milliseconds a step, medians:

    without     a model that was loaded without adapters
    idle        one is loaded and no row has chosen it
    one         one is loaded and every row has chosen it
    several     --several are loaded and the rows have chosen different ones

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from dgq.convert.bench import measure
from dgq.convert.bench.measure import BenchLoad
from dgq.convert.bench.shapes import SCHEMES, RandomWeights, plan_of_shapes
from dgq.runtime.adapters.adapter import Adapter, open_adapter
from dgq.runtime.engine.engine import Request
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import DECODER, ENCODER, expected_tensors

PARTS = (".self_attn.", ".mlp.")


def write_adapter(path: Path, config: ModelConfig, rank: int, seed: int, experts: bool = False) -> Path:
    """A random adapter of both sides, as peft saves it, in BF16; of the experts' weights as target_parameters."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.01).bfloat16()

    for name, shape in expected_tensors(config).items():
        linear = name.endswith("_proj.weight") and any(part in name for part in PARTS)
        if not linear and not (experts and len(shape) == 3):
            continue
        count = shape[0] if len(shape) == 3 else 1
        module = name.removesuffix(".weight") if linear else name.rpartition(".")[0]
        module += ".base_layer" if name.endswith("experts.gate_up_proj") else ""  # peft nests the two
        for side in (DECODER, ENCODER):
            where = f"base_model.model.{module.replace(DECODER, side)}"
            tensors[where + ".lora_A.weight"] = random(count * rank, shape[-1])
            tensors[where + ".lora_B.weight"] = random(shape[-2], count * rank)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    return path


def milliseconds(model: Model, generation: Any, load: BenchLoad, chosen: list[str] | None) -> float:
    """A step's median, each row with its adapter. The session is given up, so that nothing captured stays."""
    with mock.patch.object(measure, "Request", partial(Request, adapter=chosen)):
        pace = statistics.median(measure._timed(model, generation, load).paces["step"])
    model.drop_session()
    gc.collect()
    torch.cuda.empty_cache()
    return pace


def loaded(scheme: str, adapters: tuple[Adapter, ...]) -> tuple[Model, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    plan = plan_of_shapes("26b", scheme)
    weights = RandomWeights(plan, "cuda")
    options = LoadOptions(adapters=adapters)
    return Model(plan.source.config, weights, "cuda", source="random 26b", options=options), plan.source.generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=tuple(SCHEMES), default=["nvfp4", "bf16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--several", type=int, default=4)
    parser.add_argument("--experts", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_adapter measures a GPU, and no CUDA device is visible to torch")
    loads = [BenchLoad(given.context, rows, given.steps) for rows in given.rows]
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(given)}
    with tempfile.TemporaryDirectory() as folder:
        config = plan_of_shapes("26b", "bf16").source.config
        paths = [
            write_adapter(Path(folder) / f"a{seed}", config, given.rank, seed, given.experts)
            for seed in range(given.several)
        ]
        several = tuple(open_adapter(path, expected_tensors(config)) for path in paths)
        for scheme in given.schemes:
            figures: dict[str, dict[str, float]] = {str(load.rows): {} for load in loads}
            for name, adapters in (("without", ()), ("idle", several[:1]), ("one", several[:1]), ("several", several)):
                model, generation = loaded(scheme, adapters)
                for load in loads:
                    chosen = [adapters[row % len(adapters)].name for row in range(load.rows)] if adapters else None
                    chosen = [""] * load.rows if name == "idle" else chosen
                    figures[str(load.rows)][name] = round(milliseconds(model, generation, load, chosen), 3)
                    print(scheme, load.rows, name, figures[str(load.rows)][name], file=sys.stderr, flush=True)
                del model
            result[scheme] = figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
