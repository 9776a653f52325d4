"""The plans for the real 26B checkpoint, from headers alone, against the types llama-quantize gave it, and against the
figures of NVIDIA's publication and of bitsandbytes' packing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from micro import micro_config, write_micro
from sparse26b import REAL, write_sparse_26b

from dgq.convert.cli.__main__ import main
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe, recipes
from dgq.convert.source.checkpoint import Source, open_source
from dgq.quant.files.hf_writer import entry_bytes, shards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_sparse_26b(tmp_path_factory.mktemp("real") / "diffusiongemma-26B-A4B-it")
    sizes = {
        shard["file"]: shard["payload_bytes"] for shard in json.loads((REAL / "tensors.json").read_text())["shards"]
    }
    for file, payload in sizes.items():
        header = int.from_bytes((path / file).open("rb").read(8), "little")
        assert (path / file).stat().st_size == 8 + header + payload
    return path


# A child's ru_maxrss begins with what its parent had; this is its own. What Python and torch take, which is far more in
# torch's builds for CUDA, is left out.
MEASURED = """
import sys
from pathlib import Path
from dgq.convert.cli.__main__ import main
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe, recipes
from dgq.convert.source.checkpoint import Source, open_source
from dgq.quant.files.hf_writer import entry_bytes, shards
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
for recipe in sys.argv[2:]:
    to = recipe.split("-")[0] if recipe != "q4_k_m" else "gguf"
    words = ["plan", sys.argv[1], "--to", to, "--recipe", recipe, "--no-probe", "--json"]
    main(words, standalone_mode=False)
    print(peak() - before, file=sys.stderr)
"""
PLANNED = ("q4_k_m", "nvfp4", "nvfp4-w4a16", "bnb4", "bnb4-dq")


@pytest.fixture(scope="module")
def plans(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """`dgq plan --json` of each recipe in one process, with the most that it had taken by then."""
    command = [sys.executable, "-c", MEASURED, str(checkpoint), *PLANNED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for recipe, line, kib in zip(PLANNED, done.stdout.splitlines(), done.stderr.splitlines(), strict=True):
        print(f"plan of 26B, {recipe}: peak {int(kib) / 1024:.0f} MiB above Python and torch")
        found[recipe] = {"plan": json.loads(line), "peak_mib": int(kib) / 1024}
    return found


@pytest.fixture(scope="module")
def measured(plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return plans["q4_k_m"]


def test_all_692_types(measured: dict[str, Any]) -> None:
    golden = json.loads((REAL / "gguf.Q4_K_M.types.json").read_text())
    planned = {name: tensor["scheme"] for name, tensor in text_of(measured).items()}
    assert planned == golden and len(planned) == 692
    assert list(planned) == list(golden), "llama-quantize's order"
    assert Counter(planned.values()) == {"f32": 423, "q4_k": 194, "q5_0": 33, "q8_0": 28, "q6_k": 14}


def text_of(measured: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in measured["plan"]["tensors"].items() if not n.startswith(("v.", "mm."))}


def test_size_and_share(measured: dict[str, Any]) -> None:
    plan, text, vision = measured["plan"], text_of(measured), 572_792_112 + 2_304  # with std_bias and std_scale
    assert round(sum(tensor["bytes"] for tensor in text.values()) / 2**20) == 16013
    assert plan["params"] == 25_250_987_068 - 256 + vision, "the 692 tensors' elements, the generated rope_freqs aside"
    assert 0.999 < plan["quantized_share"] * plan["params"] / (plan["params"] - vision) < 1
    print(plan["bytes"], plan["by_part"]["vision"], plan["vision"])
    assert plan["by_part"]["vision"]["params"] == vision and plan["by_part"]["vision"]["tensors"] == 356
    wide = 2 * 10_240 * 1152 + 1152 * 768 + 2 * 1152 + 27 * (4 * 1152 + 2 * 72)  # in F32
    assert plan["by_part"]["vision"]["bytes"] == 4 * wide + 2 * (vision - wide)


def test_memory_stays_far_below_the_checkpoint(measured: dict[str, Any]) -> None:
    assert measured["peak_mib"] < 250


@pytest.mark.parametrize(("recipe", "tensors"), [("nvfp4", 46_080), ("nvfp4-w4a16", 34_560)])
def test_nvfp4(plans: dict[str, dict[str, Any]], recipe: str, tensors: int) -> None:
    """NVIDIA's published checkpoint: 18.82 GB, its experts in 46,080 tensors."""
    found = plans[recipe]
    planned = found["plan"]
    experts = {name: t for name, t in planned["tensors"].items() if ".experts." in name}
    assert len(experts) == 60 and {t["scheme"] for t in experts.values()} == {"nvfp4"}
    assert sum(t["stored"] for t in experts.values()) == tensors
    assert planned["stored_tensors"] == tensors + 1047 - 60, "everything else as it is, vision too"
    assert {t["scheme"] for name, t in planned["tensors"].items() if ".experts." not in name} == {"bf16"}
    elements = 22_837_985_280
    scalars = 11_520 * (8 if recipe == "nvfp4" else 4)
    assert planned["bytes"] == elements // 2 + elements // 16 + scalars + 2 * (25_823_781_228 - elements)
    assert 18.80e9 < planned["bytes"] < 18.84e9
    assert planned["quantized_share"] == pytest.approx(0.8844, abs=1e-4)
    assert found["peak_mib"] < 250


@pytest.mark.parametrize(("recipe", "gigabytes"), [("bnb4", 16.43), ("bnb4-dq", 15.28)])
def test_bnb4(plans: dict[str, dict[str, Any]], recipe: str, gigabytes: float) -> None:
    found = plans[recipe]
    planned = found["plan"]
    assert round(planned["bytes"] / 1e9, 2) == gigabytes
    assert round(100 * planned["quantized_share"], 2) == 94.88
    kept = {name for name, t in planned["tensors"].items() if t["scheme"] == "bf16" and len(t["shape"]) > 1}
    assert all("router" in name or "embed" in name or "vision" in name for name in kept)
    assert found["peak_mib"] < 250


# GB of tensors, from the headers alone, vision included
SIZES = {
    "nvfp4": 18.82, "nvfp4-w4a16": 18.82, "nvfp4-all": 15.73, "bnb4": 16.43, "bnb4-dq": 15.28, "q4_k_m": 17.99,
    "q6_k": 23.83, "q8_0": 28.06, "iq4_nl": 15.69,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return open_source(str(checkpoint), weights=False)


@pytest.mark.parametrize("recipe", SIZES)
def test_formats_says_what_each_recipe_takes(recipe: str, source: Source) -> None:
    policy = recipes()[recipe]
    planned = make_plan(source, policy)
    assert round(planned.nbytes / 1e9, 2) == SIZES[recipe]
    page = (Path(__file__).parents[2] / "recipes" / "guides" / "formats.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{recipe}` | {policy.format} |")]
    assert f"{SIZES[recipe]:.2f} GB" in row


def test_every_recipe_has_a_size() -> None:
    assert set(recipes()) == set(SIZES)


def test_nvfp4_all(source: Source) -> None:
    """At most 15 GiB with vision; what is not multiplied stays BF16."""
    planned = make_plan(source, recipes()["nvfp4-all"])
    assert planned.nbytes <= 15 << 30
    parts = {"attention": 1_110_179_840, "dense": 535_265_280, "soft": 17_842_176, "experts": 22_837_985_280}
    nvfp4, scales = sum(parts.values()), 11_520 + 115 + 90 + 3
    embedding, rest = 738_197_504, 25_823_778_864 + 2_364 - 22_837_985_280 - 1_110_179_840 - 535_265_280 - 17_842_176
    assert planned.nbytes == nvfp4 * 9 // 16 + 4 * scales + embedding * 34 // 32 + 2 * (rest - embedding)
    kinds = {t.name: t.scheme.name for t in planned.tensors}
    assert kinds["model.decoder.embed_tokens.weight"] == "q8_0"
    assert {t.part for t in planned.tensors if t.scheme.name == "nvfp4"} == {
        "routed experts", "attention", "dense MLP", "self-conditioning"
    }  # fmt: skip
    assert {kinds[name] for name in source.vision} == {"bf16"}


@pytest.mark.parametrize("recipe", ["q8_0", "q6_k"])
def test_types_of_llama_quantize(recipe: str, source: Source) -> None:
    """Its rules for these file types (llama_tensor_get_type): nothing but the base type, or what rows of 704 and 2112
    fall back to; vectors and routers as in Q4_K_M, whose types it gave itself."""
    golden = json.loads((REAL / "gguf.Q4_K_M.types.json").read_text())
    planned = [t for t in make_plan(source, recipes()[recipe]).tensors if not t.vision]
    assert [t.name for t in planned] == list(golden)
    for tensor in planned:
        fits = tensor.shape[-1] % 256 == 0
        expected = "f32" if golden[tensor.name] == "f32" else recipe if fits else "q8_0"
        assert tensor.scheme.name == expected, tensor.name
    counts = Counter(tensor.scheme.name for tensor in planned)
    assert counts == ({"f32": 423, "q8_0": 269} if recipe == "q8_0" else {"f32": 423, "q6_k": 208, "q8_0": 61})


def test_dgq_plan_without_a_format_lists_all(checkpoint: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(checkpoint)])
    assert result.exit_code == 0, result.output
    for recipe, gigabytes in SIZES.items():
        (row,) = [line for line in result.stdout.splitlines() if line.startswith(f"{recipe} ")]
        assert f"{gigabytes:.2f}" in row
    assert "dgq only" in next(line for line in result.stdout.splitlines() if line.startswith("nvfp4-all "))
    found = json.loads(CliRunner().invoke(main, ["plan", str(checkpoint), "--json"]).stdout)["recipes"]
    assert {name: round(each["bytes"] / 1e9, 2) for name, each in found.items()} == SIZES


def test_shards_of_five_gigabytes(checkpoint: Path) -> None:
    """No file above 5 GB, every weight's tensors in one file."""
    planned = make_plan(open_source(str(checkpoint)), find_recipe("nvfp4"))
    files = shards(tensor.entries for tensor in planned.tensors)
    sizes = [sum(map(entry_bytes, entries.values())) for entries in files]
    assert len(files) == 4 and max(sizes) <= 5e9 and sum(sizes) == planned.nbytes
    for tensor in planned.tensors:
        assert sum(not entries.keys().isdisjoint(tensor.entries) for entries in files) == 1


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    """tinyA's experts are 96 wide, its MLP 160: blocks of 64 do not divide that, and nothing falls back in silence."""
    result = CliRunner().invoke(main, ["plan", str(REAL.parent / "tinyA"), "--to", "bnb4"])
    assert result.exit_code == 2 and result.stdout == ""
    assert (
        "rows of 160 in model.decoder.layers.0.mlp.down_proj.weight are no multiple of nf4's block of 64"
        in result.stderr
    )
    config = micro_config()
    config["text_config"]["intermediate_size"] = 128
    result = CliRunner().invoke(main, ["plan", str(write_micro(tmp_path / "micro", config)), "--to", "bnb4"])
    assert result.exit_code == 2 and result.stdout == ""
    assert (
        "rows of 96 in model.decoder.layers.0.experts.down_proj are no multiple of nf4's block of 64" in result.stderr
    )
