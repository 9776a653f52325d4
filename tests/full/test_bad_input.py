"""Bad input through the command line: one line that names file and tensor, exit code 2, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner
from commands import error_of, tree
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file, save_file

from dgq.convert.cli.__main__ import main

EXPERTS = "model.decoder.layers.1.experts.down_proj"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rename_in_index(path: Path, name: str, file: str) -> None:
    edit_json(path / INDEX, lambda data: data["weight_map"].__setitem__(name, file))


def missing_shard(path: Path) -> None:
    (path / SHARD).unlink()


def truncated_shard(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:-10])


def shard_cut_inside_its_header(path: Path) -> None:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:100])


def empty_shard(path: Path) -> None:
    (path / SHARD).write_bytes(b"")


def absurd_header_length(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


def header_is_no_json(path: Path) -> None:
    data = bytearray((path / SHARD).read_bytes())
    data[8:12] = b"oops"
    (path / SHARD).write_bytes(data)


def index_names_a_tensor_that_is_not_there(path: Path) -> None:
    rename_in_index(path, "model.decoder.layers.9.layer_scalar", SHARD)


def index_names_a_path_outside(path: Path) -> None:
    rename_in_index(path, EXPERTS, "../../etc/passwd")


def index_names_an_absolute_path(path: Path) -> None:
    rename_in_index(path, EXPERTS, "/etc/passwd")


def shard_holds_what_the_index_does_not_say(path: Path) -> None:
    edit_tensors(path / SHARD, lambda tensors: tensors.__setitem__("stowaway", torch.zeros(2)))


def _both(path: Path, name: str, tensor: torch.Tensor) -> None:
    edit_tensors(path / SHARD, lambda tensors: tensors.__setitem__(name, tensor))
    rename_in_index(path, name, SHARD)


def extra_tensor(path: Path) -> None:
    _both(path, "model.decoder.layers.1.self_attn.v_proj.weight", torch.zeros(64, 64).bfloat16())


def missing_tensor(path: Path) -> None:
    file = json.loads((path / INDEX).read_text())["weight_map"][EXPERTS]
    edit_tensors(path / file, lambda tensors: tensors.pop(EXPERTS))
    edit_json(path / INDEX, lambda data: data["weight_map"].pop(EXPERTS))


def _replace(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = json.loads((path / INDEX).read_text())["weight_map"][name]
    edit_tensors(path / file, lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous()))


def wrong_shape(path: Path) -> None:
    _replace(path, EXPERTS, lambda tensor: tensor.mT)


def wrong_dtype(path: Path) -> None:
    _replace(path, EXPERTS, lambda tensor: tensor.to(torch.int8))


def already_fp8(path: Path) -> None:
    _replace(path, EXPERTS, lambda tensor: tensor.to(torch.float8_e4m3fn))


def unknown_model_type(path: Path) -> None:
    edit_json(path / "config.json", lambda data: data.__setitem__("model_type", "llama"))


def broken_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "diffusion_gemma", ')


def config_is_a_list(path: Path) -> None:
    (path / "config.json").write_text("[1, 2]")


def config_without_a_size(path: Path) -> None:
    edit_json(path / "config.json", lambda data: data["text_config"].pop("moe_intermediate_size"))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_generation_config(path: Path) -> None:
    (path / "generation_config.json").write_text("{")


def eight_experts(path: Path) -> None:
    config = micro_config()
    config["text_config"]["num_experts"] = 8
    (path / "config.json").write_text(json.dumps(config))
    for file in path.glob("*.safetensors"):
        file.unlink()
    (path / INDEX).unlink()
    save_file(micro_tensors(config), path / "model.safetensors")


HEADERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    missing_shard: (SHARD, "no such file"),
    truncated_shard: (SHARD, "truncated"),
    shard_cut_inside_its_header: (SHARD, "header length"),
    empty_shard: (SHARD, "header length"),
    absurd_header_length: (SHARD, "header length 1152921504606846976"),
    header_is_no_json: (SHARD, "unreadable safetensors header"),
    index_names_a_tensor_that_is_not_there: (INDEX, "model.decoder.layers.9.layer_scalar", SHARD),
    index_names_a_path_outside: (INDEX, EXPERTS, "../../etc/passwd"),
    index_names_an_absolute_path: (INDEX, EXPERTS, "/etc/passwd"),
    shard_holds_what_the_index_does_not_say: (SHARD, "stowaway"),
    extra_tensor: (SHARD, "model.decoder.layers.1.self_attn.v_proj.weight", "not part of the model"),
    missing_tensor: (EXPERTS, "is missing", "[4, 64, 96]"),
    wrong_shape: (".safetensors", EXPERTS, "[4, 96, 64]", "[4, 64, 96]"),
    wrong_dtype: (".safetensors", EXPERTS, "I8"),
    already_fp8: (".safetensors", EXPERTS, "F8_E4M3"),
    unknown_model_type: ("config.json", "model_type", "llama"),
    broken_config: ("config.json", "JSON"),
    config_is_a_list: ("config.json", "list"),
    config_without_a_size: ("config.json", "moe_intermediate_size"),
    no_config: ("config.json", "no such file"),
    broken_generation_config: ("generation_config.json", "JSON"),
}


@pytest.mark.parametrize("break_it", HEADERS, ids=lambda function: function.__name__)
def test_a_broken_checkpoint_is_refused_from_its_headers(break_it: Callable[[Path], None], tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    break_it(source)
    before = tree(tmp_path)
    for command in (
        ("plan", str(source), "--to", "gguf"),
        ("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "new" / "out")),
        ("run", str(source), "hello"),
        ("inspect", str(source)),
    ):
        line = error_of(*command)
        for part in HEADERS[break_it]:
            assert part in line, line
    assert tree(tmp_path) == before


def test_eight_experts_are_refused_by_the_recipe(tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    eight_experts(source)
    assert "exactly 8 experts" in error_of("plan", str(source), "--to", "gguf")


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e6), ids=str)
def test_a_weight_that_cannot_be_stored(value: float, tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    _replace(source, EXPERTS, lambda tensor: tensor.index_put([torch.tensor(2), torch.tensor(5), torch.tensor(7)],
                                                              torch.tensor(value).bfloat16()))  # fmt: skip
    before = tree(tmp_path)
    line = error_of("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "new" / "out"))
    assert EXPERTS in line and ".safetensors" in line
    assert ("[2, 5, 7]" in line) if value != 1e6 else ("9.994e+05" in line)
    assert tree(tmp_path) == before


def test_tied_copies_are_compared(tmp_path: Path) -> None:
    """Byte-equal copies convert to the same file with a notice; a copy that differs in one bit is refused."""
    config = micro_config()
    tensors = micro_tensors(config)
    plain = write_micro(tmp_path / "a" / "model", config, tensors)
    copies = {
        "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone(),
        "model.encoder.language_model.layers.0.router.scale": tensors["model.decoder.layers.0.router.scale"].clone(),
    }
    full = write_micro(tmp_path / "b" / "model", config, tensors | copies)
    outputs = []
    for source in (plain, full):
        result = CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "-o", str(source.parent / "out")])
        assert result.exit_code == 0, result.output
        outputs.append((source.parent / "out" / "model-Q4_K_M.gguf").read_bytes())
    assert outputs[0] == outputs[1]
    assert "2 copies of tied weights" in result.stderr

    copies["lm_head.weight"][3, 3] += 1
    differing = write_micro(tmp_path / "c" / "model", config, tensors | copies)
    line = error_of("convert", str(differing), "--to", "gguf", "-o", str(tmp_path / "out"))
    assert "lm_head.weight differs from model.decoder.embed_tokens.weight" in line
    assert "lm_head.weight" in error_of("run", str(differing), "hello")


def test_half_and_float_tensors_are_accepted_with_a_notice(tmp_path: Path) -> None:
    config = micro_config()
    tensors = micro_tensors(config)
    bf16 = write_micro(tmp_path / "a" / "model", config, tensors)
    f32 = write_micro(tmp_path / "b" / "model", config, {name: tensor.float() for name, tensor in tensors.items()})
    for source in (bf16, f32):
        result = CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "-o", str(source.parent / "out")])
        assert result.exit_code == 0, result.output
    assert "are F32, not BF16" in result.stderr
    files = [(source.parent / "out" / "model-Q4_K_M.gguf").read_bytes() for source in (bf16, f32)]
    assert files[0] == files[1]


def test_output_directory_that_exists(tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    (tmp_path / "out").mkdir()
    assert "out: exists already" in error_of("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "out"))
    assert tree(tmp_path / "out") == set()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "file" / "out"))


def test_a_full_disk_is_noticed_before_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    source = write_micro(tmp_path / "source")
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "GiB of disk" in error_of("convert", str(source), "--to", "gguf", "-o", str(tmp_path / "out"))
    assert tree(tmp_path) == before


def test_recipes(tmp_path: Path) -> None:
    source = str(write_micro(tmp_path / "source"))
    line = error_of("plan", source, "--to", "gguf", "--recipe", "q9")
    names = "bnb4, bnb4-dq, iq4_nl, nvfp4, nvfp4-all, nvfp4-w4a16, q4_k_m, q6_k, q8_0"
    assert f"unknown recipe 'q9'; dgq has {names}" in line
    assert "recipe nvfp4 makes nvfp4, not bnb4" in error_of("plan", source, "--to", "bnb4", "--recipe", "nvfp4")
    recipe = tmp_path / "mine.toml"
    assert "mine.toml: no such recipe" in error_of("plan", source, "--to", "gguf", "--recipe", str(recipe))
    text = (Path(__file__).parents[2] / "recipes" / "q4_k_m.toml").read_text()
    for old, new, expected in (
        ('scheme = "f32"', 'scheme = "q9"', "unknown scheme 'q9'"),
        ("max_dims = 1", "max_dimensions = 1", "max_dimensions"),
        ('format = "gguf"', 'format = "safetensors"', "format"),
        ('format = "gguf"', 'format = "nvfp4"', "nvfp4 has no scheme 'f32' (it has bf16, nvfp4)"),
        ('scheme = "q6_k"', 'scheme = "nf4"', "gguf has no scheme 'nf4'"),
        ("file_type = 15", 'activations = "nvfp4"', "gguf has no place for activations"),
        ("[[rule]]", "[rule]", "TOML"),
        ('q4_k = "q5_0"', 'q4_k = "q6_k"', "rows of 160"),
        ('scheme = "q4_k"\n\n# Rows', 'scheme = "f32"\n\n# Rows', "of the parameters in 16 bits or more"),
        (
            'match = "*"\nscheme = "q4_k"\n\n# Rows',
            'match = "none"\nscheme = "q4_k"\n\n# Rows',
            "no rule matches tensor",
        ),
    ):
        assert old in text
        recipe.write_text(text.replace(old, new))
        assert expected in error_of("plan", source, "--to", "gguf", "--recipe", str(recipe)), new


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "no such directory" in error_of("plan", str(tmp_path / "nothing"), "--to", "gguf")
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of("plan", str(tmp_path / "file"), "--to", "gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in error_of("plan", str(tmp_path / "empty"), "--to", "gguf")
    source = write_micro(tmp_path / "source")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    assert "holds neither" in error_of("plan", str(source), "--to", "gguf")


# --- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    source = write_micro(root / "micro")
    result = CliRunner().invoke(main, ["convert", str(source), "--to", "gguf", "-o", str(root / "out")])
    assert result.exit_code == 0, result.output
    return root / "out" / "micro-Q4_K_M.gguf"


def rewrite(
    source: Path, target: Path, rename: Callable[[str], str | None] = lambda name: name, extra: str | None = None,
    reshape: str | None = None, metadata: Callable[[str, Any], Any] = lambda key, value: value,
) -> None:  # fmt: skip
    """Copy a GGUF with gguf-py, tensor by tensor, with one thing changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "diffusion-gemma")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = metadata(key, field.contents())
            if value is not None:
                writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        name = rename(tensor.name)
        if name is not None:
            data = tensor.data[:-1] if name == reshape else tensor.data
            writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    if extra:
        writer.add_tensor(extra, reader.tensors[0].data, raw_dtype=reader.tensors[0].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BROKEN_GGUF: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing": ({"rename": lambda name: None if name == "blk.1.ffn_down.weight" else name}, ("blk.1.ffn_down.weight",)),
    "missing rope": ({"rename": lambda name: None if name == "rope_freqs.weight" else name}, ("rope_freqs.weight",)),
    "extra": ({"extra": "blk.0.surprise.weight"}, ("blk.0.surprise.weight",)),
    "output head": ({"extra": "output.weight"}, ("output.weight",)),
    "mis-shaped": ({"reshape": "blk.1.attn_q.weight"}, ("blk.1.attn_q.weight", "[127, 64]", "[128, 64]")),
    "other arch": (
        {"metadata": lambda key, value: None if key == "diffusion-gemma.expert_count" else value},
        ("expert_count",),
    ),
}


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_a_broken_gguf_is_refused(case: str, micro_gguf: Path, tmp_path: Path) -> None:
    changes, expected = BROKEN_GGUF[case]
    broken = tmp_path / "broken.gguf"
    rewrite(micro_gguf, broken, **changes)
    for command in ("inspect", "run"):
        line = error_of(command, str(broken), *(["hello"] if command == "run" else []))
        for part in ("broken.gguf", *expected):
            assert part in line, line


def test_an_unchanged_copy_is_fine(micro_gguf: Path, tmp_path: Path) -> None:
    """The check of the checks above: what rewrite() writes without a change opens and runs."""
    rewrite(micro_gguf, tmp_path / "copy.gguf")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "copy.gguf")]).exit_code == 0


def test_a_cut_gguf(micro_gguf: Path, tmp_path: Path) -> None:
    data = micro_gguf.read_bytes()
    for length in (0, 3, 20, 5000, len(data) - 100):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[:length])
        assert "cut.gguf" in error_of("inspect", str(cut))
    (tmp_path / "text.gguf").write_text("hello, this is no GGUF file at all")
    assert "text.gguf" in error_of("run", str(tmp_path / "text.gguf"), "hi")


def test_imatrix_that_does_not_fit(micro_gguf: Path, tmp_path: Path) -> None:
    source = write_micro(tmp_path / "source")
    out = ("--to", "gguf", "-o", str(tmp_path / "out"))
    golden = Path(__file__).parent.parent / "golden" / "tinyA" / "reference.imatrix.gguf"
    before = tree(tmp_path)
    assert "blk.0.attn_k.weight" in error_of("convert", str(source), *out, "--imatrix", str(golden))
    assert "not 'imatrix'" in error_of("convert", str(source), *out, "--imatrix", str(micro_gguf))
    assert "no such file" in error_of("convert", str(source), *out, "--imatrix", str(tmp_path / "none.gguf"))
    assert tree(tmp_path) == before
