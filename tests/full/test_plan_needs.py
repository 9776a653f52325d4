"""What `dgq plan` says a user will need, against what a run allocates, what an H200 measured, and hand arithmetic."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_standin import COMMIT, dgq_forked, serve
from micro import micro_config, write_micro
from sparse26b import REAL, write_sparse, write_sparse_26b

from dgq.convert.bench.shapes import plan_of_shapes
from dgq.convert.cli.__main__ import main
from dgq.convert.estimate import probe
from dgq.convert.estimate.needs import CARDS, Runtime, kv_bytes
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.loading import for_kernels
from dgq.runtime.model.memory import widest, working_bytes
from dgq.runtime.model.slots import Slots
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import expected_tensors

FORMATS = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4", "q4_k_m": "gguf"}
GIB = 1 << 30


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
        main,
        [
            "convert",
            str(path),
            "--to",
            FORMATS[recipe],
            "--recipe",
            recipe,
            "-o",
            str(out),
            *options,
        ],
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_26b(tmp_path_factory.mktemp("needs") / "real")


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/benchmarks/bench_convert.py's checkpoint, headers only."""
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


# One H100 80GB: what bench_shapes found on weights of the real shapes, bytes: scheme, tokens, rows, most allocated
MEASURED = [
    ("nvfp4", 2560, 1, 18_383_332_352),
    ("nvfp4", 2560, 4, 20_147_473_920),
    ("nf4", 2560, 1, 17_706_492_928),
    ("q4_k_m", 2560, 1, 21_791_090_176),
    ("bf16", 2560, 1, 51_160_800_256),
]


@pytest.mark.parametrize(("scheme", "tokens", "rows", "allocated"), MEASURED)
def test_peaks_measured_on_an_h100(scheme: str, tokens: int, rows: int, allocated: int) -> None:
    found = Runtime.of(plan_of_shapes("26b", scheme)).vram(tokens, rows)["decoded"]
    print(f"{scheme}: {found / GIB:.2f} GiB, measured {allocated / GIB:.2f}, {found / allocated - 1:+.1%}")
    assert found == pytest.approx(allocated, rel=0.05)


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("decode", [False, True])
def test_weights_are_those_the_engine_holds(tmp_path: Path, recipe: str, decode: bool) -> None:
    config = micro_config()
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 64, "head_dim": 64,
        "num_attention_heads": 4, "vocab_size": 2048,
    }  # fmt: skip
    source = write_micro(tmp_path / "micro", config, shards=0)
    artifact, plan = open_artifact(converted(source, recipe)), plan_of(source, recipe)
    names = sorted(expected_tensors(artifact.config), key=lambda name: ".experts." in name)
    read = ((name, artifact.weights[name]) for name in names)
    held = for_kernels(names, read, "micro", decode).nbytes
    # weights of a few tiles: their factors and NF4's tables count, which do not in the 26B
    assert Runtime.of(plan).weights(decode) == pytest.approx(held, rel=0.04)


def test_a_session_takes_what_is_counted() -> None:
    """Of what lies still: keys and values, and the sampler's arrays."""
    config = ModelConfig.from_json(micro_config(), "config.json")
    for tokens, rows in ((20, 1), (100, 3), (1000, 2)):
        slots = Slots(config, rows, tokens, "cpu", torch.bfloat16)
        assert slots.nbytes == sum(kv_bytes(config, tokens, rows))


def test_experts_in_host_memory(real: Path) -> None:
    """12 GiB: half of the experts go, and come at the speed of the link; what was measured copied 8.6 GB."""
    found = plan_json(real, "nvfp4-w4a16", "--no-probe")["offloaded"]
    assert list(found) == ["12", "16"]
    away = found["12"]
    assert away["layers"] == 18 and away["copied"] == away["host"] == 18 * 428_212_224
    assert away["ms"]["PCIe 5 x16"] == pytest.approx(1e3 * away["copied"] / 55e9)
    left = 12 * GIB - (640 << 20) - working_bytes(ModelConfig.from_file(REAL / "config.json"), 8192)
    assert away["on_gpu"] <= left < away["on_gpu"] + 2 * 428_212_224, "spread evenly, not filled to the last layer"
    assert found["16"]["layers"] == 8


def test_the_least_and_the_most_of_vram() -> None:
    """Two layers' experts have places on the GPU at least. Where no more than two are away they stay in those: nothing
    is copied."""
    runtime = Runtime.of(plan_of_shapes("26b", "nvfp4"))
    layer, others = 428_212_224, runtime.weights(False) - 30 * 428_212_224
    least = others + (640 << 20) + working_bytes(runtime.config, 8192) + 2 * layer
    assert runtime.offloaded(least - 1) is None
    found, most = runtime.offloaded(least), runtime.offloaded(least + 28 * layer)
    assert found is not None and found["layers"] == 30 and found["copied"] == 30 * layer
    assert most is not None and (most["layers"], most["copied"], most["host"]) == (2, 0, 2 * layer)
    assert most["on_gpu"] == others + 30 * layer


def test_keys_and_values_of_the_26b() -> None:
    """25 sliding layers of 8 heads of 256, with a window of 1024 less the token itself and a canvas of 256, in pages of
    64; 5 full ones of 2 heads of 512. Keys and values, 2 bytes each."""
    config = ModelConfig.from_file(REAL / "config.json")
    assert kv_bytes(config, 4096) == (25 * 8 * 256 * 4 * 1280, 5 * 2 * 512 * 4 * 4096)
    assert kv_bytes(config, 262144, 2) == (2 * 262_144_000, 2 * 5_368_709_120)
    assert [widest(config, 100), widest(config, 9000), widest(config, 9000, 16)] == [256, 2048, 16 * 256]
    assert kv_bytes(config, 100) == (25 * 8 * 256 * 4 * 128, 5 * 2 * 512 * 4 * 128), "no more than there are"


def test_the_26b_by_hand(real: Path) -> None:
    """4K in NVFP4: text weights, cache; logits, their exponentials, and logits again."""
    found = plan_json(real, "nvfp4", "--no-probe")["vram_by_context"]
    assert list(found) == ["4096", "32768", "131072", "262144"]
    parts = found["4096"]["parts"]
    experts, text = 22_837_985_280, 25_250_986_812
    assert parts == {
        "weights": experts // 2 + experts // 16 + 2 * (text - experts),
        "kv_sliding": 262_144_000,
        "kv_full": 83_886_080,
        "canvas": 2 * 256 * (3 * 262144 + 2 * 2816),
        "activations": (96 << 20) + 2 * 2048 * (6 * 2816 + 8 * (2816 + 704)),
    }
    assert found["4096"]["total"] == sum(parts.values()) == found["4096"]["decoded"]
    assert found["262144"]["total"] - found["4096"]["total"] == 5 * 2 * 512 * 4 * (262144 - 4096)


@pytest.mark.parametrize("recipe", FORMATS)
def test_what_fits_a_card(real: Path, recipe: str) -> None:
    rows = list(plan_json(real, recipe, "--no-probe")["vram_by_context"].values())
    for row in rows:
        given = {card: row["decoded" if card >= 24 else "total"] for card in CARDS}
        assert row["fits"] == [card for card in CARDS if given[card] <= card * GIB - 640 * 2**20]
        assert tuple(row["fits"]) == CARDS[len(CARDS) - len(row["fits"]) :], "whatever holds it, a larger card does too"
    for short, long in pairwise(rows):
        assert short["total"] < long["total"] and set(long["fits"]) <= set(short["fits"])
    assert rows[0]["fits"][0] == (16 if recipe.startswith("bnb4") else 24)


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
    for key in ("bytes", "params", "by_part", "by_scheme", "vram_by_context", "tensors", "notices", "vision"):
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
        "at its peak 17.42 17.97 19.85 22.35",
        "--vram 12GiB: experts of 18 layers, 7.71 GB, in host memory: 308 ms a step over PCIe 4 x16",
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
    from dgq.convert.cli.terminal.console import duration

    assert duration(seconds) == said


def test_a_hub_id_is_downloaded_first_and_only_once(tmp_path: Path) -> None:
    folder = write_micro(tmp_path / "micro")
    home = tmp_path / "home"
    home.mkdir()

    def dgq(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = dgq_forked(url, home, *arguments, "--to", "gguf", "--revision", COMMIT)
        assert done.returncode == 0, done.stderr
        return done

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
