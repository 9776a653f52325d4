"""Checkpoints in which the same weights have other names, other pieces or other settings than the released one's. Each
opens with the values of the plain checkpoint and says what was odd; transformers' or vLLM's own names are the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from micro import micro_config, micro_tensors, two_steps, write_micro
from safetensors.torch import load_file, save_file
from test_strangers import TINY, Tensors, checked, dgq, edited, refused

from dgq.convert.source.checkpoint import open_source
from dgq.convert.source.models import open_model
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import BOM
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import DECODER, EMBEDDING, ENCODER


def by_expert(gate: str, up: str, down: str, both: str = "") -> Callable[[Tensors], Tensors]:
    """Every expert's projections as tensors of their own; the names' {} are the experts' module and the number."""

    def change(tensors: Tensors) -> Tensors:
        apart: Tensors = {}
        for name, weight in tensors.items():
            owner, _, last = name.rpartition(".")
            if not owner.endswith(".experts"):
                apart[name] = weight
                continue
            for expert, rows in enumerate(weight):
                parts = {down: rows} if last == "down_proj" else {both: rows} if both else None
                parts = parts or dict(zip((gate, up), rows.chunk(2), strict=True))
                apart |= {form.format(owner, expert): part.clone() for form, part in parts.items()}
        return apart

    return change


def stacked(gate: str, up: str, down: str) -> Callable[[Tensors], Tensors]:
    """Gate and up as two stacks, as mlx-vlm has them."""

    def change(tensors: Tensors) -> Tensors:
        apart: Tensors = {}
        for name, weight in tensors.items():
            owner, _, last = name.rpartition(".")
            if last == "gate_up_proj":
                halves = zip((gate, up), weight.chunk(2, 1), strict=True)
                apart |= {form.format(owner): half.clone() for form, half in halves}
            else:
                apart[down.format(owner) if last == "down_proj" and owner.endswith(".experts") else name] = weight
        return apart

    return change


def renamed(old: str, new: str, change: Callable[[Tensors], Tensors] | None = None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new): t for n, t in (change(tensors) if change else tensors).items()}


def both_sides(tensors: Tensors) -> Tensors:
    """llm-compressor saves the encoder's copies too."""
    apart = LINEARS(tensors)
    return apart | {n.replace(DECODER, ENCODER): t.clone() for n, t in apart.items() if ".experts." in n}


LINEARS = by_expert("{}.{}.gate_proj.weight", "{}.{}.up_proj.weight", "{}.{}.down_proj.weight")
APART: dict[str, Callable[[Tensors], Tensors]] = {
    "linears": LINEARS,
    "both sides": both_sides,
    "vLLM": renamed(".experts.", ".moe.experts.", LINEARS),
    "Mixtral": renamed(".experts.", ".block_sparse_moe.experts.", by_expert("{}.{}.w1.weight", "{}.{}.w3.weight",
                                                                            "{}.{}.w2.weight")),
    "a linear of both": by_expert("", "", "{}.{}.down_proj.weight", "{}.{}.gate_up_proj.weight"),
    "lists": by_expert("", "", "{}.down_projs.{}.weight", "{}.gate_up_projs.{}.weight"),
    "stacks": stacked("{}.gate_proj", "{}.up_proj", "{}.down_proj"),
    "mlx-vlm": stacked("{}.switch_glu.gate_proj.weight", "{}.switch_glu.up_proj.weight",
                       "{}.switch_glu.down_proj.weight"),
    "fused, .weight": stacked("", "", "{}.down_proj.weight"),
}  # fmt: skip
APART["fused, .weight"] = lambda tensors: {n + ".weight" if ".experts." in n else n: t for n, t in tensors.items()}


@pytest.mark.parametrize("kind", APART)
def test_experts_apart(tmp_path: Path, kind: str) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=APART[kind](tensors), shards=2)
    joined = {"both sides": 8, "stacks": 2}.get(kind, 4)
    source = checked(path, tensors, f"{joined} weights of experts lie in")
    name = DECODER + "layers.1.experts.gate_up_proj"
    assert torch.equal(source.rows(name, 1, 3), tensors[name][1:3])
    assert torch.equal(source.row(name, 3, 150), tensors[name][3, 150])
    assert {file.name for file in source.files} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert sum(one.nbytes for one in source.everything().values()) == sum(t.nbytes for t in tensors.values())
    source.check_copies()
    plain = open_source(str(write_micro(tmp_path / "plain", tensors=tensors)))
    assert source.digest() == plain.digest()


def test_experts_apart_that_do_not_fit(tmp_path: Path) -> None:
    tensors = LINEARS(micro_tensors(micro_config()))
    name = DECODER + "layers.1.experts.2.up_proj.weight"
    lacking = {n: t for n, t in tensors.items() if n != name}
    assert f"tensor {name} is missing" in refused(write_micro(tmp_path / "missing", tensors=lacking))
    shorter = tensors | {name: tensors[name][:-1].clone()}
    assert f"tensor {name} has shape [95, 64]" in refused(write_micro(tmp_path / "shape", tensors=shorter))
    wider = tensors | {name: tensors[name].float()}
    assert f"{name} is F32, but" in refused(write_micro(tmp_path / "dtype", tensors=wider))
    other = both_sides(micro_tensors(micro_config()))
    copy = name.replace(DECODER, ENCODER)
    source = open_source(str(write_micro(tmp_path / "sides", tensors=other | {copy: other[copy] + 1})))
    with pytest.raises(InputError, match=r"gate_up_proj differs from .* tied to"):
        source.check_copies()


GEMMA = ("model.decoder.", "model.language_model.")


def test_gemmas_name_of_the_text_model(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors={n.replace(*GEMMA): t for n, t in tensors.items()})
    checked(path, tensors, "another program's names")


# --- the vision tower and the config -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["null", "absent"])
def test_a_tower_without_vision_config(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny"
    shutil.copytree(TINY, path)
    edited(path, lambda raw: raw.update(vision_config=None) if kind == "null" else raw.pop("vision_config"))
    tensors = load_file(TINY / "model.safetensors")
    source = checked(path, {n: t for n, t in tensors.items() if "vision" not in n}, "hold 18 vision tensors: left out")
    assert not source.vision and not source.sees
    for opened in (open_model(str(path)), open_artifact(path)):
        with pytest.raises(InputError, match="has no vision tower, which images need"):
            _ = opened.vision


EARLY = {"model_type": "diffusion_gemma4", "architectures": ["DiffusionGemma4ModelForBlockDiffusion"]}


def early(path: Path) -> Path:
    """A config.json from before the release, by vLLM's transformers_utils/configs and llama.cpp's converter."""
    edited(path, lambda raw: raw.update(EARLY))
    return edited(path, lambda raw: raw["text_config"].update(model_type="diffusion_gemma4_text"))


def test_names_before_the_release(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    path = early(write_micro(tmp_path / "micro", tensors=tensors))
    source = checked(path, tensors, "names from before the release")
    plain = source.plain_config()
    assert plain is not None and plain["model_type"] == "diffusion_gemma"
    assert plain["architectures"] == ["DiffusionGemmaForBlockDiffusion"]
    assert plain["text_config"]["model_type"] == "diffusion_gemma_text"
    assert not any("architectures" in one for one in source.unsaid)
    edited(path, lambda raw: raw.update(model_type="diffusion_gemma5"))
    assert "model_type is 'diffusion_gemma5'" in refused(path)


# --- small files ---------------------------------------------------------------------------------------------------


def test_tokenizer_at_plan(tmp_path: Path) -> None:
    """What is odd about tokenizer.json is in the plan's notices, before a conversion stops there."""
    path = write_micro(tmp_path / "micro")
    file = path / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(BOM + whole)
    assert any("tokenizer.json: begins with a byte order mark" in line for line in open_source(str(path)).notices)
    for content, word in ((b"", "is empty"), (None, "is missing, without it no text is read")):
        file.unlink() if content is None else file.write_bytes(content)
        assert any(f"tokenizer.json: {word}" in line for line in open_source(str(path)).notices)
        assert word in dgq("plan", path, "--to", "gguf", "--no-probe")
    (path / "tokenizer.model").write_bytes(b"x")
    assert any("save tokenizer.model with transformers" in line for line in open_source(str(path)).notices)
    file.write_bytes(whole)
    assert not open_source(str(path)).notices


@pytest.mark.parametrize("shards", [1, 3, 25])
def test_shards_of_any_size_in_a_cache(tmp_path: Path, shards: int) -> None:
    """A snapshot of the Hub's cache: files are links to blobs, and one shard holds a single tensor."""
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors, shards=shards)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / ("0" * 40), tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for folder in ("original", ".cache/huggingface/download"):
        (snapshot / folder).mkdir(parents=True)
        (snapshot / folder / "x.lock").touch()
    save_file({"tok_embeddings.weight": torch.ones(2)}, snapshot / "consolidated.00.safetensors")
    source = checked(snapshot, tensors)
    assert not source.notices and len(source.files) == shards
    assert torch.equal(two_steps(source, source.config), two_steps(open_artifact(snapshot).weights, source.config))


def test_an_index_that_lists_the_head_is_said(tmp_path: Path) -> None:
    tensors = micro_tensors(micro_config())
    path = write_micro(tmp_path / "micro", tensors=tensors)
    shard, index = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    edited(path, lambda raw: raw["weight_map"].update({"lm_head.weight": shard}), index)
    source = checked(path, tensors, "lists 1 tied weights that no file holds (lm_head.weight)")
    assert source.text[EMBEDDING].shape == tensors[EMBEDDING].shape


def test_gemmas_names_of_the_tower(tmp_path: Path) -> None:
    """Gemma 4 has its tower directly below the model."""
    path = tmp_path / "tiny"
    shutil.copytree(TINY, path)
    tensors = load_file(TINY / "model.safetensors")
    names = {n: n.replace("model.encoder.", "model.", 1) if "vision" in n else n for n in tensors}
    save_file({names[n]: t for n, t in tensors.items()}, path / "model.safetensors")
    source = checked(path, {n: t for n, t in tensors.items() if "vision" not in n}, "another program's names")
    for name in source.vision:
        assert torch.equal(source.vision_tensor(name), tensors[name])
