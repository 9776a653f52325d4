"""transformers opens dgq's directories after `import dgq.runtime.hf`: packed, against its own model with the decoded
weights; saved again to the byte; and what it does without the import."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_bnb_others import apart, configured
from test_fine_tunes import tuned
from transformers import DiffusionGemmaForBlockDiffusion

import dgq.runtime.hf  # noqa: F401
from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.hf.modules import PackedExperts, PackedLinear

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
RECIPES = ("nvfp4", "nvfp4-w4a16", "bnb4", "bnb4-dq", "bnb4-mixed")
MIXED = """
[[rule]]
match = "model.decoder.layers.0.experts.*"
scheme = "bf16"

[[rule]]
match = "model.decoder.layers.2.experts.down_proj"
scheme = "bf16"

[[rule]]
match = "model.decoder.layers.2.self_attn.k_proj.weight"
scheme = "bf16"
"""
pytestmark = [pytest.mark.xdist_group("bitsandbytes"), pytest.mark.usefixtures("no_compiler")]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {recipe: tmp_path_factory.mktemp("hf") / recipe for recipe in RECIPES}
    for name, path in paths.items():
        to, scale, recipe = name.partition("-")[0], ["--input-scale", "0.01"] if name == "nvfp4" else [], name
        if name == "bnb4-mixed":
            head, *rules = (TINY.parent / "bnb4.toml").read_text().partition("[[rule]]")
            recipe = str(path.with_suffix(".toml"))
            Path(recipe).write_text(head + MIXED + "".join(rules))
        command = ["convert", str(TINY), "--to", to, "--recipe", recipe, "--effort", "stock", "-o", str(path)]
        result = CliRunner().invoke(main, command + scale)
        assert result.exit_code == 0, result.output
    return paths


@pytest.fixture(params=RECIPES)
def artifact(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Path:
    return artifacts[request.param]


def opened(path: Path, dtype: torch.dtype) -> Any:
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def decoded(artifact: Path, to: Path) -> Path:
    """A directory for stock transformers."""
    shutil.copytree(TINY, to)
    tensors = load_file(to / "model.safetensors")
    for name, weight in open_artifact(artifact).weights.items():
        tensors[name] = weight.dequantize(torch.float32)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_logits_and_tokens(artifact: Path, tmp_path: Path) -> None:
    model = opened(artifact, torch.float32)
    reference = opened(decoded(artifact, tmp_path / "decoded"), torch.float32)
    config, generator = open_artifact(artifact).config, torch.Generator().manual_seed(0)
    ids = torch.randint(12, config.vocab, (1, 20), generator=generator)
    canvas = torch.randint(0, config.vocab, (1, config.canvas), generator=generator)
    with torch.no_grad():
        found, theirs = (m(input_ids=ids, decoder_input_ids=canvas).logits for m in (model, reference))
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    texts = []
    for one in (model, reference):
        torch.manual_seed(1)
        out = one.generate(ids, max_new_tokens=2 * config.canvas, max_denoising_steps=6, disable_compile=True)
        texts.append(getattr(out, "sequences", out))
    assert torch.equal(*texts) and texts[0].shape[1] > 20


def test_packed_in_memory_and_saved_to_the_byte(artifact: Path, tmp_path: Path) -> None:
    model = opened(artifact, torch.bfloat16)
    kinds = [type(module) for module in model.modules()]
    bnb = artifact.name.startswith("bnb4")
    assert kinds.count(PackedExperts) > 0 and (kinds.count(PackedLinear) > 0) == bnb
    assert "Linear4bit" not in {kind.__name__ for kind in kinds}
    sizes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, PackedLinear)}
    source = load_file(TINY / "model.safetensors")
    matrices = {
        tuple(weight.shape) for name, weight in source.items() if re.match(r"model.decoder.*_proj\.weight", name)
    }
    assert sizes == (matrices if bnb else set())
    stored = sum(spec.nbytes for spec in open_artifact(artifact).weights.everything().values())
    assert model.get_memory_footprint() < 1.1 * stored
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (artifact, tmp_path / "again"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(tensor.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8)), name
    said = [json.loads((p / "config.json").read_text())["quantization_config"] for p in (artifact, tmp_path / "again")]
    assert said[0] == said[1]
    one, two = open_artifact(artifact), open_artifact(tmp_path / "again")
    assert (one.kind, one.config, one.generation) == (two.kind, two.config, two.generation)
    opened(tmp_path / "again", torch.bfloat16).save_pretrained(tmp_path / "third")
    files = [
        (tmp_path / where / name).read_bytes()
        for name in ("model.safetensors", "config.json")
        for where in ("again", "third")
    ]
    assert files[0] == files[1] and files[2] == files[3]


def test_damage_is_one_line(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    name = next(n for n in tensors if ".experts." in n and n.endswith((".weight_scale", ".nested_absmax", ".absmax")))
    last = max(n for n in tensors if n.endswith("nested_absmax")) if artifact.name == "bnb4-dq" else name
    tensors[last].view(torch.uint8).fill_(0xFF)
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="damaged"):
        opened(tmp_path / "damaged", torch.bfloat16)


def test_a_missing_tensor_is_one_line(artifact: Path, tmp_path: Path) -> None:
    """A packed weight's scale, which transformers knows nothing of, and a plain weight, which it would make up."""
    tensors = load_file(artifact / "model.safetensors")
    scale = max(n for n in tensors if ".experts." in n and n.endswith((".weight_scale_2", ".absmax")))
    for number, name in enumerate((scale, "model.decoder.layers.1.pre_feedforward_layernorm.weight")):
        shutil.copytree(artifact, lacking := tmp_path / str(number))
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file(kept, lacking / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=re.escape(f"tensor {name} is missing")):
            opened(lacking, torch.bfloat16)


def test_inspect_names_the_line(artifacts: dict[str, Path]) -> None:
    for recipe, path in artifacts.items():
        result = CliRunner().invoke(main, ["inspect", str(path)])
        does = "raises" if recipe.startswith("bnb4") else "gives the experts RANDOM weights and only warns"
        assert f"after `import dgq.runtime.hf`; without that line it {does}" in result.output, result.output


def test_experts_apart_open_too(tmp_path: Path) -> None:
    """bitsandbytes 4-bit with a quant_state an expert, which others write; saving says that it is read only."""
    shutil.copytree(TINY, path := tmp_path / "apart")
    shutil.copytree(TINY, plain := tmp_path / "plain")
    source = load_file(TINY / "model.safetensors")
    tensors, values = apart(source, "Linears", True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    save_file(source | values, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": configured(True).to_dict()}
    (path / "config.json").write_text(json.dumps(config))
    model, reference = (opened(one, torch.float32) for one in (path, plain))
    ids, canvas = torch.arange(20, 40)[None], torch.arange(100, 164)[None]
    with torch.no_grad():
        found, theirs = (m(input_ids=ids, decoder_input_ids=canvas).logits for m in (model, reference))
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)
    codes = sum(part.numel() for name, part in tensors.items() if name.endswith(".absmax"))
    assert f"float32 when loaded, {3 * codes / 2**20:,.1f} MiB more" in open_artifact(path).weights.remarks[0]
    with pytest.raises(InputError, match="this layout is read only"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("to", ["nvfp4", "bnb4"])
def test_without_a_tower(to: str, tmp_path: Path) -> None:
    """transformers makes up none and saves none; an image is refused."""
    source, path, again = tuned(tmp_path / "text", 0, False, False), tmp_path / "made", tmp_path / "again"
    scale = ["--input-scale", "0.01"] if to == "nvfp4" else []
    command = ["convert", str(source), "--to", to, "--effort", "stock", "-o", str(path), *scale]
    assert CliRunner().invoke(main, command).exit_code == 0
    model = opened(path, torch.bfloat16)
    ids, canvas = torch.arange(20, 40)[None], torch.arange(100, 164)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=canvas).logits
        with pytest.raises(InputError, match="no vision tower"):
            model.model.encoder.get_image_features(torch.zeros(1, 9, 768), torch.zeros(1, 9, 2, dtype=torch.int64))
    model.save_pretrained(again)
    before, after = (load_file(one / "model.safetensors") for one in (path, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(-1).view(torch.uint8), after[n].view(-1).view(torch.uint8)) for n in before)
    assert open_artifact(again).config == open_artifact(path).config
    with torch.no_grad():
        assert torch.equal(opened(again, torch.bfloat16)(input_ids=ids, decoder_input_ids=canvas).logits, logits)


def test_without_the_import(artifacts: dict[str, Path]) -> None:
    """bitsandbytes: an error. modelopt's: transformers takes it, with random experts and a warning, as README says."""
    code = """import sys, torch, transformers
for path in sys.argv[1:]:
    print("##", path, file=sys.stderr)
    try:
        transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.bfloat16)
        print("opened", file=sys.stderr)
    except Exception as error:
        print("raised", error, file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *map(str, artifacts.values())]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    for recipe, path in artifacts.items():
        words = said.partition(f"## {path}\n")[2].partition("## ")[0]
        assert "experts.gate_up_proj" in words, words
        random = "newly initialized" in words and "opened" in words
        assert ("raised" in words, random) == (recipe.startswith("bnb4"), not recipe.startswith("bnb4")), words
