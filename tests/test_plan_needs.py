"""What `dgq plan` says a user will need, against what a run allocates, what an H200 measured, and hand arithmetic."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_standin import COMMIT, serve
from micro import micro_config, write_micro
from sparse26b import REAL, write_sparse, write_sparse_26b
from torch.profiler import ProfilerActivity, profile

from dgq.convert import needs, probe
from dgq.convert.cli import main
from dgq.convert.needs import CARDS, DECODING, Runtime, kv_bytes
from dgq.convert.plan import Plan, make_plan
from dgq.convert.recipes import find_recipe
from dgq.convert.source import open_source
from dgq.quant.schemes import SCHEMES
from dgq.runtime.artifact import open_artifact
from dgq.runtime.config import ModelConfig
from dgq.runtime.engine import generate
from dgq.runtime.model import Model
from dgq.runtime.names import expected_tensors

FORMATS = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4", "q4_k_m": "gguf"}
GIB = 1 << 30


def peak(action: Callable[[], object]) -> int:
    """Most bytes that torch's allocator had given out on the CPU at once, while the action ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.inference_mode():
        action()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def plan_of(path: Path, recipe: str) -> Plan:
    return make_plan(open_source(str(path), weights=False), find_recipe(FORMATS[recipe], recipe))


def plan_json(path: Path | str, recipe: str, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        main, ["plan", str(path), "--to", FORMATS[recipe], "--recipe", recipe, "--json", *options]
    )
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def converted(path: Path, recipe: str) -> Path:
    out = path.parent / f"{path.name}-{recipe}"
    options = ["--input-scale", "1.0"] if recipe == "nvfp4" else []
    result = CliRunner().invoke(
        main, ["convert", str(path), "--to", FORMATS[recipe], "--recipe", recipe, "-o", str(out), *options]
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_26b(tmp_path_factory.mktemp("needs") / "real")


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/bench_convert.py's checkpoint, headers only."""
    path = tmp_path_factory.mktemp("needs") / "four"
    config = json.loads((REAL / "config.json").read_text())
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config["text_config"] |= {"num_hidden_layers": 4, "layer_types": kinds}
    del config["vision_config"]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(REAL / "generation_config.json", path / "generation_config.json")
    shapes = expected_tensors(ModelConfig.from_json(config, "config.json"))
    write_sparse(path / "model.safetensors", {name: ("BF16", list(shape)) for name, shape in shapes.items()})
    return path


@pytest.mark.parametrize(("recipe", "gib"), [("nvfp4", 5.12), ("bnb4", 4.78), ("bnb4-dq", 4.64), ("q4_k_m", 4.27)])
def test_peaks_measured_on_an_h200(four_layers: Path, recipe: str, gib: float) -> None:
    """tests/bench_convert.py, 1 row in bf16, a prompt of some 200 tokens and one canvas."""
    found = Runtime.of(plan_of(four_layers, recipe)).vram(200 + 256)
    print(f"{recipe}: {found['total'] / GIB:.2f} GiB, measured {gib}")
    assert found["total"] / GIB == pytest.approx(gib, rel=0.02)


SHAPES: dict[str, tuple[dict[str, int], int, int, int]] = {
    # changes to the micro model, canvas, prompt, elements decoded at once
    "canvas x vocabulary": ({"vocab_size": 32768}, 128, 20, 1 << 26),
    "context, by its masks": (
        {"max_position_embeddings": 16384, "num_attention_heads": 4, "sliding_window": 128}, 16, 6000, 1 << 26,
    ),
    "context, by its cache": (
        {
            "max_position_embeddings": 16384, "num_attention_heads": 4, "num_global_key_value_heads": 4,
            "global_head_dim": 256, "sliding_window": 128,
        },
        16, 6000, 1 << 26,
    ),
    "sliding layers": (
        {"num_key_value_heads": 2, "head_dim": 512, "sliding_window": 3000, "max_position_embeddings": 16384}, 16,
        3000, 1 << 26,
    ),
    "experts": ({"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16}, 16, 20, 1 << 26),
    "experts beside logits": (
        {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "vocab_size": 32768}, 64, 20, 1 << 26,
    ),
    "experts in groups": ({"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16}, 16, 20, 1 << 20),
    "activations": (
        {"hidden_size": 256, "moe_intermediate_size": 64, "num_experts": 16, "top_k_experts": 8}, 64, 512, 1 << 26,
    ),
    "vocabulary in chunks": ({"vocab_size": 65536, "hidden_size": 256}, 16, 20, 1 << 21),
}  # fmt: skip
PEAKS = {"canvas x vocabulary": "sampling"} | dict.fromkeys(  # the others: prompt
    ("experts", "experts beside logits", "experts in groups"), "step"
)

# torch's CPU kernels cast the codes that they multiply: bytes an element more than on a GPU
CPU_CASTS = {"q4_k": 2.0, "q5_0": 2.0, "q6_k": 2.0, "q8_0": 2.0}


@pytest.mark.parametrize("recipe", ["nvfp4", "q4_k_m"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_allocates_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, recipe: str
) -> None:
    changes, canvas, prompt, budget = SHAPES[shape]
    config = micro_config()
    config["text_config"] |= changes
    config["canvas_length"] = canvas
    source = write_micro(tmp_path / "micro", config, shards=0)
    monkeypatch.setattr(needs, "KEEP_DECODED", 0)
    monkeypatch.setattr(needs, "WORKSPACE", 0)
    monkeypatch.setattr("dgq.runtime.layers.DECODE_BUDGET", budget)
    for name, more in CPU_CASTS.items():
        monkeypatch.setitem(DECODING, name, DECODING[name] + more)
    found = Runtime.of(plan_of(source, recipe)).vram(prompt + canvas)
    predicted = found["total"] - found["parts"]["weights"]

    artifact = open_artifact(converted(source, recipe))
    model = Model(artifact.config, artifact.weights, "cpu", torch.bfloat16, keep_decoded=0)
    endless = replace(artifact.generation, sampler=replace(artifact.generation.sampler, confidence=0.0))
    allocated = peak(lambda: generate(model, [[5] * prompt], endless, canvas, seed=1, steps=3))
    print(f"{shape}, {recipe}: {predicted:,} predicted, {allocated:,} allocated, {predicted / allocated - 1:+.1%}")
    vocabulary = "step" if recipe == "q4_k_m" else "sampling"  # in NVFP4 the table is BF16, and not decoded
    expected = (PEAKS | {"vocabulary in chunks": vocabulary}).get(shape, "prompt")
    assert predicted == pytest.approx(allocated, rel=0.1 if expected == "prompt" else 0.02)
    assert found["moments"][expected] >= 0.98 * max(found["moments"].values()), "the shape is there for this moment"


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_while_a_weight_is_decoded(name: str) -> None:
    scheme = SCHEMES[name]
    parts = scheme.quantize(torch.randn(512, 2048))
    found = peak(lambda: scheme.dequantize(parts, torch.bfloat16)) / (512 * 2048)
    assert found == pytest.approx(DECODING[name] + CPU_CASTS.get(name, 0.0), abs=0.15)


@pytest.mark.parametrize("recipe", FORMATS)
def test_weights_are_those_the_runtime_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    config = micro_config()
    config["text_config"] |= {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 64}
    source = write_micro(tmp_path / "micro", config, shards=0)
    artifact, plan = open_artifact(converted(source, recipe)), plan_of(source, recipe)
    small = Model(artifact.config, artifact.weights, "cpu", torch.bfloat16)
    assert Runtime.of(plan).weights() == sum(weight.nbytes for weight in small.weights.values())
    assert not any(Runtime.of(plan).decoding.values())

    monkeypatch.setattr(needs, "KEEP_DECODED", 0)
    packed = Model(artifact.config, artifact.weights, "cpu", torch.bfloat16, keep_decoded=0)
    # on a GPU nothing stays expanded
    held = sum(part.numel() * part.itemsize for weight in packed.weights.values() for part in weight.parts.values())
    assert Runtime.of(plan).weights() == pytest.approx(held, rel=1e-3)


def test_keys_and_values_of_the_26b() -> None:
    """25 sliding layers of 8 heads of 256, with a window of 1024 less the token itself and a canvas of 256; 5 full ones
    of 2 heads of 512. Keys and values, 2 bytes each."""
    config = ModelConfig.from_file(REAL / "config.json")
    assert kv_bytes(config, 4096, 256) == (25 * 8 * 256 * 4 * (1023 + 256), 5 * 2 * 512 * 4 * 4096)
    assert kv_bytes(config, 262144, 256) == (261_939_200, 5_368_709_120)
    assert kv_bytes(config, 100, 256) == (25 * 8 * 256 * 4 * 100, 5 * 2 * 512 * 4 * 100), "no more than there are"


def test_the_26b_by_hand(real: Path) -> None:
    """4K in NVFP4: text weights, cache, and at the sampler six float32 and one 16-bit array of 256 x 262,144."""
    found = plan_json(real, "nvfp4", "--no-probe")["vram_by_context"]
    assert list(found) == ["4096", "32768", "131072", "262144"]
    parts = found["4096"]["parts"]
    experts, text = 22_837_985_280, 25_250_986_812
    rows = 30 * 128 * (2 * 704 + 2816)
    scales = 4 * 30 * 2 * 128 + 4 * rows
    assert parts == {
        "weights": experts // 2 + experts // 16 + scales + 2 * (text - experts),
        "kv_sliding": 261_939_200,
        "kv_full": 83_886_080,
        "prompt_cache": 0,
        "activations": 32 << 20,
        "canvas": (6 * 4 + 2) * 256 * 262144,
        "decoded": 0,
    }
    assert found["4096"]["peak"] == "sampling" and found["4096"]["total"] == sum(parts.values())
    long = found["262144"]["parts"]
    prompt = 262144 - 256
    assert long["prompt_cache"] == 25 * 8 * 256 * 4 * (1023 + 512) + 5 * 2 * 512 * 4 * prompt
    masks = 512 * (prompt + 1023 + 512)
    repeated = 8 * 512 * prompt * 3  # of 16 heads on 2: bool, and bf16
    assert long["activations"] == (32 << 20) + masks + repeated + 3 * 2 * 512 * 16 * 512
    assert found["262144"]["peak"] == "prompt" and long["canvas"] == 0


@pytest.mark.parametrize("recipe", FORMATS)
def test_what_fits_a_card(real: Path, recipe: str) -> None:
    rows = list(plan_json(real, recipe, "--no-probe")["vram_by_context"].values())
    for row in rows:
        assert row["fits"] == [card for card in CARDS if row["total"] <= card * GIB - 640 * 2**20]
        assert tuple(row["fits"]) == CARDS[len(CARDS) - len(row["fits"]) :], "whatever holds it, a larger card does too"
    for short, long in pairwise(rows):
        assert short["total"] < long["total"] and set(long["fits"]) <= set(short["fits"])
    assert rows[0]["fits"][0] == (16 if recipe == "bnb4-dq" else 24)


def test_ram_and_disk(real: Path, four_layers: Path) -> None:
    four, eight = (plan_json(real, "nvfp4", "--no-probe", "--threads", n) for n in ("4", "8"))
    assert (four["ram"]["threads"], eight["ram"]["threads"]) == (4, 8)
    grown = eight["ram"]["convert"] - four["ram"]["convert"]
    assert grown == 4 * 8 * 1408 * 2816, "an expert's larger weight a thread"
    assert four["ram"]["calibrate_mapped"] == 2 * 25_250_986_812, "the text part in BF16"
    assert four["ram"]["calibrate"] > 4 * 2 * 256 * 262144 * 2
    assert not {name for name in plan_json(real, "bnb4", "--no-probe")["ram"] if "calibrate" in name}
    sizes = {"artifact": four["bytes"] + 2**26, "download": 0, "total": four["bytes"] + 2**26}
    assert four["disk"] == sizes, "a local source is there already"
    ggml = [plan_json(four_layers, "q4_k_m", "--no-probe", "--threads", n)["ram"]["convert"] for n in ("1", "2")]
    assert ggml[1] - ggml[0] == 24 * 1408 * 2816


def test_the_json_is_the_same_each_time_and_the_estimate_apart(tmp_path: Path) -> None:
    source = write_micro(tmp_path / "micro", shards=0)
    plain = [plan_json(source, "nvfp4", "--no-probe") for _ in range(2)]
    assert plain[0] == plain[1] and "estimate" not in plain[0]
    context = open_source(str(source)).config.context
    assert context < 4096 and list(plain[0]["vram_by_context"]) == [str(context)], "no more than the model has"
    probed = plan_json(source, "nvfp4")
    estimate = probed.pop("estimate")
    assert probed == plain[0]
    assert set(estimate) == {"device", "threads"} | {
        f"{kind}_s" for kind in ("encode", "read", "write", "hash", "calibrate", "total")
    }
    for key in ("bytes", "params", "by_part", "by_scheme", "vram_by_context", "tensors", "notices", "dropped"):
        assert key in probed


def test_no_probe_tries_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_micro(tmp_path / "micro", shards=0)
    monkeypatch.setattr(probe, "_seconds", lambda action: pytest.fail("probed"))
    plan_json(source, "q4_k_m", "--no-probe")
    with pytest.raises(pytest.fail.Exception, match="probed"):
        probe.probe(plan_of(source, "q4_k_m"), 1)


def test_the_estimate_is_scaled_up(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of 1 ns for an element and 0.1, 0.2, 0.4 ns for a byte hashed, read, written."""
    rates = {"_encode": 1e-9, "_read": 2e-10, "_write": 4e-10, "_hash": 1e-10, "_calibrate": 1000.0}
    for name, rate in rates.items():
        monkeypatch.setattr(probe, name, lambda *_, rate=rate: rate)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    found = probe.probe(plan_of(real, "nvfp4"), 4)
    elements, written = 25_823_781_228, 18_818_050_776
    assert found["threads"] == 4 and probe.probe(plan_of(real, "nvfp4"), 100)["threads"] == 8
    assert found["encode_s"] == pytest.approx(elements * 1e-9 / 4, rel=1e-3)
    assert found["read_s"] == pytest.approx(2 * elements * 2e-10, rel=1e-3)
    assert found["write_s"] == pytest.approx(written * 4e-10, rel=1e-3)
    assert found["hash_s"] == pytest.approx((2 * elements + written) * 1e-10 / 4, rel=1e-3)
    busy = max(found["encode_s"] + found["hash_s"], found["read_s"], found["write_s"])
    assert found["total_s"] == pytest.approx(1000 / 2 + busy, abs=0.02)
    monkeypatch.setattr(probe, "_write", lambda: None)
    gguf = probe.probe(plan_of(real, "q4_k_m"), 4)
    assert gguf["hash_s"] == pytest.approx(2 * elements * 1e-10 / 4 + 16.79e9 * 1e-10, rel=1e-3), "one file, one thread"
    assert gguf["calibrate_s"] is None and gguf["write_s"] is None
    assert gguf["total_s"] == gguf["read_s"] == found["read_s"], "here the slowest, and no calibration"


def test_a_probe_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_micro(tmp_path / "micro", shards=0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found = probe.probe(plan_of(source, "q4_k_m"), 1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert all(found[f"{kind}_s"] is not None for kind in ("encode", "read", "write", "hash"))
    assert not list(Path.cwd().iterdir())


def test_the_page(real: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(real), "--to", "nvfp4", "--no-probe", "--threads", "16"])
    page = result.stdout
    assert result.exit_code == 0, result.output
    for words in (
        "VRAM to run it, GiB, by context 4K 32K 128K 256K",
        "keys and values, 25 sliding layers 0.24 0.24 0.24 0.24",
        "keys and values, 5 full layers 0.08 0.62 2.50 5.00",
        "which comes sampling prompt prompt prompt",
        "fits, of 12, 16, 24, 32, 48, 80 GB 24 GB up",
        "disk 18.89 GB for the artifact",
        "GB to convert with 16 threads",
        "passes over the checkpoint: fast if its 50.5 GB stay in memory",
    ):
        assert words in " ".join(page.split()), page
    assert "time" not in page and len(page.splitlines()) <= 45
    small = write_micro(tmp_path / "micro", shards=0)
    page = CliRunner().invoke(main, ["plan", str(small), "--to", "nvfp4"]).stdout
    assert "at least on the CPU" in page and "an estimate, from a short probe of this machine" in " ".join(page.split())


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (119, "119 s"), (120, "2.0 min"), (3600, "60 min"), (9000, "2.5 h"), (90000, "25 h")])  # fmt: skip # noqa: E501
def test_durations(seconds: float, said: str) -> None:
    from dgq.convert.show import _duration

    assert _duration(seconds) == said


def test_a_hub_id_is_downloaded_first_and_only_once(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment.pop("HF_HUB_OFFLINE", None)
    (tmp_path / "home").mkdir()

    def dgq(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dgq.convert.cli", *arguments, "--to", "gguf", "--revision", COMMIT]
        there = environment | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=there, capture_output=True, text=True, check=True, cwd=tmp_path / "home")

    with serve("someone/micro", folder) as hub:
        before = json.loads(dgq(hub.url, "plan", "someone/micro", "--json").stdout)
        page = dgq(hub.url, "plan", "someone/micro").stdout
        dgq(hub.url, "convert", "someone/micro", "-o", "out")
        after = json.loads(dgq(hub.url, "plan", "someone/micro", "--json").stdout)
    shapes = expected_tensors(ModelConfig.from_file(folder / "config.json"))
    payload = 2 * sum(map(math.prod, shapes.values()))
    assert before["disk"]["download"] == payload and before["disk"]["total"] == before["disk"]["artifact"] + payload
    assert "MB to download" in page and "without the download" in page
    assert before["estimate"]["read_s"] is None and before["estimate"]["hash_s"] is not None
    assert after["disk"]["download"] == 0 and after["estimate"]["read_s"] is not None
    assert after["vram_by_context"] == before["vram_by_context"] and after["tensors"] == before["tensors"]
