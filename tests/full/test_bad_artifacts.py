"""Broken NVFP4 and bitsandbytes directories, and conversions that cannot be: one line that names file, tensor and
number, exit code 2, nothing written. What is odd but sound must open."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands import error_of
from kinds import write_kinds
from micro import micro_config, micro_tensors, write_micro
from safetensors.torch import load_file, save_file
from test_bad_input import edit_json

from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.quant.files.hf_writer import shards
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.vision import expected_vision

FORMATS = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4"}
GOLDEN = Path(__file__).parent.parent / "golden" / "tinyA"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERTS = "model.decoder.layers.1.experts."
DOWN, GATE, UP = (f"{EXPERTS}2.{projection}_proj." for projection in ("down", "gate", "up"))
GATE_UP = EXPERTS + "gate_up_proj"
QUERY = "model.decoder.layers.1.self_attn.q_proj.weight"
ENCODER_QUERY = "model.encoder.language_model.layers.1.self_attn.q_proj.weight"
NORM = "model.decoder.norm.weight"
STATE = QUERY + ".quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], Any]
RUN = ("--max-new-tokens", "1", "--steps", "1", "--json")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, "source", and an artifact of each recipe by its name; tests copy what they change."""
    root = tmp_path_factory.mktemp("good")
    write_kinds(root / "source", ("normal",) * 6)
    for recipe in FORMATS:
        convert(root / "source", root / recipe, recipe)
    return root


def convert(source: Path, out: Path, recipe: str | Path, to: str = "") -> Path:
    scale = ["--input-scale", "0.01"] if recipe == "nvfp4" else []
    arguments = ["--to", to or FORMATS[str(recipe)], "--recipe", str(recipe), "-o", str(out), *scale]
    result = CliRunner().invoke(main, ["convert", str(source), *arguments])
    assert result.exit_code == 0, result.output
    return out


def snapshot(path: Path) -> dict[str, int]:
    return {str(entry.relative_to(path)): entry.stat().st_mtime_ns for entry in path.rglob("*")}


def fails(folder: Path, *arguments: str | Path) -> str:
    """The command's one line; `folder` is as it was."""
    before = snapshot(folder)
    line = error_of(*map(str, arguments))
    assert snapshot(folder) == before
    return line


def works(path: Path) -> dict[str, Any]:
    """What inspect says of a directory that opens and runs."""
    for command in (("run", str(path), "hi", *RUN), ("inspect", str(path)), ("inspect", str(path), "--json")):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# --- ways to change a directory -------------------------------------------------------------------------------------


def tensors(change: Callable[[Tensors], Any]) -> Change:
    def edit(path: Path) -> None:
        found = load_file(path / SINGLE)
        change(found)
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path / SINGLE)

    return edit


def without(*names: str) -> Change:
    return tensors(lambda found: [found.pop(name) for name in names])


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda found: found.__setitem__(name, change(found[name])))


def added(name: str, tensor: torch.Tensor) -> Change:
    return tensors(lambda found: found.__setitem__(name, tensor))


def filled(value: float, name: str, at: tuple[int, ...] = ()) -> Change:
    return tensors(lambda found: found[name].__setitem__(at or ..., value))


def scale_code(name: str, code: int) -> Change:
    return tensors(lambda found: found[name].view(torch.uint8).__setitem__((5, 3), code))


def swapped(a: str, b: str) -> Change:
    return tensors(lambda found: found.update({a: found[b], b: found[a]}))


def renamed(old: str, new: str, keep: bool = False) -> Change:
    def change(found: Tensors) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found[name] if keep else found.pop(name)

    return tensors(change)


def config(file: str = "config.json", **keys: Any) -> Change:
    return lambda path: edit_json(path / file, lambda data: data.update(keys))


def section(name: str, file: str = "config.json", **keys: Any) -> Change:
    return lambda path: edit_json(path / file, lambda data: data[name].update(keys))


said = partial(section, "quantization_config")
older = partial(section, "quantization", "hf_quant_config.json")
text_config = partial(section, "text_config")


def unsaid(path: Path) -> None:
    edit_json(path / "config.json", lambda data: data.pop("quantization_config"))


def written(file: str, data: str | bytes) -> Change:
    return lambda path: (path / file).write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(file: str, length: int) -> Change:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:length])


def removed(file: str) -> Change:
    return lambda path: (path / file).unlink()


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def state(text: str | bytes = "", offset: str = "", **keys: Any) -> Change:
    """The quant_state of a Linear: another text, other keys, or another way to write its nested_offset."""

    def change(found: Tensors) -> None:
        data = json.loads(bytes(found[STATE].tolist())) | keys
        new = json.dumps(data)
        new = new.replace(json.dumps(data["nested_offset"]), offset) if offset else new
        raw = text if isinstance(text, bytes) else (text or new).encode()
        found[STATE] = torch.tensor(list(raw), dtype=torch.uint8)

    return tensors(change)


def plain(*prefixes: str) -> Change:
    """The weights below these prefixes as plain tensors."""

    def change(path: Path) -> None:
        found = {name: t for name, t in load_file(path / SINGLE).items() if not name.startswith(prefixes)}
        weights = {name: t.dequantize() for name, t in open_artifact(path).weights.items() if name.startswith(prefixes)}
        save_file(found | {name: t.bfloat16() for name, t in weights.items()}, path / SINGLE)

    return change


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def overlapping(path: Path) -> None:
    header, payload = read_header((path / SINGLE).read_bytes())
    other = "model.decoder.self_conditioning.pre_norm.weight"
    header[NORM]["data_offsets"] = header[other]["data_offsets"]
    (path / SINGLE).write_bytes(with_header(header, payload))


def index_to_a_missing_shard(path: Path) -> None:
    names = load_file(path / SINGLE)
    (path / SINGLE).rename(path / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name == NORM)}-of-00002.safetensors" for name in names}
    (path / INDEX).write_text(json.dumps({"weight_map": files}))


def compressed_tensors(path: Path) -> None:
    said(quant_method="compressed-tensors", format="nvfp4-pack-quantized")(path)
    removed("hf_quant_config.json")(path)
    for old, new in (("weight_scale_2", "weight_global_scale"), ("_proj.weight", "_proj.weight_packed")):
        renamed(old, new)(path)


class Case(NamedTuple):
    change: Change
    expected: tuple[str, ...]
    headers: bool = True  # whether inspect sees it, too


U8, I8 = torch.uint8, torch.int8
VISION = "model.encoder.embed_vision.embedding_projection.weight"
VISION_U8 = replaced(VISION, lambda t: t.to(U8))
NVFP4: dict[str, Case] = {
    "vision in U8": Case(VISION_U8, (SINGLE, VISION + " has dtype U8", "BF16")),
    **{
        f"{suffix} missing": Case(without(DOWN + suffix), (f"{DOWN}{suffix} is missing", "1 of 207"))
        for suffix in ("weight", "weight_scale", "weight_scale_2")
    },
    "extra": Case(added(DOWN + "weight_scale_3", torch.ones(())), (SINGLE, DOWN + "weight_scale_3", "not part")),
    "a bias": Case(added(DOWN + "bias", torch.ones(128).bfloat16()), (SINGLE, DOWN + "bias", "not part")),
    "scales swapped": Case(
        swapped(DOWN + "weight_scale", DOWN + "weight_scale_2"),
        (SINGLE, DOWN + "weight_scale has shape []", "[128, 4]"),
    ),
    "gate's and down's scales swapped": Case(
        swapped(DOWN + "weight_scale", GATE + "weight_scale"), (SINGLE, GATE + "weight_scale", "[128, 4]", "[64, 8]")
    ),
    "scales in F32": Case(
        replaced(DOWN + "weight_scale", torch.Tensor.float), (SINGLE, DOWN + "weight_scale has dtype F32", "F8_E4M3")
    ),
    "scales in U8": Case(
        replaced(DOWN + "weight_scale", lambda t: t.view(U8)), (SINGLE, DOWN + "weight_scale has dtype U8", "F8_E4M3")
    ),
    "scales in the other F8": Case(
        replaced(DOWN + "weight_scale", lambda t: t.view(torch.float8_e5m2)), (SINGLE, DOWN, "F8_E5M2", "F8_E4M3")
    ),
    "scale_2 in F64": Case(
        replaced(DOWN + "weight_scale_2", torch.Tensor.double), (SINGLE, DOWN + "weight_scale_2 has dtype F64", "F32")
    ),
    "scale_2 of one element": Case(
        replaced(DOWN + "weight_scale_2", lambda t: t.view(1)), (SINGLE, DOWN + "weight_scale_2", "[1]", "[]")
    ),
    "codes in I8": Case(replaced(DOWN + "weight", lambda t: t.view(I8)), (SINGLE, DOWN + "weight has dtype I8", "U8")),
    "a row less": Case(
        replaced(DOWN + "weight", lambda t: t[:-1]), (SINGLE, DOWN + "weight", "[127, 32]", "[128, 32]")
    ),
    "transposed": Case(replaced(DOWN + "weight", lambda t: t.mT), (SINGLE, DOWN + "weight", "[32, 128]", "[128, 32]")),
    **{
        f"scale code {code:#04x}": Case(
            scale_code(UP + "weight_scale", code), (SINGLE, UP + "weight_scale", f"0x{code:02X}", kind, "[5, 3]"), False
        )
        for code, kind in ((0x7F, "not a number"), (0xFF, "not a number"), (0x81, "negative"), (0x80, "negative"))
    },
    **{
        f"{suffix} {value}": Case(filled(value, UP + suffix), (SINGLE, f"{UP}{suffix} is {value}", "positive"), False)
        for suffix in ("weight_scale_2", "input_scale")
        for value in (math.nan, 0.0, -1.0, math.inf)
    },
    **{
        f"gate's {suffix} unlike up's": Case(
            replaced(UP + suffix, lambda t: t * 1.0000002),
            (SINGLE, GATE + suffix, UP + suffix, "must share it", number),
            False,
        )
        for suffix, number in (("weight_scale_2", "is 0.00"), ("input_scale", "is 0.00999999978"))
    },
    "an expert missing": Case(
        tensors(lambda found: [found.pop(name) for name in list(found) if name.startswith(EXPERTS + "2.")]),
        (GATE + "weight is missing", "12 of 207"),
    ),
    "expert 99 for 2": Case(
        renamed(EXPERTS + "2.", EXPERTS + "99."),
        (GATE + "weight is missing", EXPERTS + "99.", "12 missing, 12 unknown"),
    ),
    "expert 99 more": Case(
        renamed(EXPERTS + "2.", EXPERTS + "99.", keep=True), (SINGLE, EXPERTS + "99.", "not part", "12 such")
    ),
    "expert 02": Case(renamed(EXPERTS + "2.", EXPERTS + "02."), (GATE + "weight is missing", EXPERTS + "02.")),
    "more experts said": Case(text_config(num_experts=7), ("experts.6.gate_proj.weight is missing", "24 of 231")),
    "fewer experts said": Case(text_config(num_experts=5), (SINGLE, "experts.5.", "not part", "24 such")),
    "experts without end": Case(
        text_config(num_experts=200_000), ("layers.0.experts.gate_up_proj [200000, 128, 128]", "files hold")
    ),
    "quantised, and says nothing": Case(
        both(unsaid, removed("hf_quant_config.json")), ("experts.0.gate_proj.weight has shape [64, 64]", "[64, 128]")
    ),
    "unknown algorithm": Case(
        both(said(quant_algo="W8A16"), removed("hf_quant_config.json")), ("config.json", "quant_algo 'W8A16'", "NVFP4")
    ),
    "unknown algorithm, older place": Case(
        both(unsaid, older(quant_algo="W8A16")), ("hf_quant_config.json", "quant_algo 'W8A16'", "NVFP4")
    ),
    "algorithm a list": Case(both(said(quant_algo=["NVFP4"]), older(quant_algo=["NVFP4"])), ("config.json", "NVFP4")),
    "blocks of 32": Case(said(group_size=32), ("config.json", "group_size 32", "16")),
    "blocks of 32 in a group": Case(
        lambda path: edit_json(
            path / "config.json",
            lambda data: data["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=32),
        ),
        ("/config.json", "group_size 32", "16"),
    ),
    "blocks of 32 in the older place": Case(older(group_size=32), ("hf_quant_config.json", "group_size 32", "16")),
    "blocks of 32 in the older place alone": Case(
        both(unsaid, older(group_size=32)), ("hf_quant_config.json", "group_size 32", "16")
    ),
    "the two disagree": Case(older(quant_algo="FP8"), ("hf_quant_config.json", "'FP8'", "config.json", "'NVFP4'")),
    "the older one unreadable": Case(written("hf_quant_config.json", "{"), ("hf_quant_config.json", "JSON")),
    "the older one no text": Case(written("hf_quant_config.json", b"\xff\xfe\0"), ("hf_quant_config.json", "JSON")),
    "the older one a list": Case(written("hf_quant_config.json", "[]"), ("hf_quant_config.json", "list")),
    "the older one empty": Case(written("hf_quant_config.json", "{}"), ("hf_quant_config.json", "`quantization`")),
    "a list": Case(config(quantization_config=[1]), ("config.json", "quantization_config", "quant_method")),
    "a text": Case(config(quantization_config="nvfp4"), ("config.json", "quantization_config", "quant_method")),
    "no method": Case(said(quant_method=None), ("config.json", "quantization_config", "quant_method")),
    "method 5": Case(said(quant_method=5), ("config.json", "quantization_config", "quant_method")),
    **{
        method: Case(said(quant_method=method), ("config.json", f"quantised as '{method}'", "does not open"))
        for method in ("awq", "gptq", "MODELOPT")
    },
    "an endless method": Case(said(quant_method="x" * 10**5), ("config.json", "quantised as '" + "x" * 40 + "'")),
    "compressed-tensors": Case(
        compressed_tensors, ("config.json", "compressed-tensors with group", "strategy", "does not open")
    ),
    "W4A16 said, W4A4 held": Case(
        both(said(quant_algo="W4A16_NVFP4"), older(quant_algo="W4A16_NVFP4")), (SINGLE, "input_scale", "36 such")
    ),
    "rows of 24": Case(
        text_config(moe_intermediate_size=24), ("rows of 24 in", "experts.down_proj", "nvfp4's block of 16")
    ),
    "copies for the encoder": Case(
        renamed("model.decoder.layers.0.experts", "model.encoder.language_model.layers.0.experts", keep=True),
        (SINGLE, "model.encoder.language_model.layers.0.experts.", "not part", "72 such"),
    ),
    "tied head": Case(added("lm_head.weight", torch.zeros(2)), (SINGLE, "lm_head.weight", "not part")),
}

BNB: dict[str, Case] = {
    "vision in U8": Case(VISION_U8, (VISION + ".absmax is missing",)),  # bitsandbytes packs the tower too
    "absmax short": Case(replaced(QUERY + ".absmax", lambda t: t[:-1]), (SINGLE, QUERY + ".absmax", "[255]", "[256]")),
    "absmax of the experts short": Case(
        replaced(GATE_UP + ".absmax", lambda t: t[:-1]), (SINGLE, GATE_UP + ".absmax", "[5, 128, 2]", "[6, 128, 2]")
    ),
    "absmax 2-D": Case(replaced(QUERY + ".absmax", lambda t: t.view(2, -1)), (SINGLE, QUERY, "[2, 128]", "[256]")),
    "absmax missing": Case(without(QUERY + ".absmax"), (QUERY + ".absmax is missing",)),
    "absmax in F16": Case(replaced(QUERY + ".absmax", torch.Tensor.half), (SINGLE, QUERY + ".absmax has dtype F16")),
    "another table": Case(filled(0.1, QUERY + ".quant_map", at=(3,)), (SINGLE, QUERY + ".quant_map", "NF4"), False),
    "table in F16": Case(replaced(QUERY + ".quant_map", torch.Tensor.half), (SINGLE, QUERY + ".quant_map", "F16")),
    "table short": Case(
        replaced(QUERY + ".quant_map", lambda t: t[:15]), (SINGLE, QUERY + ".quant_map", "[15]", "[16]")
    ),
    "table missing": Case(without(QUERY + ".quant_map"), (QUERY + ".quant_map is missing",)),
    "state missing": Case(without(STATE), (STATE + " is missing",)),
    "state of fp4": Case(
        renamed(STATE, STATE[:-3] + "fp4"), (STATE + " is missing", STATE[:-3] + "fp4", "1 missing, 1 unknown")
    ),
    "state no JSON": Case(state("oops"), (SINGLE, STATE, "no JSON object"), False),
    "state no text": Case(state(b"\xff\xfe\0"), (SINGLE, STATE, "no JSON object"), False),
    "state empty": Case(state(b""), (SINGLE, STATE, "no JSON object"), False),
    "state a list": Case(state("[]"), (SINGLE, STATE, "no JSON object"), False),
    "state null": Case(state("null"), (SINGLE, STATE, "no JSON object"), False),
    "state nested deeply": Case(state("[" * 2000 + "]" * 2000), (SINGLE, STATE, "no JSON object"), False),
    "state with a deep type": Case(
        state('{"quant_type": ' + "[" * 900 + "]" * 900 + "}"), (SINGLE, STATE, "quant_type [[["), False
    ),
    "state with a long number": Case(
        state('{"quant_type": ' + "9" * 4050 + "}"), (SINGLE, STATE, "quant_type 999"), False
    ),
    "state of another shape": Case(state(shape=[64, 256]), (SINGLE, STATE, "shape [64, 256]", "[128, 128]"), False),
    "state without shape": Case(state(shape=None), (SINGLE, STATE, "shape None", "[128, 128]"), False),
    "state of another block": Case(state(blocksize=128), (SINGLE, STATE, "blocksize 128", "64"), False),
    "state of another type": Case(state(quant_type="fp4"), (SINGLE, STATE, "quant_type fp4", "nf4"), False),
    "state very long": Case(state(" " * 5000), (SINGLE, STATE, "[5000]")),
    "state 2-D": Case(replaced(STATE, lambda t: t.view(1, -1)), (SINGLE, STATE, "[1, ")),
    "state 0-D": Case(replaced(STATE, lambda t: t[0]), (SINGLE, STATE, "shape []")),
    "state in I8": Case(replaced(STATE, lambda t: t.view(I8)), (SINGLE, STATE, "I8", "U8")),
    "codes short": Case(replaced(QUERY, lambda t: t[:-1]), (SINGLE, QUERY, "[8191, 1]", "[8192, 1]")),
    "codes lying down": Case(replaced(QUERY, lambda t: t.view(1, -1)), (SINGLE, QUERY, "[1, 8192]", "[8192, 1]")),
    "codes in I8": Case(replaced(QUERY, lambda t: t.view(I8)), (SINGLE, QUERY + " has dtype I8", "U8")),
    "codes as BF16": Case(
        said(bnb_4bit_quant_storage="bfloat16"), ("config.json", "bnb_4bit_quant_storage 'bfloat16'")
    ),
    "experts 2-D": Case(replaced(GATE_UP, lambda t: t.view(-1, 1)), (SINGLE, GATE_UP, "[49152, 1]", "[6, 128, 64]")),
    "8 bit": Case(said(load_in_8bit=True, load_in_4bit=False), ("config.json", "load_in_8bit True", "NF4")),
    "8 and 4 bit": Case(said(load_in_8bit=True), ("config.json", "load_in_8bit True", "NF4")),
    "neither": Case(said(load_in_4bit=False), ("config.json", "load_in_4bit False", "NF4")),
    "fp4": Case(said(bnb_4bit_quant_type="fp4"), ("quant_state.bitsandbytes__fp4 is missing", "20 unknown")),
    "no type": Case(said(bnb_4bit_quant_type=None), ("quant_state.bitsandbytes__fp4 is missing", "20 unknown")),
    "blocks of 128": Case(said(bnb_4bit_blocksize=128), ("config.json", "bnb_4bit_blocksize 128", "64")),
    "double a text": Case(said(bnb_4bit_use_double_quant="false"), ("config.json", "use_double_quant 'false'")),
    "below the encoder's name": Case(renamed(QUERY, ENCODER_QUERY), (QUERY + " is missing", ENCODER_QUERY)),
    "modelopt's file beside it": Case(
        written("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}'),
        ("hf_quant_config.json", "'NVFP4'", "config.json", "stale"),
    ),
    "says nothing": Case(unsaid, (SINGLE, "not part of the model")),
    "modelopt said": Case(
        config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ("weight_scale is missing", "unknown"),
    ),
    "plain, with its absmax": Case(
        replaced(QUERY, lambda t: torch.zeros(128, 128).bfloat16()), (SINGLE, QUERY + ".", "not part of the model")
    ),
    "rows of 96": Case(text_config(intermediate_size=96), ("rows of 96 in", "mlp.down_proj", "block of 64")),
}

SIMPLE: dict[str, Case] = {
    "double said": Case(said(bnb_4bit_use_double_quant=True), ("nested_absmax is missing", "40 of 167")),
    **{
        f"absmax {value}": Case(
            filled(value, GATE_UP + ".absmax", at=(2, 3, 1)),
            (SINGLE, f"{GATE_UP}.absmax holds {value} at [2, 3, 1]"),
            False,
        )
        for value in (math.nan, -1.0, math.inf)
    },
}

DOUBLE: dict[str, Case] = {
    "single said": Case(said(bnb_4bit_use_double_quant=False), (SINGLE, "nested_absmax is not part", "40 such")),
    "absmax not in U8": Case(replaced(QUERY + ".absmax", torch.Tensor.float), (SINGLE, QUERY + ".absmax", "F32", "U8")),
    "nested absmax missing": Case(without(QUERY + ".nested_absmax"), (QUERY + ".nested_absmax is missing",)),
    "nested absmax short": Case(
        replaced(GATE_UP + ".nested_absmax", lambda t: t[:-1]), (SINGLE, GATE_UP + ".nested_absmax", "[5]", "[6]")
    ),
    **{
        f"nested absmax {value}": Case(
            filled(value, GATE_UP + ".nested_absmax", at=(1,)),
            (SINGLE, f"{GATE_UP}.nested_absmax holds {value} at [1]"),
            False,
        )
        for value in (math.nan, -1.0, math.inf)
    },
    "nested table nan": Case(
        filled(math.nan, GATE_UP + ".nested_quant_map", at=(1,)),
        (SINGLE, GATE_UP + ".nested_quant_map", "finite"),
        False,
    ),
    "nested table short": Case(
        replaced(GATE_UP + ".nested_quant_map", lambda t: t[:-1]), (SINGLE, ".nested_quant_map", "[255]", "[256]")
    ),
    "nested blocks of 128": Case(state(nested_blocksize=128), (SINGLE, STATE, "nested_blocksize 128", "256"), False),
    "nested in half": Case(state(nested_dtype="float16"), (SINGLE, STATE, "nested_dtype float16", "float32"), False),
    **{
        f"offset {text}": Case(state(offset=text), (SINGLE, STATE, f"nested_offset {shown}", "a number"), False)
        for text, shown in (
            ("null", "None"),
            ('"x"', "x"),
            ("Infinity", "inf"),
            ("NaN", "nan"),
            ("1e999", "inf"),
            ("1e39", "1e+39"),
            ("-0.5", "-0.5"),
            ("[1]", "[1]"),
            ("true", "True"),
        )
    },
}

ANY: dict[str, Case] = {
    "cut": Case(cut(SINGLE, -10), (SINGLE, "truncated")),
    "cut in the header": Case(cut(SINGLE, 500), (SINGLE, "header length")),
    "empty": Case(cut(SINGLE, 0), (SINGLE, "header length 0", "0 bytes")),
    "overlapping offsets": Case(overlapping, (SINGLE, "starts at byte")),
    "a shard missing": Case(index_to_a_missing_shard, ("model-00002-of-00002.safetensors", "no such file")),
    "index and single file": Case(written(INDEX, '{"weight_map": {"a": "b"}}'), (SINGLE, INDEX, "stale")),
    "no config": Case(removed("config.json"), ("config.json", "no such file")),
    "no tokenizer": Case(removed("tokenizer.json"), ("tokenizer.json", "no such file"), False),
    "vision extra": Case(
        added("model.encoder.vision_tower.surprise", torch.zeros(2)), (SINGLE, "vision_tower.surprise", "not part")
    ),
    "norm in F64": Case(replaced(NORM, torch.Tensor.double), (SINGLE, NORM + " has dtype F64", "BF16")),
    "norm in F8": Case(replaced(NORM, lambda t: t.to(torch.float8_e4m3fn)), (SINGLE, NORM, "F8_E4M3", "BF16")),
    "norm nan": Case(filled(math.nan, NORM, at=(3,)), (NORM, "not finite"), False),
}

CASES = [
    pytest.param(recipe, case, id=f"{recipe}-{name}")
    for recipes, cases in (
        (("nvfp4",), NVFP4), (("bnb4", "bnb4-dq"), BNB), (("bnb4",), SIMPLE), (("bnb4-dq",), DOUBLE),
        (("nvfp4", "bnb4-dq"), ANY),
    )
    for recipe in recipes
    for name, case in cases.items()
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "case"), CASES)
def test_a_broken_artifact(recipe: str, case: Case, good: Path) -> None:
    path = shutil.copytree(good / recipe, good / "broken" / recipe)
    try:
        case.change(path)
        commands = [("run", path, "hi", *RUN)] + ([("inspect", path)] if case.headers else [])
        for command in commands:
            line = fails(path.parent, *command)
            assert len(line) < 700
            for part in (str(path), *case.expected):
                assert part in line, line
        if not case.headers:
            assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 0
    finally:
        shutil.rmtree(path.parent)


SOUND: dict[str, tuple[str, Change]] = {
    "hf_quant_config.json alone": ("nvfp4", unsaid),
    "config.json alone": ("nvfp4", removed("hf_quant_config.json")),
    "a layer's experts plain": ("nvfp4", plain(EXPERTS)),
    "no input_scale, as modelopt leaves it out": ("nvfp4", without(DOWN + "input_scale")),
    "no vision tower": ("nvfp4", tensors(lambda found: [found.pop(name) for name in list(found) if "vision" in name])),
    "a block of zeros": ("nvfp4", scale_code(UP + "weight_scale", 0)),
    "a Linear plain": ("bnb4", plain(QUERY)),
    "a state without padding": ("bnb4-dq", state(nested_offset=0.5)),
    "another nested table": ("bnb4-dq", filled(0.5, GATE_UP + ".nested_quant_map", at=(1,))),
    "tokens as bytes of a prompt need no config": ("bnb4", removed("tokenizer_config.json")),
    "dgq.json of other files": ("bnb4", config("dgq.json", files={"other": {}})),
    "no dgq.json": ("bnb4", removed("dgq.json")),
}


@pytest.mark.parametrize("name", SOUND)
def test_odd_but_sound(name: str, good: Path, tmp_path: Path) -> None:
    recipe, change = SOUND[name]
    path = shutil.copytree(good / recipe, tmp_path / recipe)
    change(path)
    found = works(path)
    assert found["kind"] == FORMATS[recipe]
    if "plain" in name:
        whole = works(good / recipe)
        changed = {n for n, scheme in found["tensors"].items() if scheme != whole["tensors"][n]}
        assert changed == ({QUERY} if recipe == "bnb4" else {GATE_UP, EXPERTS + "down_proj"})
    assert (found["provenance"] is None) == ("dgq.json" in name)


# --- conversions ----------------------------------------------------------------------------------------------------

RECIPE = """
name = "mine"
format = "{}"
label = "M"
description = "mine"
max_16bit_share = 1
{}
[[rule]]
match = "*"
scheme = "bf16"
"""


def rule(match: str, scheme: str, more: str = "") -> str:
    return f'[[rule]]\nmatch = "{match}"\nscheme = "{scheme}"\n{more}\n'


def recipe_file(path: Path, to: str, *rules: str) -> Path:
    path.write_text(RECIPE.format(to, "".join(rules)))
    return path


def edited(good: Path, out: Path, change: Callable[[Tensors], Any]) -> Path:
    """The checkpoint in one file, its tensors changed."""
    shutil.copytree(good / "source", out, ignore=shutil.ignore_patterns("*.safetensors*"))
    found: Tensors = {}
    for file in (good / "source").glob("*.safetensors"):
        found |= load_file(file)
    change(found)
    save_file(found, out / SINGLE)
    return out


def micro(path: Path, **text: int) -> Path:
    settings = micro_config()
    settings["text_config"] |= text
    return write_micro(path, settings, micro_tensors(settings), shards=0)


@pytest.mark.parametrize("recipe", FORMATS)
def test_an_artifact_is_no_source(recipe: str, good: Path, tmp_path: Path) -> None:
    for command in (("plan",), ("convert", "-o", tmp_path / "new" / "out")):
        for to in ("gguf", "nvfp4", "bnb4"):
            line = fails(tmp_path, command[0], good / recipe, "--to", to, *command[1:])
            method = {"nvfp4": "modelopt", "bnb4": "bitsandbytes"}[FORMATS[recipe]]
            assert f"{recipe}/config.json: already quantised ('{method}')" in line


def test_an_artifact_of_several_files(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the same tensors as one file does; a damaged or missing shard is named."""
    monkeypatch.setattr("dgq.convert.write.artifact_files.shards", partial(shards, limit=200_000))
    out = convert(good / "source", tmp_path / "out", "nvfp4-w4a16")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and len(works(out)["tensors"]) == 67
    held = [load_file(file) for file in files]
    whole = load_file(good / "nvfp4-w4a16" / SINGLE)
    assert sum(map(len, held)) == len(whole)
    for name, tensor in (item for shard in held for item in shard.items()):
        assert torch.equal(tensor.flatten().view(U8), whole[name].flatten().view(U8)), name
    name = next(iter(held[1]))
    save_file({n: t for n, t in held[1].items() if n != name}, files[1])
    assert f"says {name} is in {files[1].name}, but that file does not hold it" in fails(out, "inspect", out)
    files[1].unlink()
    assert f"{files[1].name}: no such file" in fails(out, "run", out, "hi")


def test_rows_that_no_block_fits(tmp_path: Path) -> None:
    narrow = micro(tmp_path / "narrow", moe_intermediate_size=24)
    for source, to, number, name, block in (
        (GOLDEN, "bnb4", 160, "model.decoder.layers.0.mlp.down_proj.weight", "nf4's block of 64"),
        (narrow, "nvfp4", 24, "model.decoder.layers.0.experts.down_proj", "nvfp4's block of 16"),
    ):
        for command in (("plan",), ("convert", "-o", tmp_path / "new" / "out")):
            line = fails(tmp_path, command[0], source, "--to", to, *command[1:])
            assert f"rows of {number} in {name} are no multiple of {block}" in line


@pytest.mark.parametrize("value", ("0", "-1", "-0.0", "nan", "inf", "1e-60", "1e60", "abc", "", "0x10"))
def test_input_scales_that_are_none(value: str, good: Path, tmp_path: Path) -> None:
    line = fails(tmp_path, "convert", good / "source", "--to", "nvfp4", "-o", tmp_path / "out", "--input-scale", value)
    assert f"--input-scale {value!r}: expected 'calibrate' or a number above 0" in line


def test_input_scales_that_nothing_stores(good: Path, tmp_path: Path) -> None:
    for to, recipe in (("nvfp4", "nvfp4-w4a16"), ("bnb4", "bnb4"), ("gguf", "q4_k_m")):
        arguments = ("--to", to, "--recipe", recipe, "-o", tmp_path / "out", "--input-scale", "1")
        line = fails(tmp_path, "convert", good / "source", *arguments)
        assert f"--input-scale: recipe {recipe} stores no input scales" in line
    for recipe in ("nvfp4-w4a16", "bnb4"):
        line = fails(good / recipe, "run", good / recipe, "hi", "--activations", "nvfp4")
        assert f"{recipe}: holds no input scales" in line and "--activations nvfp4" in line


@pytest.mark.parametrize(
    ("to", "rules", "expected"),
    [
        ("nvfp4", rule("*.self_attn.q_proj.weight", "nvfp4"), "no place for model.decoder.layers.0.self_attn.q_proj"),
        ("nvfp4", rule("model.decoder.norm.weight", "nvfp4"), f"nvfp4 has no place for {NORM} [128] as nvfp4"),
        ("nvfp4", rule("*.embed_tokens.weight", "nvfp4"), "no place for model.decoder.embed_tokens.weight [512, 128]"),
        ("nvfp4", rule("*vision*.q_proj.linear.weight", "nvfp4"), "no place for model.encoder.vision_tower."),
        ("nvfp4", rule("*.layer_scalar", "nvfp4"), "rows of 1 in model.decoder.layers.0.layer_scalar"),
        ("bnb4", rule("model.decoder.norm.weight", "nf4"), f"bnb4 has no place for {NORM} [128] as nf4"),
        ("bnb4", rule("*.embed_tokens.weight", "nf4"), "bnb4 has no place for model.decoder.embed_tokens.weight"),
        ("bnb4", rule("*.q_proj.weight", "nf4") + rule("*.k_proj.weight", "nf4_dq"), "either nf4 or nf4_dq throughout"),
        ("bnb4", rule("*.q_proj.weight", "nf4", 'more_bits = "nf4_dq"'), "either nf4 or nf4_dq throughout"),
        ("bnb4", rule("*.q_proj.weight", "nvfp4"), "bnb4 has no scheme 'nvfp4'"),
        ("nvfp4", rule("*.experts.*", "nf4"), "nvfp4 has no scheme 'nf4'"),
        ("nvfp4", "", "leaves model.decoder.layers.0.experts.gate_up_proj in 16 bit"),
        ("nvfp4", rule("*.0.experts.*", "nvfp4"), "leaves model.decoder.layers.1.experts.gate_up_proj in 16 bit"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(to: str, rules: str, expected: str, good: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path / "mine.toml", to, rules)
    for command in (("plan",), ("convert", "-o", tmp_path / "new" / "out")):
        line = fails(tmp_path, command[0], good / "source", "--to", to, "--recipe", recipe, *command[1:])
        assert expected in line and "mine" in line


@pytest.mark.parametrize(
    ("recipe", "value", "expected"),
    [
        ("bnb4-dq", 1e31, "holds a weight of 9.983e+30, nf4 holds 1e+30 at most"),
        ("bnb4", math.nan, "holds nan at [2, 5, 7]"),
        ("bnb4-dq", math.inf, "holds inf at [2, 5, 7]"),
        ("nvfp4-w4a16", math.nan, "holds nan at [2, 5, 7]"),
        ("nvfp4-w4a16", -math.inf, "holds -inf at [2, 5, 7]"),
    ],
)
def test_weights_that_cannot_be_stored(recipe: str, value: float, expected: str, good: Path, tmp_path: Path) -> None:
    source = edited(good, tmp_path / "in", lambda found: found[EXPERTS + "down_proj"].__setitem__((2, 5, 7), value))
    arguments = ("--to", FORMATS[recipe], "--recipe", recipe, "-o", tmp_path / "new" / "out")
    assert f"{SINGLE}: {EXPERTS}down_proj {expected}" in fails(tmp_path, "convert", source, *arguments)


@pytest.mark.parametrize("recipe", FORMATS)
def test_float_checkpoints(recipe: str, good: Path, tmp_path: Path) -> None:
    """Of the same values they give the same tensors, with a notice; what BF16 cannot hold is refused."""
    source = edited(good, tmp_path / "in", lambda found: found.update({n: t.float() for n, t in found.items()}))
    arguments = ("--to", FORMATS[recipe], "--recipe", recipe, "-o", tmp_path / "out")
    scale = ("--input-scale", "0.01") if recipe == "nvfp4" else ()
    result = CliRunner().invoke(main, ["convert", str(source), *map(str, arguments), *scale])
    assert result.exit_code == 0 and "67 of 67 tensors are F32, not BF16" in result.stderr, result.output
    kept = 63 if FORMATS[recipe] == "nvfp4" else 47
    assert f"note: {kept} of them are stored as BF16, rounded" in result.stderr
    assert (tmp_path / "out" / SINGLE).read_bytes() == (good / recipe / SINGLE).read_bytes()
    filled(3.4028e38, NORM, at=(3,))(source)
    shutil.rmtree(tmp_path / "out")
    line = fails(tmp_path, "convert", source, *arguments, *scale)
    assert f"{NORM} holds a weight of 3.403e+38, bf16 holds 3.38953e+38 at most" in line


def test_calibration_without_a_tokenizer(good: Path, tmp_path: Path) -> None:
    source = edited(good, tmp_path / "in", lambda found: None)
    (source / "tokenizer.json").unlink()
    arguments = ("convert", source, "--to", "nvfp4", "-o", tmp_path / "out")
    line = fails(tmp_path, *arguments)
    assert "tokenizer.json: no such file" in line and "--input-scale" in line
    assert CliRunner().invoke(main, [*map(str, arguments), "--input-scale", "0.01"]).exit_code == 0


@pytest.mark.parametrize("recipe", FORMATS)
def test_importance_that_nothing_uses(recipe: str, good: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "im.gguf", "imatrix")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_tensor(EXPERTS + "down_proj.in_sum2", np.full((6, 64), 5, np.float32))
    writer.add_tensor(EXPERTS + "down_proj.counts", np.ones((6, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for imatrix in (tmp_path / "im.gguf", GOLDEN / "reference.imatrix.gguf"):
        arguments = ("--to", FORMATS[recipe], "--recipe", recipe, "--imatrix", imatrix, "-o", tmp_path / "out")
        line = fails(tmp_path, "convert", good / "source", *arguments)
        assert "--imatrix" in line and recipe in line


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (NORM, math.nan, f"{NORM} holds"),
        ("model.decoder.layers.1.pre_feedforward_layernorm_2.weight", 3e38, "though every weight is"),
    ],
)
def test_calibration_that_ends_in_no_numbers(
    name: str, value: float, expected: str, good: Path, tmp_path: Path
) -> None:
    """By a weight that is none, which is named, and by weights that are."""
    source = edited(good, tmp_path / "in", lambda found: found[name].fill_(value))
    line = fails(tmp_path, "convert", source, "--to", "nvfp4", "-o", tmp_path / "out")
    assert str(source) in line and expected in line


@pytest.mark.parametrize(
    "keys",
    [
        {"input_scales": {"x": 1}}, {"input_scales": {"method": "calibrated"}}, {"imatrix": {"x": 1}},
        {"input_scales": {"method": "given", "value": "x"}}, {"source": {"repository": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_provenance_that_is_damaged(keys: dict[str, Any], good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good / "nvfp4", tmp_path / "out")
    config("dgq.json", **keys)(path)
    line = fails(path, "inspect", path)
    assert "dgq.json" in line and next(iter(keys)) in line


@pytest.mark.parametrize("recipe", ("nvfp4-w4a16", "bnb4"))
def test_vision_with_bounds(recipe: str, good: Path, tmp_path: Path) -> None:
    """Tensors of no dimension."""
    raw = json.loads((good / "source" / "config.json").read_text())
    raw["vision_config"]["use_clipped_linears"] = True
    bounds = {n: torch.tensor(1.0).bfloat16() for n, shape in expected_vision(raw, 128, "").items() if shape == ()}
    source = edited(good, tmp_path / "in", lambda found: found.update(bounds))
    (source / "config.json").write_text(json.dumps(raw))
    out = convert(source, tmp_path / "out", recipe)
    assert len(bounds) == 28 and works(out)
    found = load_file(out / SINGLE)
    assert all(torch.equal(found[name], bound) for name, bound in bounds.items())


def test_double_quantisation_of_some(good: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path / "mine.toml", "bnb4", rule("*.experts.*", "bf16", 'more_bits = "nf4_dq"'))
    assert "nf4_dq" in works(convert(good / "source", tmp_path / "out", recipe, "bnb4"))["by_scheme"]


def test_a_recipe_that_quantises_nothing(good: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path / "mine.toml", "bnb4")
    assert "mine" in fails(tmp_path, "plan", good / "source", "--to", "bnb4", "--recipe", recipe)


def test_text_that_is_no_unicode(good: Path, tmp_path: Path) -> None:
    """A lone surrogate in config.json, of which JSON allows to speak."""
    source = edited(good, tmp_path / "in", lambda found: None)
    config(note="\ud800")(source)
    works(convert(source, tmp_path / "out", "bnb4"))


def test_vision_layers_without_end(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good / "bnb4", tmp_path / "out")
    section("vision_config", num_hidden_layers=5000)(path)
    assert "vision_config.num_hidden_layers is 5000" in fails(path, "inspect", path)


def test_a_token_that_is_no_unicode(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good / "bnb4", tmp_path / "out")
    config("tokenizer_config.json", bos_token="\ud800")(path)
    assert "tokenizer_config.json" in fails(path, "run", path, "hi", *RUN)


# --- fuzz -----------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 64, 32, 128, 256, 2**31 - 1, 2**31, 2**47, 2**64, 10**30, 0.5, -0.0, 1e308,
    math.nan, math.inf, "", "x", "nf4", "NVFP4", "FP8", "modelopt", "bitsandbytes", "\ud800", "\0", "a\nb", "U8", "F32",
    "F8_E4M3", "BF16", [], {}, [1], [[]], {"a": 1}, [0, 0], [128, 64], "..", "true",
]  # fmt: skip


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def mutate(data: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(list(places(data)) or [({"": data}, "")])
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(ODD)
    return data


def damage(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        found[rng.randrange(len(found))] = rng.choice((0, 255, *b'"09,{[', rng.randrange(256)))
    return bytes(found[: rng.randrange(len(found))] if rng.random() < 0.1 else found)


def fuzzed(path: Path, rng: random.Random) -> tuple[Path, bytes]:
    """A file of the artifact, and what to put there instead."""
    file = rng.choice([path / SINGLE, path / SINGLE, *path.glob("*config.json")])
    data = file.read_bytes()
    if file.name != SINGLE:
        text = json.dumps(mutate(json.loads(data), rng)).encode()
        return file, damage(data, rng) if rng.random() < 0.4 else text
    header, payload = read_header(data)
    raw = data[: len(data) - len(payload)]
    states = [name for name in header if "quant_state" in name]
    kind = rng.randrange(5 if states else 3)
    if kind == 0:
        return file, damage(raw, rng) + payload
    if kind == 1:
        return file, with_header(mutate(header, rng), payload)
    if kind == 2:
        return file, raw + damage(payload, rng)
    start, stop = header[rng.choice(states)]["data_offsets"]
    text = json.dumps(mutate(json.loads(payload[start:stop]), rng)).encode()[: stop - start]
    new = damage(payload[start:stop], rng)[: stop - start] if kind == 3 else text
    return file, raw + payload[:start] + new.ljust(stop - start) + payload[stop:]


@pytest.mark.parametrize("recipe", FORMATS)
def test_fuzz(recipe: str, good: Path, tmp_path: Path) -> None:
    """Opening and loading ends well or in an InputError of one line, soon. (30,000 cases were run by hand.)"""
    path = shutil.copytree(good / recipe, tmp_path / recipe)
    rng = random.Random(recipe)
    refused = 0
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took 10 seconds"))
    for number in range(100):
        file, data = fuzzed(path, rng)
        before = file.read_bytes()
        file.write_bytes(data)
        signal.alarm(10)
        try:
            artifact = open_artifact(path)
            artifact.weights.everything()
            artifact.load()
        except InputError as error:
            refused += 1
            assert str(error).isprintable() or "\ud800" in str(error), number
        finally:
            signal.alarm(0)
        file.unlink()  # what was mapped keeps its bytes
        file.write_bytes(before)
    assert 32 < refused < 96
