"""Odd and hostile input beyond the plain cases of test_bad_input.py: lying metadata, importance that overflows,
signals, templates that misbehave. Always one line and exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from commands import error_of, tree
from forked import Child, forked
from micro import micro_config, write_micro
from safetensors.torch import load_file, save_file
from test_bad_input import edit_json, rewrite

from dgq.convert.cli.__main__ import main
from dgq.convert.write import artifact_files

CONVERT = ("--to", "gguf", "-o")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_micro(tmp_path / "micro", shards=0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF directory; tests copy it before they change it."""
    root = tmp_path_factory.mktemp("odd")
    write_micro(root / "micro", shards=0)
    result = CliRunner().invoke(main, ["convert", str(root / "micro"), *CONVERT, str(root / "out")])
    assert result.exit_code == 0, result.output
    return root / "out"


def write_imatrix(path: Path, sums: float, counts: float, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", metadata.get("datasets", ["a.txt"]))
    writer.add_uint32("imatrix.chunk_count", 1)
    columns = metadata.get("columns", 64)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.full((1, columns), sums, np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.full((1, 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("sums", "counts", "expected"),
    [
        (3e38, 1, "importance of 3e+38"),
        (0, 1, "importance of 0 in every column"),
        (float("nan"), 1, "negative or not finite"),
        (1, float("nan"), "negative or not finite"),
        (1, -1, "negative or not finite"),
    ],
)
def test_importance_that_would_ruin_the_weights(
    sums: float, counts: float, expected: str, source: Path, tmp_path: Path
) -> None:
    imatrix = write_imatrix(tmp_path / "im.gguf", sums, counts)
    before = tree(tmp_path)
    line = error_of("convert", str(source), *CONVERT, str(tmp_path / "out"), "--imatrix", str(imatrix))
    assert "blk.0.attn_q.weight" in line and expected in line
    assert tree(tmp_path) == before


def test_importance_of_an_expert_without_tokens_is_one(source: Path, tmp_path: Path) -> None:
    outputs = []
    for name, sums, counts in (("none", 0, 0), ("ones", 5, 5)):
        imatrix = write_imatrix(tmp_path / f"{name}.gguf", sums, counts)
        out = tmp_path / name
        arguments = ["convert", str(source), *CONVERT, str(out), "--imatrix", str(imatrix)]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        outputs.append(gguf.GGUFReader(out / "micro-Q4_K_M.gguf"))
    pairs = zip(*(reader.tensors for reader in outputs), strict=True)
    assert all(np.array_equal(a.data, b.data) for a, b in pairs)


def per_layer(**entries: dict[str, int]) -> dict[str, Any]:
    config = micro_config()
    del config["text_config"]["global_head_dim"], config["text_config"]["num_global_key_value_heads"]
    config["text_config"]["per_layer_config"] = {"1": {"head_dim": 64, "num_key_value_heads": 1}, **entries}
    return config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (per_layer(**{"0": {"sliding_window": 32}}), "per_layer_config.0.sliding_window"),
        (per_layer(**{"0": {"num_attention_heads": 8}}), "per_layer_config.0.num_attention_heads"),
        (per_layer(**{"99": {}}), "entry '99' for 2 layers"),
        (per_layer(x={}), "entry 'x' for 2 layers"),
        (micro_config() | {"text_config": micro_config()["text_config"] | {"rms_norm_eps": 10**400}}, "rms_norm_eps"),
    ],
)
def test_configs_the_runtime_cannot_compute(config: dict[str, Any], expected: str, source: Path) -> None:
    (source / "config.json").write_text(json.dumps(config))
    assert expected in error_of("plan", str(source), "--to", "gguf")


def test_sliding_layers_of_different_head_dim(source: Path) -> None:
    config = per_layer(**{"0": {"head_dim": 64}})
    config["text_config"] |= {"num_hidden_layers": 3}
    config["text_config"]["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    config["text_config"]["per_layer_config"]["2"] = {"head_dim": 64, "num_key_value_heads": 1}
    config["text_config"]["per_layer_config"]["1"] = {}
    (source / "config.json").write_text(json.dumps(config))
    assert "layer 1: sliding layers of different head_dim" in error_of("plan", str(source), "--to", "gguf")


def test_a_stale_index_beside_a_single_file(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "one of them is stale" in error_of("run", str(source), "hi")


def test_nan_is_named_by_run_as_well(source: Path, artifact: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.decoder.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    assert "model.decoder.norm.weight holds values that are not finite" in error_of("run", str(source), "hi")
    broken = tmp_path / "nan.gguf"
    data = bytearray((artifact / "micro-Q4_K_M.gguf").read_bytes())
    tensor = next(t for t in gguf.GGUFReader(artifact / "micro-Q4_K_M.gguf").tensors if t.name == "blk.0.attn_q.weight")
    data[tensor.data_offset : tensor.data_offset + 2] = b"\xff\xff"  # a block's scale
    broken.write_bytes(data)
    assert "self_attn.q_proj.weight holds values that are not finite" in error_of("run", str(broken), "hi")


def test_a_gguf_that_lies_about_its_lengths(artifact: Path, tmp_path: Path) -> None:
    data = (artifact / "micro-Q4_K_M.gguf").read_bytes()
    at = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    for length in (1 << 60, 1 << 40):
        (tmp_path / "lie.gguf").write_bytes(data[:at] + length.to_bytes(8, "little") + data[at + 8 :])
        assert "lie.gguf" in error_of("inspect", str(tmp_path / "lie.gguf"))  # else it walks for hours


def test_another_arch(artifact: Path, tmp_path: Path) -> None:
    rewrite(artifact / "micro-Q4_K_M.gguf", tmp_path / "copy.gguf")
    data = (tmp_path / "copy.gguf").read_bytes().replace(b"diffusion-gemma", b"diffusion-gamma", 1)
    (tmp_path / "copy.gguf").write_bytes(data)
    assert "general.architecture is 'diffusion-gamma'" in error_of("run", str(tmp_path / "copy.gguf"), "hi")


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{{ 'a' + 1 }}", "{% for i in range(10**9) %}x{% endfor %}", "{% if %}"]
)
def test_chat_templates_that_misbehave(template: str, source: Path) -> None:
    (source / "chat_template.jinja").write_text(template)
    assert "chat template" in error_of("run", str(source), "hi", "--chat")


def test_tokenizer_files_that_are_none(source: Path, tmp_path: Path) -> None:
    out = (*CONVERT, str(tmp_path / "out"))
    before = tree(tmp_path)
    edit_json(source / "tokenizer_config.json", lambda data: data.__setitem__("chat_template", 5))
    assert "chat template is a int" in error_of("run", str(source), "hi", "--chat")
    (source / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "UTF-8" in error_of("run", str(source), "hi", "--chat")
    assert "tokenizer" in error_of("convert", str(source), *out)
    (source / "chat_template.jinja").unlink()
    tokenizer = (source / "tokenizer.json").read_text()
    edit_json(source / "tokenizer.json", lambda data: data.__setitem__("added_tokens", [{}]))
    assert "tokenizer" in error_of("convert", str(source), *out)
    (source / "tokenizer.json").write_text(tokenizer)
    (source / "tokenizer_config.json").unlink()
    before.discard("micro/tokenizer_config.json")
    assert "tokenizer_config.json: no such file" in error_of("convert", str(source), *out)
    assert tree(tmp_path) == before


def test_prompts_that_are_no_text(source: Path) -> None:
    command = [sys.executable, "-m", "dgq.convert.cli", "run", str(source), "-"]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True)
    assert done.returncode == 2 and done.stderr == b"dgq: error: PROMPT is not valid UTF-8\n"
    assert CliRunner().invoke(main, ["run", str(source), "hi", "--seed", "9" * 30]).exit_code == 2


def test_output_that_cannot_be_written_to(artifact: Path) -> None:
    def work() -> None:
        with Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), 1)
        main(["run", str(artifact), "hi", "--steps", "1"])  # few bytes

    done = forked(work)
    assert done.returncode == 2 and done.stderr.startswith("dgq: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_dgq_json_that_is_damaged(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "dgq.json").write_text('{"source": "x"}')
    assert "dgq.json: its source is not what dgq writes there; damaged" in error_of("inspect", str(copy))


def test_a_file_without_provenance_does_not_borrow_it(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "micro-Q4_K_M.gguf").rename(copy / "other.gguf")
    result = CliRunner().invoke(main, ["inspect", str(copy / "other.gguf"), "--json"])
    assert json.loads(result.stdout)["provenance"] is None


def test_tiny_is_the_embedded_model_whatever_lies_around(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact.parent)
    shutil.copytree(artifact, "tiny")
    result = CliRunner().invoke(main, ["inspect", "tiny", "--json"])
    assert json.loads(result.stdout)["model"]["experts"] == 16


def test_bare_file_and_directory_write_equally_much_by_default(artifact: Path) -> None:
    lengths = []
    for path in (artifact / "micro-Q4_K_M.gguf", artifact):
        result = CliRunner().invoke(main, ["run", str(path), "hi", "--steps", "1", "--json"])
        lengths.append(len(json.loads(result.stdout)["tokens"]))
    assert 0 < lengths[0] <= 16


def test_paths_with_brackets_are_shown_as_they_are(source: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(source, tmp_path / "m[v2][" / "b]")
    assert "m[v2][/b]" in CliRunner().invoke(main, ["plan", str(odd), "--to", "gguf"]).stdout


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_a_signal_before_a_weight_is_done_leaves_nothing(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """The conversion is stopped while it writes its first weight, and cleans up; test_resume.py has later signals."""
    slow = artifact_files.ArtifactFiles.append

    def append(*given: Any) -> None:
        print("writing", flush=True)
        time.sleep(0.5)
        slow(*given)

    def work() -> None:
        artifact_files.ArtifactFiles.append = append  # type: ignore[method-assign]
        main(["convert", str(source), "--to", "gguf", "-o", str(tmp_path / "new" / "out")])

    before = tree(tmp_path)
    child = Child(work)
    assert child.line() == "writing"
    assert {"new/.out.partial", "new/.out.journal"} < tree(tmp_path)
    child.kill(number)
    assert child.ended().returncode == (130 if number == signal.SIGINT else 128 + number)
    assert tree(tmp_path) == before


def test_two_conversions_into_one_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to finish says so; the first one's artifact stays whole."""
    out = tmp_path / "out"
    stock: Callable[..., Any] = artifact_files.metadata

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(artifact_files, "metadata", stock)
        assert CliRunner().invoke(main, ["convert", str(source), *CONVERT, str(out)]).exit_code == 0
        return stock(*arguments)

    monkeypatch.setattr(artifact_files, "metadata", meanwhile)
    assert "out: exists already" in error_of("convert", str(source), *CONVERT, str(out))
    assert {path.name for path in tmp_path.iterdir()} == {"micro", "out"}
    assert CliRunner().invoke(main, ["inspect", str(out)]).exit_code == 0
