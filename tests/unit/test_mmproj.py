"""The vision tower beside a GGUF: llama.cpp's names and layout by the gguf package, values the source's, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf.quants import dequantize
from micro import GOLDEN, micro_config, micro_tensors, write_micro
from safetensors.torch import load_file
from transformers.models.gemma4.image_processing_pil_gemma4 import convert_image_to_patches

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.files.images import Patches
from dgq.runtime.files.mmproj import mmproj_name
from dgq.runtime.shape.vision import expected_vision

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
Clip = gguf.Keys.ClipVision


def convert(source: Path | str, out: Path) -> Path:
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "--effort", "stock", "-o", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def made(converted: Callable[[str, str], Path]) -> Path:
    return converted("q4_k_m", "stock")


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro checkpoint whose tower has bounds around its products, as Gemma 4's small ones do, and F32 weights."""
    return write_clipped(tmp_path_factory.mktemp("clipped") / "micro")


def write_clipped(path: Path, **vision: Any) -> Path:
    config = micro_config() | {"boi_token_id": 5, "image_token_id": 6, "eoi_token_id": 7}
    config["vision_config"] = json.loads((TINY / "config.json").read_text())["vision_config"]
    config["vision_config"] |= {"use_clipped_linears": True, "standardize": False, "num_hidden_layers": 2} | vision
    tensors, generator = micro_tensors(config), torch.Generator().manual_seed(1)
    for name, shape in expected_vision(config, 64, "config.json").items():
        tensors[name] = torch.randn(shape, generator=generator).mul(0.1).bfloat16()
        if not shape:
            tensors[name] = torch.tensor(-0.5 if name.endswith("min") else 0.75).bfloat16()
    return write_micro(path, config, tensors)


TABLE = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 27)


def foreign_name(name: str) -> str:
    """The gguf package's own name, of the tensor name that llama.cpp's converter looks up."""
    asked = name.replace("model.encoder.", "model.").replace("model.vision_tower.encoder.", "vision_model.model.")
    if asked.endswith("position_embedding_table"):
        asked += ".weight"
    ends = (".weight", ".input_min", ".input_max", ".output_min", ".output_max")
    found = TABLE.get_name(asked.replace(".linear.", "."), ends) or TABLE.get_name(asked, ends)
    assert found is not None, name
    return found


def values_of(file: Path) -> dict[str, np.ndarray]:
    """As gguf-py reads and decodes them, in torch's order of dimensions."""
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))) for t in tensors}


@pytest.mark.parametrize("model", ["real26b", "clipped"])
def test_names_are_gguf_pys(model: str, clipped: Path) -> None:
    if model == "real26b":
        names = json.loads((GOLDEN / "real26b" / "tensors.json").read_text())["tensors"]
    else:
        names = {name for file in clipped.glob("*.safetensors") for name in load_file(file)}
    vision = [name for name in names if name.startswith(VISION)]
    assert len(vision) == {"real26b": 356, "clipped": 3 + 2 * (13 + 7 * 4)}[model]
    for name in vision:
        assert mmproj_name(name) == foreign_name(name)


@pytest.mark.parametrize("model", ["tiny", "clipped"])
def test_values_are_the_sources(model: str, made: Path, clipped: Path, tmp_path: Path) -> None:
    source = TINY if model == "tiny" else clipped
    folder = made if model == "tiny" else convert(clipped, tmp_path / "out")
    there = {}
    for file in source.glob("*.safetensors"):
        there |= {n: t for n, t in load_file(file).items() if n.startswith(VISION)}
    (file,) = folder.glob("mmproj-*.gguf")
    found = values_of(file)
    assert set(found) == {foreign_name(name) for name in there}
    for name, tensor in there.items():
        value = torch.from_numpy(found[foreign_name(name)].copy())
        if "patch_embedder.input_proj" in name:  # a convolution that does to an image what the product does to patches
            image = torch.rand(3, 32, 48)
            patches = torch.from_numpy(convert_image_to_patches(image.numpy(), 16))
            theirs = torch.nn.functional.conv2d(image[None], value, stride=16)[0].flatten(1).T
            torch.testing.assert_close(theirs, patches @ tensor.float().T, atol=1e-4, rtol=0)
            assert torch.equal(value.flatten().sort().values, tensor.float().flatten().sort().values)
        else:
            assert torch.equal(value.view(tensor.shape), tensor.float()), name
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    for name, kind in kinds.items():
        assert kind == ("BF16" if found[name].ndim == 2 and "position" not in name else "F32"), name


def test_metadata_is_what_clip_asks_for(made: Path) -> None:
    (file,) = made.glob("mmproj-*.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    vision = json.loads((TINY / "config.json").read_text())["vision_config"]
    expected = {
        gguf.Keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ],
        gguf.Keys.General.TYPE: gguf.GGUFType.MMPROJ,
        gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_BF16),
        gguf.Keys.Clip.HAS_VISION_ENCODER: True,
        Clip.USE_GELU: True,
        Clip.PROJECTOR_TYPE: gguf.VisionProjectorType.GEMMA4V,
        Clip.PROJECTION_DIM: 256,
        Clip.PATCH_SIZE: 16,
        Clip.EMBEDDING_LENGTH: vision["hidden_size"],
        Clip.FEED_FORWARD_LENGTH: vision["intermediate_size"],
        Clip.BLOCK_COUNT: vision["num_hidden_layers"],
        Clip.Attention.HEAD_COUNT: vision["num_attention_heads"],
        Clip.Projector.SCALE_FACTOR: vision["pooling_kernel_size"],
        Clip.IMAGE_MEAN: [0.0] * 3,
        Clip.IMAGE_STD: [1.0] * 3,
        Clip.IMAGE_SIZE: 224,
        Clip.IMAGE_MAX_PIXELS: 70 * 48 * 48,
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert fields[Clip.Attention.LAYERNORM_EPS] == pytest.approx(1e-6)
    document = json.loads((made / "dgq.json").read_text())
    assert file.name in document["files"] and document["tensors"]["mm.input_projection.weight"] == "bf16"


def patches(count: int = 63, wide: int = 9) -> Patches:
    """Of a picture of 9 x 7 patches."""
    generator = torch.Generator().manual_seed(4)
    at = torch.arange(count)
    positions = torch.stack((at % wide, at // wide), -1)[None]
    keep = (positions[0, :, 1] < 6).nonzero().flatten()  # three rows of soft tokens would not be whole
    values = torch.rand(1, count, 768, generator=generator)
    return Patches(values[:, keep], positions[:, keep], len(keep) // 9)


def seen_by(path: Path) -> torch.Tensor:
    return open_artifact(path).vision.tower("cpu", torch.float32)(patches())


def test_our_runtime_sees_by_it_what_the_source_sees(made: Path, clipped: Path, tmp_path: Path) -> None:
    """By the directory, and by the bare file beside it; with bounds; and the bounds do something."""
    expected = seen_by(TINY)
    assert torch.equal(seen_by(made), expected) and torch.equal(seen_by(made / "tiny-Q4_K_M.gguf"), expected)
    out = convert(clipped, tmp_path / "out")
    found = seen_by(out)
    assert torch.equal(found, seen_by(clipped))
    free = write_clipped(tmp_path / "free", use_clipped_linears=False)
    assert not torch.allclose(seen_by(free), found, atol=1e-2)
    bare, whole = open_artifact(made / "tiny-Q4_K_M.gguf").vision, open_artifact(TINY).vision
    assert bare.tokens == whole.tokens
    assert bare._processor.to_dict() == whole._processor.to_dict()


def rewritten(file: Path, to: Path, kind: str, drop: tuple[str, ...] = (), **changed: Any) -> Path:
    """The file as gguf-py writes it, matrices in `kind`, keys dropped or changed."""
    reader = gguf.GGUFReader(file)
    keys = {key: (field.contents(), field.types) for key, field in reader.fields.items()}
    writer = gguf.GGUFWriter(to, changed.pop("arch", "clip"))
    for key, (value, types) in keys.items():
        if not key.startswith(("GGUF.", "general.architecture", *drop)):
            writer.add_key_value(key, changed.get(key.split(".")[-1], value), *types)
    values = values_of(file)
    for name, value in values.items():
        if name not in drop:
            raw = gguf.GGMLQuantizationType[kind if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.mark.parametrize(("kind", "limit"), [("F16", 2e-3), ("Q8_0", 0.06)])
def test_published_towers_open(kind: str, limit: float, made: Path, tmp_path: Path) -> None:
    """As others write them: F16 or Q8_0, without the keys that llama.cpp's converter leaves out."""
    shutil.copyfile(made / "tiny-Q4_K_M.gguf", tmp_path / "model.gguf")
    drop = ("clip.vision.projector.scale_factor", "clip.vision.image_max_pixels", "clip.use_gelu", "dgq.")
    rewritten(next(made.glob("mmproj-*")), tmp_path / f"mmproj-{kind}.gguf", kind, drop)
    vision = open_artifact(tmp_path / "model.gguf").vision
    assert vision._processor.max_soft_tokens == 280
    expected = seen_by(TINY)
    error = float((vision.tower("cpu", torch.float32)(patches()) - expected).norm() / expected.norm())
    assert 0 < error < limit


def fails(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_artifact(path).vision.tower("cpu", torch.float32)
    return str(error.value)


def test_what_is_wrong_is_said(made: Path, tmp_path: Path) -> None:
    own, model = next(made.glob("mmproj-*")), tmp_path / "model.gguf"
    shutil.copyfile(made / "tiny-Q4_K_M.gguf", model)
    assert str(model) in fails(model) and "no mmproj*.gguf" in fails(model) and "so named" in fails(model)
    first = tmp_path / "mmproj-a.gguf"
    for said, settings in (
        ("tensor v.blk.0.attn_q.weight is missing", {"drop": ("v.blk.0.attn_q.weight",)}),
        ("clip.vision.patch_size is missing", {"drop": ("clip.vision.patch_size",)}),
        ("projector_type is 'gemma3'", {"projector_type": "gemma3"}),
        ("is for a text model 512 wide, and this one is 256", {"projection_dim": 512}),
        ("tensor v.blk.1.", {"block_count": 2}),
        ("general.architecture is 'llama'", {"arch": "llama"}),
    ):
        first.unlink(missing_ok=True)
        rewritten(own, first, "BF16", **settings)
        assert said in fails(model) and str(first) in fails(model), fails(model)
    shutil.copyfile(own, first)
    with pytest.raises(InputError, match=r"is a vision tower \(mmproj\); name the text model's"):
        open_artifact(first)
    shutil.copyfile(own, tmp_path / "mmproj-b.gguf")
    assert "2 mmproj files (mmproj-a.gguf, mmproj-b.gguf, …); keep one" in fails(model)
    assert "no vision tower" in fails(write_micro(tmp_path / "text only"))

    folder = shutil.copytree(made, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vision_config.num_hidden_layers is 3, but mmproj-tiny-BF16.gguf says 1"):
        open_artifact(folder)


def test_a_damaged_tower_is_found_out(made: Path, tmp_path: Path) -> None:
    """By verify, and by verify --against if its hash was made to fit."""
    from dgq.convert.source.hashes import describe
    from dgq.convert.write import provenance

    folder = shutil.copytree(made, tmp_path / "out")
    (file,) = folder.glob("mmproj-*")
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code == 1 and file.name in result.stderr
    document = json.loads((folder / "dgq.json").read_text())
    document["files"][file.name] = describe(file)
    del document["sha256"]
    (folder / "dgq.json").write_text(provenance.text(provenance.sealed(document)))
    assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 0
    result = CliRunner().invoke(main, ["verify", str(folder), "--against", "tiny", "--sample", "1000"])
    assert result.exit_code == 1 and "v.blk.0.ln2.weight is not what tiny gives" in result.stderr, result.output


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 1), ("hidden_activation", "gelu"), ("rope_parameters", {"rope_theta": 10.0})],
)
def test_a_tower_that_such_a_file_cannot_say(key: str, value: Any, tmp_path: Path) -> None:
    source = write_clipped(tmp_path / "micro", **{key: value})
    arguments = ["convert", str(source), "--to", "gguf", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and f"vision_config.{key}" in result.stderr and not (tmp_path / "out").exists()


def test_without_a_tower_there_is_no_such_file(tmp_path: Path) -> None:
    out = convert(write_micro(tmp_path / "micro"), tmp_path / "out")
    assert [file.name for file in out.glob("*.gguf")] == ["micro-Q4_K_M.gguf"]
