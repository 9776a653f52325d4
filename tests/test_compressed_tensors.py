"""`tiny` as the compressed-tensors package compresses it, in our runtime: weights against the package's own decoding,
logits against the decoded weights. Encoder copies, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from micro import two_steps
from safetensors.torch import load_file, save_file

from dgq.quant.dense import F32
from dgq.quant.errors import InputError
from dgq.quant.types import Packed
from dgq.runtime.artifact import open_artifact
from dgq.runtime.names import DECODER, EMBEDDING, ENCODER

TINY = Path(__file__).parent.parent / "recipes" / "tiny"
INPUT = torch.tensor([250.0])


def modules(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The Linear modules that llm-compressor sees in a weight; none in one that it leaves alone."""
    owner, _, last = name.rpartition(".")
    if owner.endswith(".experts"):
        for expert, values in enumerate(weight):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(parts, values.chunk(len(parts)), strict=True):
                yield f"{owner}.{expert}.{part}", rows
    elif name.startswith(DECODER + "layers.") and name.endswith("_proj.weight"):
        yield owner, weight


def compressed(weight: torch.Tensor, amax: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """By the package, scales as its observers and llm-compressor compute them."""
    global_scale = generate_gparam(-amax, amax)
    blocks = weight.float().unflatten(-1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale)
    state = {"weight": weight.float(), "weight_scale": scale, "weight_global_scale": global_scale}
    if scheme.input_activations is not None:
        state["input_global_scale"] = INPUT.clone()
    return {key: value.contiguous() for key, value in NVFP4PackedCompressor.compress(state, scheme).items()}


def decompressed(state: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The package's steps, in float32; its decompress() rounds to bfloat16 on the way."""
    rows, half = state["weight_packed"].shape
    codes = unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * half, dtype=torch.float32)
    scale, whole = state["weight_scale"].float(), state["weight_global_scale"]
    found = dequantize(x_q=codes, scale=scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    rough = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    torch.testing.assert_close(rough.float(), found, atol=0, rtol=2**-6)
    return found


class Export:
    """tiny's directory; decoded: canonical name -> float32, by the package."""

    def __init__(self, path: Path, activations: bool) -> None:
        shutil.copytree(TINY, path)
        scheme = QuantizationScheme(**(NVFP4 if activations else NVFP4A16), targets=["Linear"])
        self.path, self.activations, self.decoded = path, activations, {}
        source, tensors = load_file(path / "model.safetensors"), {}
        for name, weight in source.items():
            found = dict(modules(name, weight))
            if not found:
                tensors[name] = weight
                self.decoded[name] = weight.float()
                continue
            pieces = []
            for base, rows in found.items():
                swapped = base.replace("up_proj", "gate_proj") if "up_proj" in base else base.replace("gate_", "up_")
                other = found.get(swapped, rows)  # an expert's gate and up share their scale
                amax = torch.maximum(rows.float().abs().max(), other.float().abs().max())
                state = compressed(rows, amax, scheme)
                tensors |= {f"{base}.{key}": value for key, value in state.items()}
                pieces.append(decompressed(state, scheme))
            self.decoded[name] = torch.cat(pieces).view(weight.shape).float()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        groups = {"group_0": scheme.model_copy(update={"format": "nvfp4-pack-quantized"})}
        said = QuantizationConfig(
            config_groups=groups, format="nvfp4-pack-quantized", quantization_status="compressed", ignore=["lm_head"]
        ).model_dump(mode="json")
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = said | {"quant_method": "compressed-tensors"}
        (path / "config.json").write_text(json.dumps(config))

    def changed(self, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        shutil.copytree(self.path, to)
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors", {"format": "pt"})
        return to


@pytest.fixture(scope="module", params=(False, True), ids=("W4A16", "W4A4"))
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("compressed") / "tiny", request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("compressed") / "tiny", False)


def test_weights_and_logits(export: Export) -> None:
    artifact = open_artifact(export.path)
    assert artifact.kind == "nvfp4" and artifact.weights.without_import is None
    decoded, packed = {}, 0
    for name, weight in artifact.weights.items():
        theirs = export.decoded[name]
        torch.testing.assert_close(weight.dequantize(), theirs, atol=0, rtol=3e-7)
        packed += weight.scheme.name == "nvfp4"
        decoded[name] = Packed(F32, weight.shape, {"": theirs})
    assert packed == sum(".experts." in n or (n.endswith("_proj.weight") and "layers." in n) for n in decoded)
    torch.testing.assert_close(
        two_steps(artifact.weights, artifact.config), two_steps(decoded, artifact.config), atol=1e-4, rtol=0
    )
    scale = artifact.weights[DECODER + "layers.0.experts.down_proj"].parts.get("input_scale")
    assert bool((scale == 1 / INPUT).all()) if export.activations else scale is None


def stacked(tensors: dict[str, torch.Tensor], way: str) -> None:
    """Experts as llm-compressor's repacking saves them: gate's rows before up's, scalars [E, 2], down's [E, 1]. way:
    what stands before the suffix, "." for a module's tensors, "_" for parameters of their own."""
    owners = {name.split(".experts.")[0] + ".experts." for name in tensors if ".experts.0." in name}
    for owner in owners:
        suffixes = {name.rpartition(".")[2] for name in tensors if name.startswith(owner + "0.")}
        for suffix in suffixes:
            apart = [
                [tensors.pop(f"{owner}{expert}.{part}.{suffix}") for part in ("gate_proj", "up_proj", "down_proj")]
                for expert in range(sum(n.startswith(owner) and n.endswith(f"down_proj.{suffix}") for n in tensors))
            ]
            name = suffix.removeprefix("weight_") if way == "_" else suffix
            whole = [torch.cat((gate.view(torch.uint8), up.view(torch.uint8))).view(up.dtype) for gate, up, _ in apart]
            tensors[f"{owner}gate_up_proj{way}{name}"] = torch.stack(whole)
            tensors[f"{owner}down_proj{way}{name}"] = torch.stack([down for _, _, down in apart])


@pytest.mark.parametrize("way", (".", "_"))
def test_stacked_experts(export: Export, tmp_path: Path, way: str) -> None:
    """Same weights, to the bit, whoever's name they have; held against the encoder's copies, per expert."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[ENCODER + name.removeprefix(DECODER)] = tensors[name].clone()
        tensors[ENCODER + "layers.0.experts.1.up_proj.weight_packed"][3, 1] ^= 1
        stacked(tensors, way)

    path = export.changed(tmp_path / "stacked", change)
    names = load_file(path / "model.safetensors").keys()
    assert not any(".experts.0." in name for name in names) and len(names) < 1000
    before, after = open_artifact(export.path).weights, open_artifact(path).weights
    for name in set(before) - {damaged := DECODER + "layers.0.experts.gate_up_proj"}:
        assert before[name].parts.keys() == after[name].parts.keys()
        assert all(torch.equal(part, after[name].parts[key]) for key, part in before[name].parts.items()), name
    with pytest.raises(
        InputError, match=r"language_model\.layers\.0\.experts\.1\.up_proj\.weight_packed is not a copy"
    ):
        after[damaged]


def test_global_scales_of_stacks(plain: Export, tmp_path: Path) -> None:
    """[E, 2], which must agree, or [E, 1]; no others."""
    name = DECODER + "layers.0.experts.gate_up_proj"

    def given(to: str, scales: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            stacked(tensors, ".")
            tensors[name + ".weight_global_scale"] = scales(tensors[name + ".weight_global_scale"]).contiguous()

        return plain.changed(tmp_path / to, change)

    before, after = (open_artifact(path).weights[name] for path in (plain.path, given("one", lambda two: two[:, :1])))
    assert torch.equal(before.dequantize(), after.dequantize())
    unlike = open_artifact(given("unlike", lambda two: two * torch.tensor([1, 2]))).weights
    with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight_global_scale is .*; gate and up must share it"):
        unlike[name]
    with pytest.raises(InputError, match=r"experts\.0\.gate_proj\.weight_global_scale is missing and .*gate_up_proj"):
        open_artifact(given("three", lambda two: two[:, :1].expand(-1, 3)))


def test_copies_of_the_encoder(plain: Export, tmp_path: Path) -> None:
    def doubled(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(DECODER) and "self_cond" not in n and "layer_scalar" not in n]:
            tensors[ENCODER + name.removeprefix(DECODER)] = tensors[name].clone()
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    path = plain.changed(tmp_path / "twice", doubled)
    before, after = open_artifact(plain.path).weights, open_artifact(path).weights
    assert list(before) == list(after)
    assert all(torch.equal(before[name].dequantize(), after[name].dequantize()) for name in before)

    def differing(tensors: dict[str, torch.Tensor]) -> None:
        doubled(tensors)
        tensors[ENCODER + "layers.0.experts.1.up_proj.weight_packed"][3, 1] ^= 1

    weights = open_artifact(plain.changed(tmp_path / "other", differing)).weights
    with pytest.raises(
        InputError, match=r"language_model\.layers\.0\.experts\.1\.up_proj\.weight_packed is not a copy"
    ):
        weights[DECODER + "layers.0.experts.gate_up_proj"]


def test_what_is_refused(plain: Export, tmp_path: Path) -> None:
    base = DECODER + "layers.0.experts.0."

    def unlike(tensors: dict[str, torch.Tensor]) -> None:
        tensors[base + "up_proj.weight_global_scale"] *= 2

    weights = open_artifact(plain.changed(tmp_path / "unlike", unlike)).weights
    with pytest.raises(InputError, match="gate and up must share it"):
        weights[DECODER + "layers.0.experts.gate_up_proj"]
    lacking = plain.changed(
        tmp_path / "lacking", lambda tensors: tensors.pop(base + "up_proj.weight_global_scale") and None
    )
    with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight_global_scale is missing"):
        open_artifact(lacking)
    said = json.loads((plain.path / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    for words, other in {
        "format 'pack-quantized'": said | {"format": "pack-quantized"},
        "transform_config": said | {"transform_config": {"config_groups": {"a": {}}}},
        "num_bits '8'": said | {"config_groups": {"a": group | {"weights": group["weights"] | {"num_bits": 8}}}},
        "no config_groups": said | {"config_groups": {}},
    }.items():
        (lacking / "config.json").write_text(
            json.dumps(json.loads((plain.path / "config.json").read_text()) | {"quantization_config": other})
        )
        with pytest.raises(InputError, match=f"compressed-tensors with .*{words}"):
            open_artifact(lacking)
