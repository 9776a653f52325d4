"""Loaders' contracts (contract_vllm.py, contract_llamacpp.py) held by files that other people made, by ours and by the
plan of the real 26B, and broken by each damage that the loader would stumble over or swallow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract_llamacpp as llamacpp
import contract_vllm as vllm
import gguf
import pytest
import torch
from click.testing import CliRunner
from contract_vllm import configs, headers, towers
from micro import micro_config, write_micro
from sparse26b import REAL, write_sparse_26b

from dgq.convert.cli.__main__ import main
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import open_source
from dgq.convert.write.artifact_files import artifact_files

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
RECIPES = {"nvfp4": "NVFP4", "nvfp4-w4a16": "W4A16_NVFP4"}


def convert(source: Path, out: Path, to: str, *options: str) -> Path:
    result = CliRunner().invoke(main, ["convert", str(source), "--to", to, "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def planned(source: Path, to: str, recipe: str | None = None) -> Plan:
    return make_plan(open_source(str(source), weights=False), find_recipe(to, recipe))


@pytest.fixture(scope="module", params=RECIPES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    source = write_micro(folder / "source")
    return convert(source, folder / request.param, "nvfp4", "--recipe", request.param)


def test_vllm_loads_what_we_write(directory: Path) -> None:
    assert vllm.weight_problems(directory) == []
    assert configs(directory)[0]["quantization_config"]["quant_algo"] == RECIPES[directory.name]
    assert vllm.sampler_problems(json.loads((directory / "generation_config.json").read_text())) == []


def test_vllm_ignores_tensors_for_the_other_kind_of_activations(directory: Path) -> None:
    """W4A4 read as W4A16 has a placeholder for its input scales; W4A16 read as W4A4 leaves them uninitialised."""
    found, _ = headers(directory)
    scales = [name for name in found if name.endswith("input_scale")]
    assert bool(scales) == (directory.name == "nvfp4")
    if not scales:
        wrong = vllm.loading_problems(found, configs(directory)[0], "NVFP4")
        assert len(wrong) == 2 * 4 * 3 and all("input_scale" in line and "uninitialised" in line for line in wrong)


FIRST, SECOND = "model.decoder.layers.0.", "model.decoder.layers.1."
DAMAGE: dict[str, tuple[Callable[[dict[str, vllm.Tensor], dict[str, float]], object], str]] = {
    "a tensor is gone": (lambda t, s: t.pop(SECOND + "experts.2.up_proj.weight_scale"), "uninitialised"),
    "fused as the source": (
        lambda t, s: t.update({FIRST + "experts.down_proj": ("BF16", (4, 64, 96))}), "no parameter"
    ),
    "a scale of its parts": (
        lambda t, s: t.update({FIRST + "experts.0.gate_proj.weight_scale": ("F8_E4M3", (96, 2))}),
        "takes ('F8_E4M3', (96, 4))",
    ),
    "weights as float8": (
        lambda t, s: t.update({FIRST + "experts.0.down_proj.weight": ("F8_E4M3", (64, 48))}), "('U8'"
    ),
    "a scale of one element": (
        lambda t, s: t.update({FIRST + "experts.0.down_proj.weight_scale_2": ("F32", (1,))}), "('F32', ())"
    ),
    "values where keys are values": (
        lambda t, s: t.pop(SECOND + "self_attn.k_proj.weight"), "1.self_attn.qkv_proj.weight', 'v')"
    ),
    "the scalar of both sides": (
        lambda t, s: [t.pop(f"model.{x}.layers.0.layer_scalar") for x in ("decoder", "encoder.language_model")],
        "layer_scalar",
    ),
    "gate's scale is not up's": (
        lambda t, s: s.update({FIRST + "experts.3.up_proj.weight_scale_2": 0.5}), "up_proj's is 0.5"
    ),
    "a scale of zero": (lambda t, s: s.update({FIRST + "experts.3.down_proj.weight_scale_2": 0.0}), "0.0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_vllm_would_stumble_over(directory: Path, damage: str) -> None:
    (found, scalars), (config, _) = headers(directory), configs(directory)
    change, expected = DAMAGE[damage]
    change(found, scalars)
    wrong = vllm.loading_problems(found, config, RECIPES[directory.name]) + vllm.value_problems(scalars)
    assert wrong and any(expected in line for line in wrong), wrong


CONFIGS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "the head is quantised": (lambda new, old: new["ignore"].remove("lm_head"), "lm_head would be quantised"),
    "attention of one layer": (
        lambda new, old: old.update(exclude_modules=[p for p in old["exclude_modules"] if "1.self_attn" not in p]),
        "qkv_proj would be quantised",
    ),
    "experts are left out": (lambda new, old: new["ignore"].append(FIRST + "*"), "experts would be left"),
    "another algorithm": (lambda new, old: new.update(quant_algo="FP8"), "FP8"),
    "another method": (lambda new, old: new.update(quant_method="nvfp4"), "not modelopt's"),
    "larger groups": (lambda new, old: old.update(group_size=32), "groups of 32"),
    "no word on the cache": (lambda new, old: old.pop("kv_cache_quant_algo"), "lacks kv_cache_quant_algo"),
    "a cache of 4 bits": (
        lambda new, old: old.update(kv_cache_quant_algo="FP4"), "KV cache FP4"
    ),
    "not a list": (lambda new, old: new.update(ignore="lm_head"), "is none"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_vllm_would_misread(directory: Path, damage: str) -> None:
    (found, _), (config, older) = headers(directory), configs(directory)
    change, expected = CONFIGS[damage]
    change(config["quantization_config"], older["quantization"])
    wrong = vllm.config_problems(config, older, towers(found))
    assert wrong and any(expected in line for line in wrong), wrong


@pytest.mark.parametrize("change", [{"architectures": ["Gemma4ForCausalLM"]}, {"canvas_length": None}])
def test_vllm_would_take_another_model(change: dict[str, Any], directory: Path) -> None:
    config, older = configs(directory)
    config = {key: value for key, value in (config | change).items() if value is not None}
    assert vllm.config_problems(config, older, []) == ["config.json names another architecture, or no canvas_length"]


def test_vllm_refuses_half_a_fused_layer() -> None:
    with pytest.raises(ValueError, match="some but not all"):
        vllm.excluded("model.layers.0.mlp.gate_up_proj", vllm.patterns(["model.decoder.layers.0.mlp.up_proj"]))
    both = vllm.patterns([f"model.decoder.layers.1.mlp.{part}_proj" for part in ("gate", "up")])
    assert vllm.excluded("model.layers.1.mlp.gate_up_proj", both)
    assert not vllm.excluded("model.layers.11.mlp.gate_up_proj", both)


@pytest.mark.parametrize(
    "key", ["t_min", "t_max", "confidence_threshold", "stability_threshold", "sampler_config", "_cls_name"]
)
def test_a_sampler_vllm_refuses_is_said_before_converting(key: str, tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    generation = json.loads((source / "generation_config.json").read_text())
    assert vllm.sampler_problems(generation) == []
    del generation["sampler_config" if key == "_cls_name" else key]
    if key == "_cls_name":
        generation["sampler_config"] = {"entropy_bound": 0.1}
    assert vllm.sampler_problems(generation)
    (source / "generation_config.json").write_text(json.dumps(generation))
    for to, said in (("nvfp4", True), ("gguf", False)):
        notices = planned(source, to).notices
        assert any(key in line and "vLLM" in line for line in notices) == said


def test_an_architecture_vllm_does_not_find_is_said_before_converting(tmp_path: Path) -> None:
    config = micro_config()
    assert not planned(write_micro(tmp_path / "named", config), "nvfp4").notices
    del config["architectures"]
    notices = planned(write_micro(tmp_path / "unnamed", config), "nvfp4").notices
    assert len(notices) == 1 and "architectures [DiffusionGemmaForBlockDiffusion]" in notices[0]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_26b(tmp_path_factory.mktemp("real") / "diffusiongemma-26B-A4B-it")


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_and_the_26b(real: Path, recipe: str, tmp_path: Path) -> None:
    """All 46,080 (or 34,560) tensors of the experts and what surrounds them, and both configs with its vision tower."""
    plan = planned(real, "nvfp4", recipe)
    entries = {name: entry for tensor in plan.tensors for name, entry in tensor.entries.items()}
    config = json.loads((REAL / "config.json").read_text())
    assert vllm.loading_problems(entries, config, RECIPES[recipe]) == []
    assert sum(".experts." in name for name in entries) == 30 * 128 * 3 * (4 if recipe == "nvfp4" else 3)
    artifact_files(plan, "0", None).finish(tmp_path, "0")
    written = [json.loads((tmp_path / name).read_text()) for name in ("config.json", "hf_quant_config.json")]
    vision = towers(entries)
    assert len(vision) > 100 and vllm.config_problems(written[0], written[1], vision) == []
    without = written[0]["quantization_config"]
    without["ignore"].remove("model.encoder.vision_tower*")
    assert any("vision_tower" in line for line in vllm.config_problems(written[0], written[1], vision))
    assert vllm.sampler_problems(json.loads((REAL / "generation_config.json").read_text())) == []


def test_vllm_s_vision_tower_is_transformers_(real: Path) -> None:
    """vLLM makes the tower from vision_config by transformers' AutoModel and loads it by name."""
    import transformers

    with torch.device("meta"):
        tower = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(REAL).vision_config)
    wanted = {f"vision_tower.{name}": tuple(part.shape) for name, part in tower.state_dict().items()}
    entries = {vllm.mapped(t.name): t.shape for t in planned(real, "nvfp4").tensors}
    assert {name: shape for name, shape in entries.items() if name.startswith("vision_tower.")} == wanted
    assert len(wanted) == 355


def test_how_many_gpus_vllm_can_split_an_expert_over() -> None:
    """A rank's share of an expert's rows must hold whole groups of 16 (vllm-project/vllm issue 49949)."""
    inner = json.loads((REAL / "config.json").read_text())["text_config"]["moe_intermediate_size"]
    assert [ranks for ranks in (1, 2, 4, 8) if inner % ranks == 0 and inner // ranks % vllm.GROUP == 0] == [1, 2, 4]


def test_sglang_refuses_what_it_cannot_read(directory: Path, tmp_path: Path) -> None:
    """sgl-project/sglang, models/gemma4_diffusion.py at 089a2285: a quant_config raises NotImplementedError. Before
    that it passed over tensors that it did not know, and left the experts uninitialised: no directory of ours may come
    without the key that makes it refuse."""
    config = micro_config()
    config["text_config"] |= {"intermediate_size": 128, "moe_intermediate_size": 64}
    bnb = convert(write_micro(tmp_path / "source", config), tmp_path / "bnb", "bnb4")
    for folder in (directory, bnb):
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def gguf_problems(file: Path, generation: Path) -> list[str]:
    reader = gguf.GGUFReader(file)
    keys = llamacpp.fields(reader)
    said = json.loads(generation.read_text())
    found = llamacpp.key_problems(keys) + llamacpp.sampler_problems(keys, said)
    return found + llamacpp.tensor_problems(keys, llamacpp.held(reader))


def test_llama_cpp_s_own_file_holds_its_contract() -> None:
    for name in ("reference.Q4_K_M.gguf", "reference.imatrix.Q4_K_M.gguf"):
        assert gguf_problems(TINY_A / name, TINY_A / "generation_config.json") == []


@pytest.fixture(scope="module")
def micro_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    config = micro_config() | {"canvas_length": 24}
    source = write_micro(folder / "source", config)
    generation = json.loads((source / "generation_config.json").read_text())
    generation |= {"max_denoising_steps": 7, "t_min": 0.3, "t_max": 0.9}  # no loader's defaults
    generation |= {"stability_threshold": 2, "confidence_threshold": 0.01}
    generation["sampler_config"] |= {"entropy_bound": 0.2}
    (source / "generation_config.json").write_text(json.dumps(generation))
    return next(convert(source, folder / "out", "gguf").glob("*.gguf"))


def test_llama_cpp_loads_what_we_write(micro_gguf: Path) -> None:
    assert gguf_problems(micro_gguf, micro_gguf.parent / "generation_config.json") == []
    keys = llamacpp.fields(gguf.GGUFReader(micro_gguf))
    assert keys["diffusion.canvas_length"][1] == 24 and keys["diffusion.eb_max_steps"][1] == 7


def test_a_missing_mask_token_is_said(tmp_path: Path) -> None:
    """llama-diffusion-cli stops without one (diffusion-cli.cpp), dgq and the loader do not."""
    source = write_micro(tmp_path / "source")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        tokens = json.loads((source / name).read_text())
        del tokens["mask_token"]
        (source / name).write_text(json.dumps(tokens))
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "no mask token" in result.stderr
    file = next((tmp_path / "out").glob("*.gguf"))
    wrong = gguf_problems(file, source / "generation_config.json")
    assert wrong == ["tokenizer.ggml.mask_token_id: missing"]


def test_llama_cpp_and_the_26b(real: Path) -> None:
    keys = llamacpp.fields(gguf.GGUFReader(TINY_A / "reference.Q4_K_M.gguf"))
    text = json.loads((REAL / "config.json").read_text())["text_config"]
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    real_values = {
        "block_count": 30, "embedding_length": 2816, "feed_forward_length": 2112, "attention.head_count": 16,
        "attention.head_count_kv": [8 if slides else 2 for slides in sliding], "expert_count": 128,
        "expert_feed_forward_length": 704, "attention.key_length": 512, "attention.key_length_swa": 256,
        "attention.sliding_window_pattern": sliding,
    }  # fmt: skip
    keys |= {f"{llamacpp.ARCH}.{key}": ("", value) for key, value in real_values.items()}
    keys["tokenizer.ggml.tokens"] = ("[STRING]", range(262144))
    held = {tensor.name: tensor.shape[::-1] for tensor in planned(real, "gguf").text}
    assert llamacpp.tensor_problems(keys, held) == [] and len(held) == 692


@pytest.mark.parametrize("key", [*llamacpp.REQUIRED, *llamacpp.WRONG_IF_ABSENT, *llamacpp.OUTSIDE])
def test_llama_cpp_misses_each_key(key: str, micro_gguf: Path) -> None:
    keys = llamacpp.fields(gguf.GGUFReader(micro_gguf))
    del keys[key if key in keys else f"{llamacpp.ARCH}.{key}"]
    assert any(key in line for line in llamacpp.key_problems(keys))


GGUF_DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "no encoder's scalar": (lambda k, t: t.pop("blk.0.enc_layer_output_scale.weight"), "missing"),
    "no expert scale": (lambda k, t: t.pop("blk.1.ffn_down_exps.scale"), "missing"),
    "the rival's norm": (
        lambda k, t: t.update({"self_cond_norm.weight": t.pop("self_cond_pre_norm.weight")}), "does not know"
    ),
    "a head": (lambda k, t: t.update({"output.weight": (64, 512)}), "does not know"),
    "values on a full layer": (lambda k, t: t.update({"blk.1.attn_v.weight": (64, 64)}), "layers without values"),
    "on their side": (lambda k, t: t.update({"blk.0.ffn_down_exps.weight": (64, 96, 4)}), "expected (96, 64, 4)"),
    "all factors": (lambda k, t: t.update({"rope_freqs.weight": (64,)}), "expected (32,)"),
    "a float": (lambda k, t: k.update({"diffusion.canvas_length": ("FLOAT32", 24.0)}), "read as UINT32"),
    "no canvas": (lambda k, t: k.update({"diffusion.canvas_length": ("UINT32", 0)}), "positive"),
    "other steps": (lambda k, t: k.update({"diffusion.eb_max_steps": ("UINT32", 48)}), "means 7"),
    "unequal heads": (
        lambda k, t: k.update({"diffusion-gemma.attention.value_length_swa": ("UINT32", 16)}), "must be value"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_llama_cpp_would_stumble_over(damage: str, micro_gguf: Path) -> None:
    reader = gguf.GGUFReader(micro_gguf)
    keys, held = llamacpp.fields(reader), llamacpp.held(reader)
    change, expected = GGUF_DAMAGE[damage]
    change(keys, held)
    generation = json.loads((micro_gguf.parent / "generation_config.json").read_text())
    wrong = llamacpp.key_problems(keys) + llamacpp.sampler_problems(keys, generation)
    wrong += llamacpp.tensor_problems(keys, held)
    assert wrong and any(expected in line for line in wrong), wrong
