"""`dgq calibrate` and `convert --stats`: sums held against the whole model's, resume, processes, errors, artifacts."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from gguf import GGUFReader
from micro import micro_config, micro_tensors, write_micro
from others import DECODED
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgq.convert.calibration import calibrate, imatrix
from dgq.convert.calibration.stats import FLOOR, WATCHED, coverage, read_stats
from dgq.convert.cli.__main__ import main
from dgq.convert.layerwise import passes, samples
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.passes import Rows
from dgq.convert.layerwise.samples import BINS, chunks, conditioned, documents, doubled
from dgq.convert.layerwise.stream import Stream
from dgq.convert.plans.plan import make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.models import open_model
from dgq.convert.write import pipeline, refine
from dgq.convert.write.refine import LEAN, Hessians
from dgq.convert.write.settings import ConversionSettings
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import HFDir
from dgq.quant.files.imatrix import read_imatrix
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.files.tokenizer import Tokenizer
from dgq.runtime.model import layers
from dgq.runtime.model.model import Model
from dgq.runtime.shape.names import EMBEDDING

pytestmark = pytest.mark.usefixtures("few_steps")
PROMPTS = [
    {"text": "the king went to the wind and the apple of the door was in the house of the king for a day " * 3},
    {"messages": [{"role": "user", "content": "say apple"}, {"role": "assistant", "content": "apple"}]},
    {"messages": [{"role": "user", "content": "say wind"}]},
]


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that every scheme takes, inputs of both sides past the sliding window."""
    config = micro_config()
    config["text_config"] |= {
        "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 64,
        "sliding_window": 8,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("micro") / "model"
    write_micro(path, config)
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return path


def _calibrate(micro: Path, out: Path, *more: object, people: bool = False) -> Result:
    options = ("--prompts", micro / "prompts.jsonl", "--rounds", 2, "--device", "cpu", *([] if people else ["--json"]))
    return dgq("calibrate", micro, "-o", out, *options, *more)


@pytest.fixture(scope="module")
def stats(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats"
    result = _calibrate(micro, out)
    assert result.exit_code == 0, result.output
    return out


def test_a_stream_is_the_model(micro: Path) -> None:
    """Layer by layer, a chunk at a time: the logits of the whole model, plain and conditioned."""
    source = open_source(str(micro))
    found, _ = documents(source, micro / "prompts.jsonl")
    chunk = chunks([d for d in found if not d.open], 1, 0, source)[0]
    stream, model = (kind(source.config, source, "cpu", torch.float32) for kind in (Stream, Model))
    soft: torch.Tensor | None = None
    plain: list[torch.Tensor] = []
    for turn in range(2):
        x = stream.enter(chunk, soft)
        for index in range(2):
            x = stream.layer(index)(chunk, x)
        logits = torch.cat([rows for _, rows in stream.leave(chunk, x)])
        for i, owner in enumerate(chunk.owner):
            cache = model.new_cache(1)
            model.encode(torch.tensor([chunk.prompts[owner]]), cache)
            wanted = model.decode(chunk.canvases[i : i + 1], cache, plain[i] if turn else None)
            torch.testing.assert_close(logits[i : i + 1], wanted, atol=2e-5, rtol=1e-4)
            plain.append(wanted)
        soft = stream.soften(logits)


def test_sums_are_those_of_the_whole_model(micro: Path, stats: Path) -> None:
    source = open_source(str(micro))
    found = read_stats(stats, source)
    sums: dict[Any, Any] = defaultdict(lambda: 0)
    counts: dict[Any, int] = defaultdict(int)
    most: dict[Any, float] = defaultdict(float)
    side = 0

    def see(name: str, x: torch.Tensor, y: torch.Tensor, expert: int | None, _: object) -> torch.Tensor:
        if name.endswith(WATCHED):
            x = x.reshape(-1, x.shape[-1]).double()
            sums[name, expert, side] = sums[name, expert, side] + x.square().sum(0)
            counts[name, expert, side] += len(x)
            most[name, expert, side] = max(most[name, expert, side], float(x.abs().amax()) if len(x) else 0.0)
        return y

    model = Model(source.config, source, "cpu", torch.float32, observe=see)
    for chunk in found.chunks:
        for number, prompt in enumerate(chunk.prompts):
            cache, side = model.new_cache(1), 0
            model.encode(torch.tensor([prompt]), cache)
            side = 1
            for i, owner in enumerate(chunk.owner):
                if owner == number:
                    model.decode(chunk.canvases[i : i + 1], cache, model.decode(chunk.canvases[i : i + 1], cache))
    seen = {name for name, _, _ in sums}
    assert seen <= {key.removesuffix(".sum2") for key in found.tensors if key.endswith(".sum2")} and len(seen) == 12
    for (name, expert, which), value in sums.items():
        at = () if expert is None else (expert,)
        torch.testing.assert_close(found.tensors[name + ".sum2"][(*at, which)].double(), value, rtol=1e-3, atol=1e-4)
        assert float(found.tensors[name + ".amax"][(*at, which)]) == pytest.approx(most[name, expert, which], rel=1e-4)
        kinds = found.tensors[name + ".count"][at or ...]
        assert int(kinds[0] if which == 0 else kinds[1:].sum()) == counts[name, expert, which]


def test_drafts_are_the_models_own(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise behind the end of an open document, then what the whole model makes of it, conditioned on itself."""
    monkeypatch.setattr(passes, "LONGEST", 12)
    source = open_source(str(micro))
    found, _ = documents(source, micro / "prompts.jsonl")
    stream, model = (kind(source.config, source, "cpu", torch.float32) for kind in (Stream, Model))
    entered: list[tuple[Chunk, torch.Tensor | None]] = []
    real = stream.enter
    monkeypatch.setattr(stream, "enter", lambda chunk, soft: entered.append((chunk, soft)) or real(chunk, soft))
    done = passes.drafted(stream, found, 5, lambda: None)
    (number,) = (i for i, document in enumerate(found) if document.open)
    canvas = torch.randint(0, source.config.vocab, (1, 16), generator=torch.Generator().manual_seed(5))
    cache, logits = model.new_cache(1), None
    model.encode(torch.tensor([found[number].ids[-12:]]), cache)
    for chunk, soft in entered:
        assert chunk.prompts == (found[number].ids[-12:],) and torch.equal(chunk.canvases, canvas)
        assert (soft is None) == (logits is None)
        if soft is not None and logits is not None:
            torch.testing.assert_close(soft, stream.soften(logits), rtol=1e-3, atol=1e-3)
        logits = model.decode(canvas, cache, logits)
        canvas = logits.argmax(-1)
    assert len(entered) == passes.DRAFTS
    assert len(found[number].ids) > 12 and done[number].ids == (*found[number].ids, *canvas[0].tolist())
    assert [d for i, d in enumerate(done) if i != number] == [d for i, d in enumerate(found) if i != number]


def test_the_embedding_is_a_table_too(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns count by what goes into the head, and all alike for those who read rows of it."""
    seen: dict[str, torch.Tensor] = {}

    def quantised(inputs: torch.Tensor, outputs: Any, scheme: Any, sweeps: int, pool: Any, weight: torch.Tensor) -> Any:
        seen[tensor.name] = inputs
        return scheme.quantize(weight)

    monkeypatch.setattr(refine, "_few_at_once", quantised)
    plan = make_plan(open_source(str(micro)), find_recipe("gguf"))
    for tensor in plan.tensors:
        if tensor.name in ("token_embd.weight", "blk.0.attn_q.weight"):
            hessian = torch.diag(torch.arange(256.0)).unsqueeze(0)
            sense: Any = SimpleNamespace(of=lambda name, part, h=hessian: (h, None))
            list(refine._quantised(plan, tensor, slice(0, 1), sense, ConversionSettings("standard"), None, None))
    assert torch.equal(seen["blk.0.attn_q.weight"][0].diagonal(), torch.arange(256.0))
    assert torch.equal(seen["token_embd.weight"][0].diagonal(), torch.arange(256.0) + 127.5)


def test_samples_cover_noise_and_conditioning(micro: Path, stats: Path) -> None:
    found = read_stats(stats, open_source(str(micro)))
    count = found.tensors[EMBEDDING + ".count"]
    assert int(count[0]) == 0 and bool((count[1 : 1 + BINS] == count[1 + BINS :]).all()) and bool((count[1:] > 0).all())
    chunk = found.chunks[0]
    both = doubled(chunk)
    soft = conditioned(chunk, torch.arange(1.0, 1 + len(chunk.owner)).view(-1, 1, 1).expand(-1, 16, 4))
    assert sorted(both.owner) == list(both.owner)
    for i, kind in enumerate(both.kind.tolist()):
        twin = [j for j in range(len(chunk.owner)) if torch.equal(chunk.canvases[j], both.canvases[i])]
        assert any(soft[i, 0, 0] == (j + 1 if kind > BINS else 0) for j in twin)


def test_a_broken_off_calibration_goes_on(
    micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = passes.SamplePasses.layer, []

    def fail(self: passes.SamplePasses, index: int, watch: Any) -> None:
        calls.append(index)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, index, watch)

    monkeypatch.setattr(passes.SamplePasses, "layer", fail)
    out = tmp_path / "stats"
    assert _calibrate(micro, out).exit_code == 130 and not out.exists()
    result = _calibrate(micro, out)
    assert result.exit_code == 0 and "going on with" in result.stderr
    rounds = read_stats(out, open_source(str(micro))).about["rounds"]
    assert len(calls) == 2 * rounds + 1, "one layer again, and no more"
    assert out.read_bytes() == stats.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["stats"]


def test_two_processes_find_the_same(micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from dgq.convert.layerwise import samples; samples.CHUNK = 300\n"
        "from dgq.convert.cli.__main__ import main; main()"
    )
    (tmp_path / "small.py").write_text(code)
    arguments = ["calibrate", micro, "--prompts", micro / "prompts.jsonl", "--rounds", 2, "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    command = [*launch, tmp_path / "small.py", *arguments, "-o", tmp_path / "of2"]
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    monkeypatch.setattr(samples, "CHUNK", 300)
    assert dgq(*arguments, "-o", tmp_path / "of1").exit_code == 0
    one, two = (load_file(tmp_path / f"of{count}") for count in (1, 2))
    assert one.keys() == two.keys() and len(one["samples.chunks"]) > 2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=0.0, msg=name)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-all", "bnb4-dq", "q4_k_m"])
def test_artifacts_are_of_the_same_shape_and_others_read_them(
    recipe: str, micro: Path, stats: Path, tmp_path: Path
) -> None:
    to = recipe.split("-")[0] if recipe[0] != "q" else "gguf"
    common = ("convert", micro, "--to", to, "--recipe", recipe, "--device", "cpu")
    scale = ("--input-scale", "0.01") if recipe == "nvfp4" else ()
    for name, more in (
        ("stock", ("--effort", "stock", *scale)),
        ("fast", ("--effort", "fast", *scale)),
        ("standard", ("--stats", stats)),
        ("max", ("--effort", "max", "--stats", stats)),
    ):
        result = dgq(*common, "-o", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
        assert dgq("verify", tmp_path / name).exit_code == 0
    running = ("run", tmp_path / "max", "hi", "--max-new-tokens", 1, "--steps", 1, "--device", "cpu")
    assert dgq(*running).exit_code == 0
    plain, *others = (tmp_path / name for name in ("stock", "fast", "standard", "max"))
    fine = tmp_path / "standard"
    held = [
        b"".join(
            f.read_bytes() for f in sorted((tmp_path / name).glob("*.[gs]*")) if f.suffix in (".gguf", ".safetensors")
        )
        for name in ("fast", "standard", "max")
    ]
    assert len(set(held)) == 3, "each effort does something of its own"
    for path in others:
        if to == "gguf":
            read = [GGUFReader(next(each.glob("*.gguf"))).tensors for each in (plain, path)]
            specs = [{t.name: (t.shape.tolist(), t.tensor_type, t.data_offset) for t in each} for each in read]
        else:
            specs = [{n: (s.shape, s.dtype, s.start) for n, s in HFDir(each).specs.items()} for each in (plain, path)]
        assert specs[0] == specs[1]
        skipped = path.name == "fast" or recipe == "nvfp4-all" or (to == "nvfp4" and path.name != "max")
        if not skipped:  # modelopt takes its time to import, and -all is dgq's own layout
            weights, theirs = open_model(str(path)).weights, DECODED[to](path)
            for name in weights:
                assert torch.equal(theirs[name].view(weights[name].shape), weights[name].dequantize()), (
                    path.name,
                    name,
                )
    document = json.loads((fine / "dgq.json").read_text())
    assert document["effort"] == "standard" and document["calibration"]["data"]["name"] == "prompts.jsonl"


def test_conversions_with_stats_go_on(
    micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", micro, "--to", "gguf", "--stats", stats, "--device", "cpu", "-o")
    assert dgq(*command, tmp_path / "whole").exit_code == 0
    real, calls = refine.feedback, []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(refine, "feedback", fail)
    assert dgq(*command, tmp_path / "again").exit_code == 130
    result = dgq(*command, tmp_path / "again")
    assert result.exit_code == 0 and "going on with" in result.stderr
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_full_disk_is_known_before(micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states beside the artifact: what they take, a byte less, and nothing is begun."""
    source = open_source(str(micro))
    plan, used = make_plan(source, find_recipe("bnb4")), samples.used(read_stats(stats, source).chunks)
    tokens = sum(chunk.run_tokens for chunk in used)
    need = tokens * (2 + 2) * 256 * 4 + sum(tensor.nbytes for tensor in plan.tensors)
    monkeypatch.setattr(refine, "check_memory", lambda *_: (_ for _ in ()).throw(InputError("there is room")))
    for free, expected in ((need - 1, f"hidden states of {tokens} tokens"), (need, "there is room")):
        monkeypatch.setattr(refine, "free_bytes", lambda _, n=free: n)
        options = ("--to", "bnb4", "--stats", stats, "-o", tmp_path / "out", "--device", "cpu")
        result = dgq("convert", micro, *options)
        assert result.exit_code == 2 and expected in result.stderr, result.output
        assert not list(tmp_path.iterdir())


def test_starved_experts_are_named(micro: Path, tmp_path: Path) -> None:
    """The router of layer 0 is made to choose two experts only."""
    config = json.loads((micro / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in micro.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["model.decoder.layers.0.router.scale"] = torch.zeros_like(
        tensors["model.decoder.layers.0.router.scale"]
    )  # all scores equal: the same two win every time
    path = write_micro(tmp_path / "model", config, tensors)
    (path / "prompts.jsonl").write_text((micro / "prompts.jsonl").read_text())
    result = _calibrate(path, tmp_path / "stats")
    found = json.loads(result.stdout.splitlines()[-1])
    none = [name for name, seen in found["starved"].items() if seen == 0]
    assert len(none) == 2 and all(name.startswith("0.") for name in none)
    assert found["rounds"] == calibrate.MORE * 2, "it tried"
    result = dgq(
        "convert", path, "--to", "bnb4", "--stats", tmp_path / "stats", "-o", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "dgq.json").read_text())["calibration"]["starved"] == found["starved"]
    shown = [result.stdout, *(dgq("inspect", tmp_path / name).stdout for name in ("stats", "out"))]
    shown.append(_calibrate(path, tmp_path / "shown", people=True).stderr)
    for page in shown:
        assert f"{len(found['starved'])} experts saw fewer than {FLOOR} tokens" in page
        assert all(f"{name} ({seen})" in page for name, seen in found["starved"].items())
    (path / "asked.jsonl").write_text(json.dumps(PROMPTS[0]))
    options = ("--quick", "--prompts", path / "asked.jsonl", "-o", tmp_path / "report", "--device", "cpu")
    assert dgq("validate", tmp_path / "out", "--against", path, *options).exit_code in (0, 1)
    (one,) = json.loads((tmp_path / "report" / "report.json").read_text())["artifacts"]
    assert one["calibration"] == {"floor": FLOOR, "starved": found["starved"]}
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"out: {len(found['starved'])} experts saw fewer than {FLOOR} tokens" in page
    assert all(f"{name} ({seen})" in page for name, seen in found["starved"].items())


def test_imatrix(micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("stats", "is the name of STATS"), (f"../{tmp_path.name}/stats", "is the name of STATS"),
                           ("none/im.gguf", "there is no directory")):  # fmt: skip
        result = _calibrate(micro, tmp_path / "stats", "--imatrix", tmp_path / name)
        assert result.exit_code == 2 and expected in result.stderr and not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(imatrix, "write_imatrix", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _calibrate(micro, tmp_path / "stats", "--imatrix", tmp_path / "im.gguf").exit_code == 130
    assert not (tmp_path / "stats").exists(), "or the same command would be refused, and there be no imatrix"
    with monkeypatch.context() as patch:
        real = calibrate.export_once
        patch.setattr(calibrate, "export_once", lambda *given: (real(*given), 1 / 0))  # between the two
        assert isinstance(
            _calibrate(micro, tmp_path / "stats", "--imatrix", tmp_path / "im.gguf").exception, ArithmeticError
        )
    assert (tmp_path / "im.gguf").is_file() and not (tmp_path / "stats").exists()
    assert _calibrate(micro, tmp_path / "stats", "--imatrix", tmp_path / "im.gguf").exit_code == 0
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes()
    matrix = read_imatrix(tmp_path / "im.gguf")
    sums = load_file(stats)
    name = "model.decoder.layers.1.experts.gate_up_proj"
    wanted = sums[name + ".sum2"].sum(1) / sums[name + ".count"].sum(-1, keepdim=True)
    torch.testing.assert_close(matrix.weights["blk.1.ffn_gate_up_exps.weight"], wanted)
    assert torch.equal(matrix.weights["blk.0.attn_q.weight"], matrix.weights["blk.0.attn_k.weight"])
    assert {"token_embd.weight", "self_cond_up.weight", "blk.1.ffn_down_exps.weight"} <= matrix.weights.keys()
    out = tmp_path / "out"
    assert dgq("convert", micro, "--to", "gguf", "--imatrix", tmp_path / "im.gguf", "-o", out).exit_code == 0


@pytest.mark.parametrize("taken", ["stats", "im.gguf"])
def test_what_appears_meanwhile_stays(taken: str, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (micro, tmp_path / "stats", "--imatrix", tmp_path / "im.gguf")
    with monkeypatch.context() as patch:
        real = calibrate.sample_tensors
        patch.setattr(
            calibrate, "sample_tensors", lambda made: ((tmp_path / taken).write_text("precious"), real(made))[1]
        )
        result = _calibrate(*command)
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert (tmp_path / taken).read_text() == "precious"
    (tmp_path / taken).unlink()
    result = _calibrate(*command)
    assert result.exit_code == 0 and "going on with" in result.stderr and (tmp_path / "im.gguf").is_file()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("{", "line 1: no JSON"),
        ('{"text": 3}', "line 1: expected"),
        ('\n{"messages": []}', "line 2: expected"),
        ('{"messages": [{"role": "user"}]}', "line 1: expected"),
        ("", "holds no document"),
        ('{"text": "a \\ud800 b"}', "p.jsonl, line 1: "),
        ('\n{"messages": [{"role": "user", "content": "\\ud800"}]}', "p.jsonl, line 2: "),
    ],
)
def test_bad_prompts(lines: str, expected: str, micro: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(lines)
    result = dgq("calibrate", micro, "-o", tmp_path / "stats", "--prompts", file, "--device", "cpu")
    assert result.exit_code == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


KING = "the king went to the wind and the apple of the door"


@pytest.mark.parametrize(
    ("name", "content", "text", "count"),
    [
        (
            "p.jsonl",
            json.dumps({"text": f"{KING}\u2028{KING}\x85{KING}"}, ensure_ascii=False),
            f"{KING}\u2028{KING}\x85{KING}",
            1,
        ),
        ("p.jsonl", f'\ufeff{{"text": "{KING}"}}\r\n{{"text": "{KING}"}}\r\n', KING, 2),
        ("P.JSONL", json.dumps({"text": KING}), KING, 1),
        ("p.jsonl", json.dumps({"text": None, "messages": PROMPTS[1]["messages"]}), None, 1),
        ("p.txt", f"\ufeff{KING}\r\n\r\n{KING}\r\n \t\r\n\r\n{KING}\r\n", KING, 3),
        ("p.txt", f"{KING}\n  \n\n{KING}\n{KING}", KING, 2),
    ],
)
def test_prompts_as_programs_write_them(
    name: str, content: str, text: str | None, count: int, micro: Path, tmp_path: Path
) -> None:
    """Byte order marks, Windows' ends of lines, and those that JSON's strings may hold."""
    (tmp_path / name).write_bytes(content.encode())
    found, about = documents(open_source(str(micro)), tmp_path / name)
    assert len(found) == about["documents"] == count
    assert text is None or list(found[0].ids) == Tokenizer.from_dir(micro).encode(text)


def test_a_file_of_prompts_of_another_kind(micro: Path, tmp_path: Path) -> None:
    """A list in JSON would be taken for one text."""
    (tmp_path / "p.json").write_text(json.dumps([{"text": KING}]))
    result = dgq("calibrate", micro, "-o", tmp_path / "stats", "--prompts", tmp_path / "p.json", "--device", "cpu")
    assert result.exit_code == 2 and "p.json: its name ends in neither .jsonl nor .txt" in result.stderr


def test_bad_stats(micro: Path, stats: Path, tmp_path: Path) -> None:
    other = write_micro(tmp_path / "other", json.loads((micro / "config.json").read_text()))
    (tmp_path / "cut").write_bytes(stats.read_bytes()[:-100])
    (tmp_path / "text").write_text("hello")
    for model, file, more, expected in (
        (micro, tmp_path / "none", (), "no such file"),
        (micro, tmp_path / "cut", (), "damaged"),
        (micro, tmp_path / "text", (), "damaged"),
        (micro, stats, ("--effort", "fast"), "takes no --stats"),
        (micro, stats, ("--imatrix", stats), "--imatrix"),
        ("tiny", stats, (), "do not fit"),
    ):
        out = tmp_path / "out"
        result = dgq("convert", model, "--to", "bnb4", "--stats", file, "-o", out, "--device", "cpu", *more)
        assert result.exit_code == 2 and expected in result.stderr, result.output
        assert len(result.stderr.splitlines()) <= 2 and not out.exists()
    assert dgq("convert", micro, "--to", "bnb4", "--effort", "standard", "-o", tmp_path / "out").exit_code == 2
    about = "".join(f'{key} = "wide"\n' for key in ("name", "label", "description"))
    rules = 'format = "gguf"\nmax_16bit_share = 1\n[[rule]]\nmatch = "*"\nscheme = "f32"\n'
    (tmp_path / "wide.toml").write_text(about + rules)
    command = ("convert", micro, "--to", "gguf", "--recipe", tmp_path / "wide.toml", "-o", tmp_path / "out")
    result = dgq(*command, "--stats", stats)
    assert result.exit_code == 2 and "recipe wide quantises nothing" in result.stderr, result.output
    result = dgq("convert", other, "--to", "bnb4", "--stats", stats, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, "the same weights elsewhere"


def _everything(change: Callable[[torch.Tensor], torch.Tensor], part: str) -> Callable[[Any, Any], None]:
    def edit(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(part)]:
            tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _everything(lambda amax: amax + 1e19, ".amax"),
        _everything(torch.zeros_like, ".amax"),
        _everything(torch.zeros_like, ".sum2"),
        _everything(lambda sums: sums * 1e6, ".sum2"),
        _everything(lambda count: count + 10**6, "experts.gate_up_proj.count"),
        _everything(lambda count: count.flip(0), ".q_proj.weight.count"),
        lambda tensors, about: about.update(tokens=about["tokens"] + 1),
        lambda tensors, about: about.update(rounds=-5),
    ],
)
def test_stats_that_contradict_themselves(
    edit: Callable[[Any, Any], None], micro: Path, stats: Path, tmp_path: Path
) -> None:
    with safe_open(stats, "pt") as opened:
        about = json.loads(opened.metadata()["dgq"])
    tensors = load_file(stats)
    edit(tensors, about)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, tmp_path / "bad", {"dgq": json.dumps(about)}
    )
    result = dgq(
        "convert", micro, "--to", "nvfp4", "--stats", tmp_path / "bad", "-o", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 2 and "damaged" in result.stderr and not (tmp_path / "out").exists(), result.output


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """All experts but the first."""
    return torch.cat((weight[:1], weight[1:].flip(0)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.decoder.layers.1.experts.down_proj", _turned),
        ("model.decoder.layers.0.self_attn.o_proj.weight", lambda weight: torch.cat((weight[:1], -weight[1:]))),
        ("model.decoder.norm.weight", lambda weight: weight * 2),
    ],
)
def test_stats_of_other_weights(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], micro: Path, stats: Path, tmp_path: Path
) -> None:
    tensors = {name: open_source(str(micro))[name].parts[""].clone() for name in open_source(str(micro)).text}
    read_stats(stats, open_source(str(write_micro(tmp_path / "same", _config(micro), tensors))))
    tensors[name] = change(tensors[name])
    other = write_micro(tmp_path / "other", _config(micro), tensors)
    with pytest.raises(InputError, match="made from other weights"):
        read_stats(stats, open_source(str(other)))


def _config(micro: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((micro / "config.json").read_text())
    return found


def test_another_device_does_not_go_on(micro: Path, stats: Path) -> None:
    """Where bytes depend on it."""
    source = open_source(str(micro))
    plan, found = make_plan(source, find_recipe("bnb4")), read_stats(stats, source)
    devices = ("cpu", "cuda")
    with_stats = [pipeline._identity(plan, ConversionSettings("standard", device=one, stats=found)) for one in devices]
    without = [pipeline._identity(plan, ConversionSettings("fast", device=one)) for one in devices]
    assert with_stats[0] != with_stats[1] and without[0] == without[1]


@pytest.mark.parametrize(
    ("file", "expected"),
    [("0-1.safetensors", "damaged"), ("0-enter.safetensors", "damaged"), ("identity.json", "another calibration's")],
)
def test_a_damaged_unfinished_calibration(
    file: str, expected: str, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(passes.SamplePasses, "leave", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _calibrate(micro, tmp_path / "stats").exit_code == 130
    folder = tmp_path / ".stats.calibration"
    (folder / file).write_bytes(b"\xff\xfe torn")
    result = _calibrate(micro, tmp_path / "stats")
    assert result.exit_code == 2 and expected in result.stderr and str(folder) in result.stderr, result.output
    assert len(result.stderr.splitlines()) <= 2 and not isinstance(result.exception, UnicodeDecodeError)


def test_an_unfinished_calibration_is_not_thrown_away(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(passes.SamplePasses, "leave", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _calibrate(micro, tmp_path / "stats").exit_code == 130
    before = {path.name for path in (tmp_path / ".stats.calibration").iterdir()}
    result = _calibrate(micro, tmp_path / "stats", "--seed", 3)
    assert result.exit_code == 2 and "unfinished work, its seed was 0, not 3; finish it" in result.stderr
    assert {path.name for path in (tmp_path / ".stats.calibration").iterdir()} == before
    (tmp_path / "other").write_text("mine")
    for more in (("-o", tmp_path / "other"), ("--imatrix", tmp_path / "other")):
        result = _calibrate(micro, tmp_path / "new", *more)
        assert result.exit_code == 2 and "exists already" in result.stderr
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "new").exists()


def test_nobody_else_works_on_it(micro: Path, stats: Path, tmp_path: Path) -> None:
    """Two at once would read each other's hidden states. What one left that had not begun is in nobody's way."""
    folder = tmp_path / ".stats.calibration"
    folder.mkdir()
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = _calibrate(micro, tmp_path / "stats")
        assert result.exit_code == 2 and "another dgq calibrate is at it" in result.stderr
    assert _calibrate(micro, tmp_path / "stats").exit_code == 0
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes() and not folder.exists()


def test_no_more_tokens_than_a_conversion_takes(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tokens that experts were counted to see are those of their Hessians: all of the samples are used."""
    monkeypatch.setattr(samples, "CHUNK", 300)
    monkeypatch.setattr(calibrate, "starved", lambda _: {"0.0": 1})
    asked = {}
    for most in (1 << 18, 900, 1):
        monkeypatch.setattr(samples, "TOKENS", most)
        out = tmp_path / str(most)
        result = _calibrate(micro, out)
        assert result.exit_code == 0, result.output
        found = read_stats(out, open_source(str(micro)))
        assert samples.used(found.chunks) == found.chunks
        tokens = sum(chunk.run_tokens for chunk in found.chunks)
        assert tokens == found.about["tokens"] and all(sum(n) == 2 * tokens for n in stats_coverage(found))
        asked[most] = tokens, found.about["rounds"], len(found.chunks)
    assert asked[1 << 18][1] == calibrate.MORE * 2 and asked[900][0] <= 900 < asked[1 << 18][0]
    assert asked[900][1] < calibrate.MORE * 2 and asked[1][1:] == (1, 1)


def stats_coverage(found: Any) -> list[list[int]]:
    return list(coverage(found.tensors).values())


def test_progress_ends_where_it_said(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rounds more than were asked for, from the beginning and gone on with."""
    monkeypatch.setattr(calibrate, "starved", lambda _: {"0.0": 1})

    def told(stop: int) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            if len(seen) == stop:
                raise KeyboardInterrupt

        options = calibrate.CalibrateOptions(prompts=micro / "prompts.jsonl", rounds=1, device="cpu")
        calibrate.calibrate(str(micro), tmp_path / "stats", options, progress)
        return seen

    with pytest.raises(KeyboardInterrupt):
        told(11)
    again = told(0)
    (tmp_path / "stats").unlink()
    whole = told(0)
    assert all(done <= total for done, total in (*again, *whole))
    assert whole[0] == (1, 8) and whole[-1] == (20, 20), "drafts, and two passes of two layers, 4 times"
    assert again[-1][0] == again[-1][1] < 14


def test_stats_are_shown_expert_by_expert(micro: Path, stats: Path, tmp_path: Path) -> None:
    seen = load_file(stats)["model.decoder.layers.1.experts.gate_up_proj.count"]
    page, found = dgq("inspect", stats), json.loads(dgq("inspect", stats, "--json").stdout)
    assert f"1: {' '.join(map(str, seen.sum(-1).tolist()))}\n" in page.stdout
    assert f"no expert saw fewer than {FLOOR} tokens" in page.stdout
    assert found["kinds"]["1"] == seen.tolist() and found["starved"] == {} and found["data"]["name"] == "prompts.jsonl"
    (tmp_path / "damaged").write_bytes(stats.read_bytes().replace(b'\\"data\\"', b'\\"date\\"'))
    for file, expected in ((tmp_path / "damaged", "damaged"), (micro / "prompts.jsonl", "expected a directory")):
        result = dgq("inspect", file)
        assert result.exit_code == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1


def _changed(stats: Path, to: Path, change: Any) -> Path:
    with safe_open(stats, "pt") as opened:
        tensors, about = {n: opened.get_tensor(n) for n in opened.keys()}, dict(opened.metadata())  # noqa: SIM118
    change(tensors, about)
    save_file(tensors, to, about)
    return to


NAME = "model.decoder.layers.1.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, a: t.pop(NAME + ".amax"), "experts.down_proj.amax is missing"),
        (lambda t, a: t[NAME + ".amax"].fill_(float("nan")), "not finite"),
        (lambda t, a: t[NAME + ".sum2"].neg_(), "negative"),
        (lambda t, a: t.update({NAME + ".count": t[NAME + ".count"][:, :2].contiguous()}), "count is missing, or not"),
        (lambda t, a: t.update({"samples.prompts": t["samples.prompts"].float()}), "no int32"),
        (lambda t, a: t["samples.canvases"].fill_(1 << 30), "do not fit"),
        (lambda t, a: t["samples.owner"].fill_(0), "a chunk has no canvas|damaged"),
        (lambda t, a: a.update({"dgq": "[]"}), "other weights"),
        (lambda t, a: a.update({"dgq": "{"}), "damaged"),
        (
            lambda t, a: a.update({"dgq": a["dgq"].replace('"documents"', '"pages"')}),
            "does not say what it was made of",
        ),
        (
            lambda t, a: t.update({"samples.chunks": t["samples.chunks"].unsqueeze(0)}),
            "samples are of another shape",
        ),
    ],
)
def test_stats_of_strangers(change: Any, expected: str, micro: Path, stats: Path, tmp_path: Path) -> None:
    if "owner" in expected or "chunk" in expected:  # two chunks, so that one is left without a canvas

        def split(t: dict[str, torch.Tensor], a: dict[str, str], change: Any = change) -> None:
            count = int(t["samples.chunks"].sum())
            t["samples.chunks"] = torch.tensor([1, count - 1], dtype=torch.int32)
            change(t, a)

        change_it = split
    else:
        change_it = change
    file = _changed(stats, tmp_path / "stats", change_it)
    out = tmp_path / "out"
    result = dgq("convert", micro, "--to", "nvfp4", "--stats", file, "-o", out, "--device", "cpu")
    assert result.exit_code == 2 and re.search(expected, result.stderr), result.output
    assert len(result.stderr.splitlines()) == 1 and not out.exists()


def test_other_weights_are_noticed(micro: Path, stats: Path, tmp_path: Path) -> None:
    """A fine-tune of attention alone, as adapters make it; and a norm that is not a number."""
    config = json.loads((micro / "config.json").read_text())
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    tuned, broken = micro_tensors(config), micro_tensors(config)
    tuned[name] += 0.01
    broken["model.decoder.layers.0.input_layernorm.weight"][3] = float("nan")
    path = write_micro(tmp_path / "tuned", config, tuned)
    result = dgq("convert", path, "--to", "bnb4", "--stats", stats, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2 and "other weights" in result.stderr
    path = write_micro(tmp_path / "broken", config, broken)
    (path / "prompts.jsonl").write_text((micro / "prompts.jsonl").read_text())
    result = _calibrate(path, tmp_path / "stats")
    assert result.exit_code == 2 and "not numbers" in result.stderr and not (tmp_path / "stats").exists()


def test_every_expert_has_its_own_hessians() -> None:
    """Inputs weighted by gradients, gradients by inputs; leaning on the average by LEAN tokens, wholly if none came."""
    sense = Hessians(3)
    sense.watch({"w": slice(0, 3), "dense": slice(0, 1)})
    g = torch.Generator().manual_seed(0)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for expert, tokens in ((0, 3), (2, 4)):
        x, back = torch.randn(tokens, 8, generator=g), torch.randn(tokens, 5, generator=g)
        sense("w", x, back, expert)
        sense("other", x, back, expert)
        own[expert] = (
            torch.einsum("t,ti,tj->ij", back.square().mean(-1), x, x),
            torch.einsum("t,ti,tj->ij", x.square().mean(-1), back, back),
        )
    for side in (0, 1):
        average = (own[0][side] + own[2][side]) / 7
        wanted = [(own[e][side] if e in own else 0) + LEAN * average for e in range(3)]
        wanted = [total / (n + LEAN) for total, n in zip(wanted, (3, 0, 4), strict=True)]
        for part in (slice(0, 3), slice(1, 3)):
            found = sense.of("w", part)[side]
            assert found is not None
            torch.testing.assert_close(found, torch.stack(wanted[part]))
    joined = Hessians(3)
    joined.watch({"down_proj": slice(0, 3)})
    for expert in (0, 2):
        joined("down_proj", torch.ones(2, 8), torch.full((2, 5), 1.0 + expert), expert)
    found = joined.of("down_proj", slice(1, 3))[1]
    assert found is not None and found.shape == (1, 5, 5) and float(found[0, 0, 0]) == 2 * 1 + 2 * 9, "added up"
    silent = Hessians(3)
    silent.watch({"w": slice(0, 3)})
    silent("w", torch.ones(2, 8), torch.zeros(2, 5), 1)
    assert not any(side is None or bool(side.any()) for side in silent.of("w", slice(0, 3))), "nothing felt: zeros"
    partly = Hessians(3)
    partly.watch({"w": slice(0, 3)})
    partly("w", torch.ones(4, 8), torch.tensor([1.0, 0, 0, 0]).view(4, 1).expand(4, 5), 1)
    own, lent = partly.of("w", slice(1, 2))[0], partly.of("w", slice(0, 1))[0]
    assert float(lent[0, 0, 0]) == pytest.approx(1.0), "the average of those that are felt"
    assert float(own[0, 0, 0]) == pytest.approx(1.0)
    sense("dense", torch.ones(2, 3, 8), 2 * torch.ones(2, 3, 5), None)
    inputs, outputs = sense.of("dense", slice(0, 1))
    assert outputs is not None and float(inputs[0, 0, 0]) == 6 * 4 and float(outputs[0, 0, 0]) == 6 * 4


@pytest.fixture(scope="module")
def there(micro: Path) -> tuple[Source, Chunk, torch.Tensor]:
    """A chunk, every canvas twice, and what half of them are conditioned on."""
    source = open_source(str(micro))
    found, _ = documents(source, micro / "prompts.jsonl")
    chunk = chunks([d for d in found if not d.open], 1, 0, source)[0]
    stream = Stream(source.config, Rows(source), "cpu", torch.float32)
    soft = stream.soften(torch.cat([rows for _, rows in stream.leave(chunk, _through(stream, chunk, None)[-1])]))
    return source, doubled(chunk), conditioned(chunk, soft.clone())


def test_the_way_back_is_the_gradient(
    there: tuple[Source, Chunk, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it tells of every weight, added up, is autograd's gradient of the loss of the tokens it drew."""
    source, chunk, soft = there
    weights = {name: source[name] for name in source.text}
    stream = Stream(source.config, weights, "cpu", torch.float32)
    slopes: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    sizes: list[torch.Tensor] = []

    def sense(name: str, x: torch.Tensor, g: torch.Tensor, expert: int | None) -> None:
        if name == EMBEDDING:
            sizes.append(g)
            return
        key = name if expert is None else f"{name} {expert}"
        slopes[key] = slopes[key] + g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    states = _back(stream, chunk, soft, sense)
    logits = torch.cat([rows for _, rows in stream.leave(chunk, states[-1])])
    drawn = _drawn(logits)
    cap = source.config.softcap
    inner = (torch.atanh(logits / cap) * cap).clone().requires_grad_()
    _loss((inner / cap).tanh() * cap, drawn).backward()
    assert inner.grad is not None
    torch.testing.assert_close(torch.cat(sizes), inner.grad.norm(dim=-1, keepdim=True), rtol=2e-3, atol=1e-5)
    monkeypatch.setattr(layers, "_goes_back", lambda x: False)  # from here on autograd's own products
    plain = {n: w.dequantize(torch.float32).clone() for n, w in weights.items()}
    matrices = {n for n, w in plain.items() if w.dim() > 1 and n != EMBEDDING}
    for name in matrices:
        plain[name].requires_grad_()
    other = Stream(
        source.config,
        {n: Packed(SCHEMES["f32"], tuple(w.shape), {"": w}) for n, w in plain.items()},
        "cpu",
        torch.float32,
    )
    x = other._enter(chunk, soft, None)
    for index in range(len(source.config.layers)):
        x = other.layer(index)._through(chunk, x)
    normed = torch.cat([rows for _, rows in other._leaving(chunk, x)])
    _loss(torch.tanh(normed @ plain[EMBEDDING].T / cap) * cap, drawn).backward()
    assert {key.split(" ")[0] for key in slopes} == matrices, "every matrix is heard of, the router too"
    for key, slope in slopes.items():
        name, _, expert = key.partition(" ")
        wanted = plain[name].grad
        assert wanted is not None
        torch.testing.assert_close(slope, wanted[int(expert)] if expert else wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_passes_go_back_as_the_stream_does(
    there: tuple[Source, Chunk, torch.Tensor], tmp_path: Path, meanwhile: bool
) -> None:
    """H and G of every weight, by files of states and one chunk after the other, and straight through. meanwhile: as
    beside a GPU."""
    source, chunk, soft = there
    stream = Stream(source.config, Rows(source), "cpu", torch.float32)
    names = {name for name, spec in source.text.items() if len(spec.shape) > 1}
    everything = {name: slice(0, source.config.experts if ".experts." in name else 1) for name in names}
    straight, filed = (Hessians(source.config.experts) for _ in range(2))
    straight.watch(everything)
    filed.watch(everything)
    for seed in (0, 1):
        _back(stream, chunk, soft, straight, seed)
    single = [i for i, kind in enumerate(chunk.kind.tolist()) if kind <= BINS]  # as before doubled()
    kept = torch.tensor(single)
    once = Chunk(chunk.prompts, chunk.canvases[kept], tuple(chunk.owner[i] for i in single), chunk.kind[kept])
    layers = len(source.config.layers)
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / str(i)).open("x+b", buffering=0)) for i in range(layers + 2)]
        way = passes.SamplePasses(stream, [once, once], range(2), files[0], files[1:])
        way.meanwhile = meanwhile
        way.first(lambda: None)
        way.enter(None)
        for index in range(layers):
            way.layer(index, None)
        for stage in ("leave", *reversed(range(layers)), "enter"):
            way.back(stage, filed)
    for name in names:
        for got, wanted in zip(*(sense.of(name, everything[name]) for sense in (filed, straight)), strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-7 + 1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("meanwhile", [False, True])
@pytest.mark.parametrize("mine", [[], [4], [1, 3, 5]])
def test_each_chunk_in_its_place(
    there: tuple[Source, Chunk, torch.Tensor], tmp_path: Path, meanwhile: bool, mine: list[int]
) -> None:
    """What is read goes through the work of its number and is written under it; a disk that is full is heard of, at
    the last chunk too."""
    source, chunk, _ = there
    stream = Stream(source.config, Rows(source), "cpu", torch.float32)
    with (tmp_path / "a").open("x+b", buffering=0) as a, (tmp_path / "b").open("x+b", buffering=0) as b:
        way = passes.SamplePasses(stream, [chunk] * 6, mine, a, [a, b])
    way.meanwhile = meanwhile
    written: dict[int, float] = {}

    def write(number: int, x: torch.Tensor) -> None:
        if len(written) == full:
            raise OSError("no room")
        written[number] = float(x)

    full = 6
    way._each(lambda number: torch.tensor(10.0 * number), lambda number, x: x + number, write)
    assert written == {number: 11.0 * number for number in mine}
    if mine:
        written.clear()
        full = len(mine) - 1
        with pytest.raises(OSError, match="no room"):
            way._each(lambda number: torch.tensor(10.0 * number), lambda number, x: x + number, write)


def _back(stream: Stream, chunk: Chunk, soft: torch.Tensor, sense: Any, seed: int = 7) -> list[torch.Tensor]:
    states = _through(stream, chunk, soft)
    gradient = stream.pull_leave(chunk, states[-1].clone(), seed, sense)
    for index in reversed(range(len(states) - 1)):
        gradient = stream.layer(index, backward=sense).pull(chunk, states[index].clone(), gradient)
    stream.pull_enter(chunk, soft.clone(), gradient, sense)
    return states


def _through(stream: Stream, chunk: Any, soft: torch.Tensor | None) -> list[torch.Tensor]:
    states = [stream.enter(chunk, soft)]
    for index in range(len(stream.config.layers)):
        states.append(stream.layer(index)(chunk, states[-1]))
    return states


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    """The tokens that pull_leave draws with seed 7; all canvases of the chunk go through the head together."""
    assert logits.shape[0] * logits.shape[1] <= 512
    generator = torch.Generator().manual_seed(7)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).flatten()


def _loss(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum")
