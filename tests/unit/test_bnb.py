"""NF4 and the bitsandbytes layout against bitsandbytes and stock transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from kinds import KINDS, block, write_kinds
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.quant.formats import bnb
from dgq.quant.schemes import nf4
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.types import Packed
from dgq.runtime.files.artifact import open_artifact

functional: Any = pytest.importorskip("bitsandbytes.functional")
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
STATE = ".quant_state.bitsandbytes__nf4"
pytestmark = pytest.mark.xdist_group("bitsandbytes")


def weights(kind: str, experts: int = 3, rows: int = 48, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([block(kind, rows, columns, generator) for _ in range(experts)])


def test_both_tables() -> None:
    assert torch.equal(nf4.QUANT_MAP, functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_absmax(kind: str, dtype: torch.dtype) -> None:
    """Single quantisation, fused and per expert; decoding too (bitsandbytes on AVX-512 flushes subnormal bf16)."""
    fused = weights(kind).to(dtype) * 1.1
    ours = NF4.quantize(fused)
    packed, state = functional.quantize_4bit(fused, quant_type="nf4", blocksize=64)
    assert torch.equal(ours[""].flatten(), packed.flatten())
    assert torch.equal(ours["absmax"].flatten(), state.absmax)
    if kind != "subnormal":
        assert torch.equal(NF4.dequantize(ours, dtype), functional.dequantize_4bit(packed, state))
    state.dtype = torch.float32
    assert torch.equal(NF4.dequantize(ours), functional.dequantize_4bit(packed, state))
    for expert, one in enumerate(fused):
        packed, state = functional.quantize_4bit(one.contiguous(), quant_type="nf4", blocksize=64)
        assert torch.equal(ours[""][expert].flatten(), packed.flatten())
        assert torch.equal(ours["absmax"][expert].flatten(), state.absmax)
    if kind == "zero":
        assert bool((ours[""] == 0x77).all())


@pytest.mark.parametrize("kind", KINDS)
def test_double_quantisation(kind: str) -> None:
    """Of the fused tensor; 1,152 blocks, so that the last 256 are not full."""
    fused = weights(kind).float() * (1e-8 if kind == "huge" else 1.1)
    ours = NF4_DQ.quantize(fused)
    packed, state = functional.quantize_4bit(fused, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(ours[""].flatten(), packed.flatten())
    assert torch.equal(ours["absmax"].flatten(), state.absmax)
    assert torch.equal(ours["nested_absmax"], state.state2.absmax)
    assert torch.equal(ours["nested_offset"], state.offset)
    assert torch.equal(NF4_DQ.dequantize(ours), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_of_all_kinds_in_one_large_weight(dtype: torch.dtype) -> None:
    """More than one piece of 2^17 weights, blocks of different kinds side by side; every 16-bit pattern."""
    rows = torch.cat([weights(kind, 1, 40, 1024)[0].float() for kind in KINDS if kind != "huge"])
    if dtype != torch.float32:
        patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        rows = torch.cat((rows, patterns.float().nan_to_num(0, 0, 0).view(-1, 1024)))
        shuffled = patterns[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(8))]
        rows = torch.cat((rows, shuffled.float().nan_to_num(0, 0, 0).view(-1, 1024).clamp(-1e30, 1e30)))
    weight = rows.to(dtype)
    ours = NF4.quantize(weight)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert weight.numel() > 2 << 17 and ours[""].unique().numel() > 250
    assert torch.equal(ours[""].flatten(), packed.flatten())
    assert torch.equal(ours["absmax"].flatten(), state.absmax)


def test_weights_a_step_from_a_middle() -> None:
    """Where multiplying by 1 / absmax and dividing by absmax part: two float32 steps about each middle, either sign."""
    generator = torch.Generator().manual_seed(1)
    absmax = 10 ** (20 * torch.rand(4096, 1, generator=generator) - 10)
    middles = (nf4.QUANT_MAP[:-1] + nf4.QUANT_MAP[1:]) / 2
    around = torch.arange(-2, 2, dtype=torch.int32).repeat_interleave(15) + (middles * absmax).repeat(1, 4).view(
        torch.int32
    )
    weight = torch.cat((absmax, -absmax, around.view(torch.float32), absmax / 3, -absmax / 7), 1)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    ours = NF4.quantize(weight)
    assert torch.equal(ours[""].flatten(), packed.flatten()) and torch.equal(ours["absmax"].flatten(), state.absmax)
    divided = torch.bucketize(weight / absmax, middles)
    assert not torch.equal((ours[""] >> 4).long(), divided[:, 0::2]), "or this test proves nothing"


def test_double_quantisation_of_very_many_blocks() -> None:
    """Every one of bitsandbytes' 65,536 bins is hit several times over."""
    generator = torch.Generator().manual_seed(2)
    absmax = torch.rand(1, 1 << 14, 64, generator=generator) ** 3
    ours = nf4.nest(absmax)
    codes, _ = functional.quantize_blockwise(absmax.flatten() - absmax.flatten().mean(), blocksize=256)
    assert torch.equal(ours["absmax"].flatten(), codes)
    assert len(ours["absmax"].unique()) > 200


def test_slices_of_double_quantised_weights() -> None:
    """Rows, experts and picked rows decode to their part of the whole: blocks of absmax straddle rows."""
    fused = weights("heavy-tailed", columns=320).float()
    packed = Packed(NF4_DQ, tuple(fused.shape), NF4_DQ.quantize(fused))
    whole = packed.dequantize()
    assert torch.equal(packed[1].dequantize(), whole[1])
    assert torch.equal(packed[1:3].dequantize(), whole[1:3])
    assert torch.equal(packed[2][7:19].dequantize(), whole[2, 7:19])
    assert torch.equal(packed[0][torch.tensor([40, 3])].dequantize(), whole[0, [40, 3]])
    assert packed.nbytes - 4 * 3 * 48 == NF4_DQ.nbytes(packed.shape), "the row numbers are not stored"


def test_refusals() -> None:
    for scheme in (NF4, NF4_DQ):
        with pytest.raises(ValueError, match=f"multiple of {scheme.name}'s block of 64"):
            scheme.quantize(torch.zeros(4, 96))


def convert(source: Path | str, out: Path, recipe: str) -> Path:
    result = CliRunner().invoke(
        main, ["convert", str(source), "--to", "bnb4", "--recipe", recipe, "--effort", "stock", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module", params=["bnb4", "bnb4-dq"])
def artifact(request: pytest.FixtureRequest, converted: Callable[[str, str], Path]) -> Path:
    return converted(request.param, "stock")


def states(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, Any]]:
    """Every packed tensor with bitsandbytes' own reading of the tensors beside it."""
    found = {}
    for key in tensors:
        if key.endswith(STATE):
            name = key.removesuffix(STATE)
            parts = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            found[name] = (tensors[name], functional.QuantState.from_dict(parts, torch.device("cpu")))
    return found


def test_quant_state_decodes_every_packed_tensor(artifact: Path) -> None:
    """bitsandbytes' decoder on the file's tensors gives our decoder's values; its encoder gives the file's bytes."""
    tensors = load_file(artifact / "model.safetensors")
    source, ours = load_file(TINY / "model.safetensors"), open_artifact(artifact).weights
    found = states(tensors)
    assert len(found) == 22 + 18 + 3 + 12, "attention, dense MLP, self-conditioning, experts"
    double = "dq" in json.loads((artifact / "dgq.json").read_text())["recipe"]
    for name, (packed, state) in found.items():
        assert ours[name].scheme is (NF4_DQ if double else NF4) and state.nested == double
        assert state.dtype == torch.bfloat16 and tuple(state.shape) == ours[name].shape
        decoded = functional.dequantize_4bit(packed.view(-1, 1), state)
        assert torch.equal(ours[name].dequantize(torch.bfloat16), decoded), name
        codes, theirs = functional.quantize_4bit(source[name], quant_type="nf4", compress_statistics=double)
        assert torch.equal(packed.flatten(), codes.flatten())
        assert torch.equal(tensors[name + ".absmax"].flatten(), theirs.absmax)
        if name.endswith(".weight"):
            theirs = {f"{name}.{key}": value for key, value in theirs.as_dict(packed=True).items()}
            assert theirs.keys() == {key for key in tensors if key.startswith(name + ".")}
            for key, value in theirs.items():
                assert tensors[key].shape == value.shape or key.endswith(STATE)
    assert not [name for name in tensors if "encoder" in name and STATE in name]


def test_the_state_is_bitsandbytes_own_text(artifact: Path) -> None:
    source, tensors = load_file(TINY / "model.safetensors"), load_file(artifact / "model.safetensors")
    name = "model.decoder.layers.2.self_attn.q_proj.weight"
    double = name + ".nested_absmax" in tensors
    _, state = functional.quantize_4bit(source[name], quant_type="nf4", compress_statistics=double)
    expected = bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist())
    found = bytes(tensors[name + STATE].tolist())
    assert found.rstrip() == expected and (double or found == expected), "padded where the offset's length varies"


def test_stock_transformers(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the expert tensors it loads, every Linear bit-equal; the directory itself raises."""
    from transformers import DiffusionGemmaForBlockDiffusion
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Bnb4BitHfQuantizer)  # as before dgq.runtime.hf

    tensors = load_file(artifact / "model.safetensors")
    stripped = tmp_path / "stripped"
    shutil.copytree(artifact, stripped)
    save_file(
        {k: v for k, v in tensors.items() if ".experts." not in k}, stripped / "model.safetensors", {"format": "pt"}
    )
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(stripped, dtype=torch.bfloat16)
    linears = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    expected = open_artifact(artifact).weights
    names = {n for n in expected if n + STATE in tensors and ".experts." not in n}
    assert {n + ".weight" for n in linears if n.startswith("model.decoder.")} == names and len(names) == 43
    for name, module in linears.items():
        canonical = name.replace("model.encoder.language_model.", "model.decoder.") + ".weight"
        decoded = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(decoded, expected[canonical].dequantize(torch.bfloat16)), name
    for name in ("model.decoder.layers.1.router.proj.weight", "model.decoder.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name).detach(), tensors[name])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DiffusionGemmaForBlockDiffusion.from_pretrained(artifact, dtype=torch.bfloat16)


def test_every_kind_of_block_in_a_file(tmp_path: Path) -> None:
    source = write_kinds(tmp_path / "in", [kind for kind in KINDS if kind != "huge"])
    out = convert(source, tmp_path / "out", "bnb4-dq")
    for name, (packed, state) in states(load_file(out / "model.safetensors")).items():
        state.dtype = torch.float32
        decoded = functional.dequantize_4bit(packed.view(-1, 1), state)
        assert torch.equal(open_artifact(out).weights[name].dequantize(), decoded)


@pytest.mark.parametrize("recipe", ["bnb4", "bnb4-dq", "nvfp4-w4a16"])
def test_bytes_do_not_depend_on_threads_or_slices(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one expert or a few rows, many at once, also for the absmax that wait for the last of them."""
    to = recipe.split("-")[0]
    source = write_kinds(tmp_path / "source", ("normal", "outliers", "heavy-tailed", "ties"))
    digests = []
    for slices, threads in ((1 << 22, "1"), (1000, "7")):
        monkeypatch.setattr("dgq.convert.write.slices.SLICE", {"cpu": slices})
        out = tmp_path / threads
        arguments = ["convert", str(source), "--to", to, "--recipe", recipe, "-o", str(out), "--threads", threads]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        digests.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert digests[0] == digests[1]


def test_share_and_config(artifact: Path) -> None:
    document = json.loads((artifact / "dgq.json").read_text())
    config = json.loads((artifact / "config.json").read_text())
    source = json.loads((TINY / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == source
    assert said["quant_method"] == "bitsandbytes" and said["load_in_4bit"] is True
    assert said["bnb_4bit_use_double_quant"] == (document["recipe"] == "bnb4-dq")
    shapes = {n: t.shape for n, t in load_file(TINY / "model.safetensors").items()}
    below = sum(math.prod(shapes[n]) for n, scheme in document["tensors"].items() if scheme.startswith("nf4"))
    assert document["quantized_share"] == round(below / sum(map(math.prod, shapes.values())), 6) > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_same_bytes(kind: str) -> None:
    weight = weights(kind).float() * (1e-8 if kind == "huge" else 1)
    for scheme in (NF4, NF4_DQ):
        expected = scheme.quantize(weight)
        found = scheme.quantize(weight.cuda())
        assert found.keys() == expected.keys()
        for name, part in found.items():
            assert torch.equal(part.cpu(), expected[name]), (scheme.name, name)
        assert torch.equal(scheme.dequantize(found).cpu(), scheme.dequantize(expected))


def test_values_beside_the_middles() -> None:
    """Within a rounding of a code's bounds, where x / absmax and x * (1 / absmax) go different ways."""
    generator = torch.Generator().manual_seed(1)
    middles = (nf4.QUANT_MAP[:-1] + nf4.QUANT_MAP[1:]) / 2
    absmax = torch.rand(4096, 1, generator=generator) + 0.5
    x = middles[torch.randint(0, 15, (4096, 64), generator=generator)] * absmax
    x = torch.nextafter(x, x + torch.randn(4096, 64, generator=generator))
    x[:, 0] = absmax[:, 0]
    packed, _ = functional.quantize_4bit(x, quant_type="nf4", blocksize=64)
    assert torch.equal(NF4.quantize(x)[""].flatten(), packed.flatten())
    ways = [torch.bucketize(scaled, middles) for scaled in (x / absmax, x * (1 / absmax))]
    assert not torch.equal(*ways)


def test_skip_patterns() -> None:
    """One pattern where all layers agree, both stacks' names where they do not; none hits a quantised module."""
    kept = ["model.decoder.layers.0.router.proj", "model.decoder.layers.11.router.proj"]
    kept += ["model.decoder.layers.1.mlp.up_proj", "model.decoder.self_conditioning.gate_proj"]
    quantised = ["model.decoder.layers.0.mlp.up_proj", "model.decoder.layers.11.mlp.up_proj"]
    patterns = bnb.skip_patterns(kept, quantised)
    assert patterns[:3] == ["lm_head", "model.encoder.vision_tower", "model.encoder.embed_vision"]

    def skipped(name: str) -> bool:
        from transformers.quantizers.quantizers_utils import should_convert_module

        return not should_convert_module(name, patterns)

    both = [*kept, *(name.replace("decoder", "encoder.language_model") for name in kept)]
    assert all(map(skipped, both)) and not any(map(skipped, quantised))
    assert not skipped("model.encoder.language_model.layers.11.mlp.up_proj")
    assert skipped("model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear")
