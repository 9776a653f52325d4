"""Fine-tunes as they come: vocabularies of other sizes, and checkpoints without a vision tower, into every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import error_of
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import EMBEDDING

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
RECIPES = {"nvfp4": "nvfp4-w4a16", "bnb4": "bnb4", "gguf": "q4_k_m"}
ASK = ("Sort: wind apple king door", "--chat", "--device", "cpu", "--seed", "1")


def tuned(
    path: Path, rows: int = 0, vision: bool = True, config_vision: bool = True, config_rows: int | None = None
) -> Path:
    """`tiny` with so many more rows of embedding, and with or without vision tensors and their configuration."""
    shutil.copytree(TINY, path)
    tensors, config = load_file(TINY / "model.safetensors"), json.loads((TINY / "config.json").read_text())
    table = tensors[EMBEDDING]
    more = table[:1].expand(max(0, rows), -1) * 0
    tensors[EMBEDDING] = torch.cat((table, more))[: len(table) + rows].contiguous()
    config["text_config"]["vocab_size"] += rows if config_rows is None else config_rows
    if not config_vision:
        del config["vision_config"]
    kept = {name: tensor for name, tensor in tensors.items() if vision or "vision" not in name}
    save_file(kept, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def dgq(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["more", "fewer", "text"])
def test_every_format_takes_them(tmp_path: Path, kind: str) -> None:
    """A row that no product divides; rows taken from the end of a vocabulary with its tokens; no vision."""
    source = tuned(tmp_path / "tuned", *{"more": (7,), "fewer": (-5,), "text": (0, False, False)}[kind])
    rows = len(load_file(source / "model.safetensors")[EMBEDDING])
    if kind == "fewer":
        raw = json.loads((source / "tokenizer.json").read_text())
        raw["model"]["vocab"] = {token: i for token, i in raw["model"]["vocab"].items() if i < rows}
        vocab = raw["model"]["vocab"]
        merges = [one if isinstance(one, list) else one.split(" ") for one in raw["model"]["merges"]]
        raw["model"]["merges"] = [pair for pair in merges if "".join(pair) in vocab]
        (source / "tokenizer.json").write_text(json.dumps(raw))
    wanted = dgq("run", source, *ASK)
    assert wanted["text"] == "apple door king wind"
    for to, recipe in RECIPES.items():
        out = tmp_path / to
        dgq("convert", source, "--to", to, "--recipe", recipe, "-o", out, "--device", "cpu")
        found = dgq("inspect", out)
        assert found["model"]["vocab"] == rows
        tower = list(out.glob("*mmproj*")) if to == "gguf" else [name for name in found["tensors"] if "vision" in name]
        assert bool(tower) == (kind != "text")
        assert dgq("run", out, *ASK)["text"] == wanted["text"]
    (file,) = (path for path in (tmp_path / "gguf").glob("*.gguf") if "mmproj" not in path.name)
    reader = GGUFReader(file)
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == rows
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert table.shape[1] == rows and table.tensor_type.name == "Q6_K"
    if kind == "more":
        assert reader.fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{rows - 1}]"
    bare = open_artifact(file)
    assert bare.tokenizer.chat([{"role": "user", "content": ASK[0]}]) == open_artifact(source).tokenizer.chat(
        [{"role": "user", "content": ASK[0]}]
    )
    assert dgq("run", file, *ASK)["tokens"] == dgq("run", tmp_path / "gguf", *ASK)["tokens"]


def test_both_sides_saved(tmp_path: Path) -> None:
    """Copies of what is tied open where a program opens them, too, and are held against each other."""
    path = tuned(tmp_path / "saved")
    tensors, decoder = load_file(path / "model.safetensors"), "model.decoder.layers."
    for name in [name for name in tensors if name.startswith(decoder) and not name.endswith("layer_scalar")]:
        tensors[name.replace(decoder, "model.encoder.language_model.layers.")] = tensors[name].clone()
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    save_file(tensors, path / "model.safetensors")
    assert dgq("inspect", path)["params"] and dgq("run", path, *ASK)["text"] == "apple door king wind"
    found = {name: weight.dequantize() for name, weight in open_artifact(path).weights.items()}
    assert len(found) > 100 and all(torch.equal(found[name], tensors[name].float()) for name in found)
    tensors["lm_head.weight"][3] *= 2
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight is not a copy of model\.decoder\.embed_tokens"):
        open_artifact(path).load("cpu")


def test_what_contradicts_itself_is_one_line(tmp_path: Path) -> None:
    for name, change, problem in (
        ("unsaid", {"config_vision": False}, "is not part of the model"),
        ("long", {"rows": 3, "config_rows": 0}, "embed_tokens.weight has shape [2051"),
        ("short", {"rows": 0, "config_rows": 64}, "embed_tokens.weight has shape [2048"),
    ):
        source = tuned(tmp_path / name, **change)
        for command in (("inspect",), ("plan", "--to", "gguf"), ("run", "x")):
            assert problem in error_of(command[0], str(source), *command[1:])
    fewer = tuned(tmp_path / "fewer", -5)
    for to in RECIPES:
        said = error_of("convert", str(fewer), "--to", to, "-o", str(tmp_path / "out"))
        assert "outside the vocabulary of 2043" in said and "tokenizer.json" in said
    assert not list(tmp_path.glob("*out*"))
