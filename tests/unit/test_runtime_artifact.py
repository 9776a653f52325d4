"""Opening the three kinds of artifact, and refusing damaged ones in one line that names file and tensor."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import open_artifact

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
REFERENCE = TINY_A / "reference.Q4_K_M.gguf"
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def gguf_dir(tmp_path):
    for name in TEXTS:
        shutil.copy(TINY_A / name, tmp_path)
    shutil.copy(REFERENCE, tmp_path / "tinyA-Q4_K_M.gguf")
    return tmp_path


def test_three_kinds(gguf_dir):
    bf16, directory, bare = open_artifact(TINY_A), open_artifact(gguf_dir), open_artifact(str(REFERENCE))
    assert [a.kind for a in (bf16, directory, bare)] == ["safetensors", "gguf", "gguf"]
    assert directory.config == bf16.config and directory.generation == bf16.generation
    assert directory.generation.eos_ids == (1, 282, 287) and bare.generation.eos_ids == (1, 357, 362)
    assert directory.weights["model.decoder.embed_tokens.weight"].scheme.name == "q6_k"
    assert directory.weights["model.decoder.layers.0.router.proj.weight"].scheme.name == "f32"
    assert set(bare.weights) == {n for n in bf16.weights if "vision" not in n}
    chat = [{"role": "user", "content": "hi"}]
    ids = bf16.tokenizer.chat(chat)
    assert ids == directory.tokenizer.chat(chat) == bare.tokenizer.chat(chat)
    one, two = (
        generate(a.load(), Request([ids], directory.generation, 32, seed=0, steps=2)).canvases
        for a in (directory, bare)
    )
    assert one.tolist() == two.tolist()


def rewrite(path, names=None, shapes=None, drop=(), add=(), values=None, metadata=None):
    """REFERENCE written anew by the gguf package with tensors renamed, reshaped, dropped, added or changed."""
    reader = gguf.GGUFReader(REFERENCE)
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = (metadata or {}).get(key, field.contents())
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        data = (values or {}).get(tensor.name, tensor.data)
        if tensor.name in (shapes or {}):
            data = np.ascontiguousarray(data[: shapes[tensor.name]])
        writer.add_tensor((names or {}).get(tensor.name, tensor.name), data, raw_dtype=tensor.tensor_type)
    for name in add:
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rewriting_alone_is_harmless(tmp_path):
    path = rewrite(tmp_path / "x.gguf")
    assert len(open_artifact(path).weights) == len(GGUFReader(REFERENCE)) - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": ["blk.3.attn_v.weight"]}, ["tensor blk.3.attn_v.weight is missing"]),
        ({"drop": ["blk.0.enc_layer_output_scale.weight"]}, ["blk.0.enc_layer_output_scale.weight is missing"]),
        ({"drop": ["rope_freqs.weight"]}, ["rope_freqs.weight is missing"]),
        ({"add": ["output.weight"]}, ["tensor output.weight is not part of the model"]),
        ({"add": ["blk.2.attn_v.weight"]}, ["tensor blk.2.attn_v.weight is not part of the model"]),
        ({"names": {"self_cond_pre_norm.weight": "self_cond_a_norm.weight"}},
         ["self_cond_pre_norm.weight is missing", "self_cond_a_norm.weight is unknown"]),
        ({"shapes": {"blk.1.ffn_up.weight": 128}}, ["blk.1.ffn_up.weight has shape [128, 256]", "[160, 256]"]),
        ({"values": {"rope_freqs.weight": np.ones(64, dtype=np.float32)}}, ["rope_freqs.weight lets 64 of 64"]),
        ({"metadata": {"diffusion-gemma.expert_count": 16}}, ["[12, 256]", "[16, 256]"]),
    ],
)  # fmt: skip
def test_changed_ggufs(tmp_path, change, words):
    path = rewrite(tmp_path / "x.gguf", **change)
    with pytest.raises(InputError) as error:
        open_artifact(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    for word in words:
        assert word in text


def test_a_gguf_that_contradicts_its_directory(gguf_dir):
    text = (gguf_dir / "config.json").read_text()
    (gguf_dir / "config.json").write_text(text.replace('"intermediate_size": 160', '"intermediate_size": 192'))
    with pytest.raises(InputError, match=r"config\.json: intermediate is 192, but tinyA-Q4_K_M\.gguf says 160"):
        open_artifact(gguf_dir)
    (gguf_dir / "config.json").write_text(
        text.replace('"final_logit_softcapping": 30.0', '"final_logit_softcapping": 3.0')
    )
    with pytest.raises(InputError, match=r"config\.json: softcap is 3\.0, but"):
        open_artifact(gguf_dir)


def test_paths_that_are_no_artifact(gguf_dir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "x.txt").write_text("x")
    for path, words in (
        (empty / "none", "no such file or directory"),
        (empty, "holds neither safetensors nor a .gguf"),
        (empty / "x.txt", "expected a directory or a .gguf file"),
    ):
        with pytest.raises(InputError, match=words):
            open_artifact(path)
    shutil.copy(gguf_dir / "tinyA-Q4_K_M.gguf", gguf_dir / "other.gguf")
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        open_artifact(gguf_dir)
    (gguf_dir / "other.gguf").unlink()
    (gguf_dir / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json; name the file, tinyA-Q4_K_M\.gguf"):
        open_artifact(gguf_dir)


def test_damaged_files(tmp_path):
    content = REFERENCE.read_bytes()
    for name, data in (("cut", content[:-100]), ("short", content[:1000]), ("none", b""), ("text", b"hello" * 99)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            open_artifact(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
