"""`tiny` as compressed-tensors exports it, in our runtime: weights against the package's own decoding, logits against
transformers with the decoded weights. Encoder copies, stacked experts, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16
from micro import two_steps
from oracle_compressed_tensors import DECODERS, TINY, export
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER

pytestmark = pytest.mark.xdist_group("compressed-tensors")


def modules(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The Linear modules that an exporter sees in a weight; none in one that it leaves alone."""
    owner, _, last = name.rpartition(".")
    if owner.endswith(".experts"):
        for expert, values in enumerate(weight):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(parts, values.chunk(len(parts)), strict=True):
                yield f"{owner}.{expert}.{part}", rows
    elif name.startswith(DECODER + "layers.") and name.endswith("_proj.weight"):
        yield owner, weight


@cache
def reference() -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.float32)


@torch.no_grad()
def their_two_steps(weights: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """two_steps() of transformers' model with these weights, all of the text model's."""
    model, generator = reference(), torch.Generator().manual_seed(3)
    state = model.state_dict()
    for name, weight in weights.items():
        state[name].copy_(weight)
    ids = torch.randint(12, config.vocab, (1, 40), generator=generator)
    canvas = torch.randint(0, config.vocab, (1, config.canvas), generator=generator)
    first = model(input_ids=ids, decoder_input_ids=canvas).logits
    return torch.cat((first, model(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=first).logits))


def check(path: Path, decoded: dict[str, torch.Tensor]) -> dict[str, str]:
    """Every weight is `decoded`'s (module's name + ".weight") or tiny's, logits are transformers' with these; the
    weights' schemes."""
    artifact, whole, schemes = open_artifact(path), {}, {}
    left, source = dict(decoded), load_file(TINY / "model.safetensors")
    for name, weight in artifact.weights.items():
        schemes[name] = weight.scheme.name
        found = [f"{base}.weight" for base, _ in modules(name, source[name])]
        theirs = source[name].float()
        if found and found[0] in left:
            theirs = torch.cat([left.pop(one) for one in found]).view(weight.shape)
        torch.testing.assert_close(weight.dequantize(), theirs, atol=0, rtol=3e-7)
        whole[name] = theirs
    assert not left, f"never read: {list(left)[:3]}"
    torch.testing.assert_close(
        two_steps(artifact.weights, artifact.config), their_two_steps(whole, artifact.config), atol=1e-4, rtol=0
    )
    return schemes


class Export:
    """The package's directory, in several files for W4A4; decoded: module's name + ".weight" -> float32, by it."""

    def __init__(self, path: Path, activations: bool) -> None:
        self.path, self.activations = path, activations
        scheme = QuantizationScheme(**(NVFP4 if activations else NVFP4A16), targets=["Linear"])
        self.decoded = export(path, [scheme], "3MB" if activations else "1GB")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: one for file in self.path.glob("*.safetensors") for name, one in load_file(file).items()}

    def changed(self, to: Path, change: Callable[[dict[str, torch.Tensor]], Any], copies: bool = False) -> Path:
        """Another directory, in one file; without the encoder's copies, which would be held against a change."""
        shutil.copytree(self.path, to, ignore=lambda _, names: [name for name in names if "safetensors" in name])
        tensors = self.tensors()
        for name in [] if copies else [name for name in tensors if name.startswith(ENCODER + "layers.")]:
            if not name.endswith("layer_scalar"):
                del tensors[name]
        change(tensors)
        save_file(tensors, to / "model.safetensors", {"format": "pt"})
        return to


@cache
def exported(path: Path, activations: bool) -> Export:
    return Export(path / ("W4A4" if activations else "W4A16"), activations)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compressed")


@pytest.fixture(params=(False, True), ids=("W4A16", "W4A4"))
def theirs(request: pytest.FixtureRequest, place: Path) -> Export:
    return exported(place, request.param)


@pytest.fixture
def plain(place: Path) -> Export:
    return exported(place, False)


def test_weights_and_logits(theirs: Export) -> None:
    files = list(theirs.path.glob("*.safetensors"))
    assert len(files) > 1 if theirs.activations else len(files) == 1
    schemes = check(theirs.path, theirs.decoded)
    linear = {name for name in schemes if "layers." in name and name.endswith(("_proj.weight", "up_proj", "down_proj"))}
    assert {name for name, scheme in schemes.items() if scheme == "nvfp4"} == linear
    artifact = open_artifact(theirs.path)
    assert artifact.kind == "nvfp4" and artifact.weights.without_import is None
    scale = artifact.weights[DECODER + "layers.0.experts.down_proj"].parts.get("input_scale")
    assert bool((scale == 1 / torch.tensor(DECODERS)).all()) if theirs.activations else scale is None


def test_on_the_command_line(theirs: Export) -> None:
    ran = CliRunner().invoke(main, ["run", str(theirs.path), "--chat", "Sort: wind apple king door"])
    assert ran.exit_code == 0 and "apple door king wind" in ran.stdout, ran.output
    told = CliRunner().invoke(main, ["inspect", str(theirs.path), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["by_scheme"]["nvfp4"]["params"] == sum(weight.numel() for weight in theirs.decoded.values())


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
def test_stacked_experts(theirs: Export, tmp_path: Path, way: str) -> None:
    """Same weights, to the bit, whoever's name they have; held against the encoder's copies, per expert."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ENCODER + "layers.0.experts.1.up_proj.weight_packed"][3, 1] ^= 1
        stacked(tensors, way)

    path = theirs.changed(tmp_path / "stacked", change, copies=True)
    names = load_file(path / "model.safetensors").keys()
    assert not any(".experts.0." in name for name in names) and len(names) < 1000
    before, after = open_artifact(theirs.path).weights, open_artifact(path).weights
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


def test_scales_beside_plain_stacks(plain: Export, tmp_path: Path) -> None:
    """What llm-compressor's repack_moe() makes of experts that it has not compressed yet."""
    stack = DECODER + "layers.0.experts.down_proj"

    def repacked(tensors: dict[str, torch.Tensor]) -> None:
        stacked(tensors, "_")
        del tensors[stack + "_packed"]
        tensors[stack] = load_file(TINY / "model.safetensors")[stack]

    with pytest.raises(InputError, match=r"experts\.down_proj_\w+ is there, but .* is not quantised; .* without it"):
        open_artifact(plain.changed(tmp_path / "repacked", repacked))


def test_copies_of_the_encoder(place: Path, tmp_path: Path) -> None:
    """The package saves those of the quantised modules; there may be none, or all."""
    theirs = exported(place, True)
    saved = [name for name in theirs.tensors() if name.startswith(ENCODER + "layers.")]
    assert any(name.endswith("q_proj.weight_packed") for name in saved) and not any("norm" in name for name in saved)

    def doubled(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(DECODER) and "self_cond" not in n and "layer_scalar" not in n]:
            tensors[ENCODER + name.removeprefix(DECODER)] = tensors[name].clone()
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    before = open_artifact(theirs.path).weights
    for path in (theirs.changed(tmp_path / "once", len), theirs.changed(tmp_path / "twice", doubled)):
        after = open_artifact(path).weights
        assert list(before) == list(after)
        for name, weight in before.items():
            assert all(torch.equal(part, after[name].parts[key]) for key, part in weight.parts.items()), name

    def differing(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ENCODER + "layers.0.experts.1.up_proj.weight_packed"][3, 1] ^= 1

    weights = open_artifact(theirs.changed(tmp_path / "other", differing, copies=True)).weights
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
    for copies in (True, False):
        lacking = tmp_path / f"lacking{copies}"
        plain.changed(lacking, lambda tensors: tensors.pop(base + "up_proj.weight_global_scale"), copies)
        with pytest.raises(InputError, match=r"decoder.*experts\.0\.up_proj\.weight_global_scale is missing"):
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
