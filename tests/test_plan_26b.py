"""The plan for the real 26B checkpoint, from headers alone, against the types llama-quantize gave it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from sparse26b import REAL, write_sparse_26b


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`dgq plan --json` in a process of its own, with what it cost."""
    path = write_sparse_26b(tmp_path_factory.mktemp("real") / "diffusiongemma-26B-A4B-it")
    sizes = {
        shard["file"]: shard["payload_bytes"] for shard in json.loads((REAL / "tensors.json").read_text())["shards"]
    }
    for file, payload in sizes.items():
        header = int.from_bytes((path / file).open("rb").read(8), "little")
        assert (path / file).stat().st_size == 8 + header + payload
    command = [sys.executable, "-m", "dgq.convert.cli", "plan", str(path), "--to", "gguf", "--json"]
    output = path.parent / "plan.json"
    with output.open("w") as stdout:
        process = subprocess.Popen(command, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(f"plan of 26B: peak {usage.ru_maxrss / 1024:.0f} MiB, {usage.ru_utime + usage.ru_stime:.1f} s of CPU")
    return {"plan": json.loads(output.read_text()), "peak_mib": usage.ru_maxrss / 1024}


def test_all_692_types(measured: dict[str, Any]) -> None:
    golden = json.loads((REAL / "gguf.Q4_K_M.types.json").read_text())
    planned = {name: tensor["scheme"] for name, tensor in measured["plan"]["tensors"].items()}
    assert planned == golden and len(planned) == 692
    assert list(planned) == list(golden), "llama-quantize's order"
    assert Counter(planned.values()) == {"f32": 423, "q4_k": 194, "q5_0": 33, "q8_0": 28, "q6_k": 14}


def test_size_and_share(measured: dict[str, Any]) -> None:
    plan = measured["plan"]
    assert round(plan["mib"]) == 16013
    assert plan["quantized_share"] > 0.999
    assert plan["dropped"] == {"vision": 572_792_112 + 2_304}, "its parameters and the buffers std_bias, std_scale"
    assert plan["params"] == 25_250_987_068 - 256, "the 692 tensors' elements, the generated rope_freqs aside"


def test_memory_stays_far_below_the_checkpoint(measured: dict[str, Any]) -> None:
    assert measured["peak_mib"] < 500
