"""`--ram` and `--vram`: sizes as they are written, the same bytes whatever the budget, floors, and what is counted
against what is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click import BadParameter
from click.testing import CliRunner, Result
from micro import micro_config, write_micro
from sparse26b import write_sparse_26b
from torch.profiler import ProfilerActivity, profile

from dgq.convert.calibration.input_sums import InputSums
from dgq.convert.cli.__main__ import main
from dgq.convert.cli.terminal.sizes import Size
from dgq.convert.layerwise import budget, estimate, passes, samples, schedule
from dgq.convert.layerwise.budget import Budget
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.estimate import Needs, Sizes
from dgq.convert.layerwise.passes import Rows
from dgq.convert.layerwise.schedule import Hessian, at_once, trips
from dgq.convert.layerwise.stream import Stream
from dgq.convert.plans.plan import Plan, make_plan
from dgq.convert.plans.recipes import find_recipe
from dgq.convert.plans.tensors import PlannedTensor
from dgq.convert.source.checkpoint import Source, open_source
from dgq.convert.source.sizes import shown
from dgq.convert.write import refine
from dgq.convert.write.refine import refinable
from dgq.quant.errors import InputError
from dgq.quant.feedback.feedback import by_matrix, feedback
from dgq.quant.schemes.registry import SCHEMES

TEXT = "the king went to the wind and the apple of the door was in the house of the king for a day " * 3
GIB = 1 << 30


def peak(action: Callable[[], object]) -> int:
    """Most bytes that torch's allocator had given out on the CPU at once, while the action ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.inference_mode():
        action()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def dgq(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * GIB), ("24GB", 24 * 10**9), ("1.5 gib", 3 * GIB // 2), ("900mb", 9 * 10**8), ("4096B", 4096)],
)
def test_sizes(text: str, expected: int) -> None:
    assert Size().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["8", "GiB", "-1GiB", "0GiB", "0.1B", "1e3GB", "8 GiB more", "8XiB", "", "nanGB", "9" * 40 + "B"])  # fmt: skip # noqa: E501
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadParameter, match="no size of memory; write it like 24GiB"):
        Size().convert(text, None, None)
    result = dgq("calibrate", "tiny", "-o", "/nowhere/stats", f"--ram={text}")
    assert result.exit_code == 2 and "no size of memory" in result.stderr


def test_sizes_as_they_are_shown() -> None:
    assert (shown(3 * GIB // 2), shown(300 << 20)) == ("1.5 GiB", "300 MiB")


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of rows that every scheme takes."""
    config = micro_config()
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 64}
    path = write_micro(tmp_path_factory.mktemp("budget") / "model", config)
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"text": TEXT[n:]}) for n in (0, 40)))
    return path


def _calibrate(micro: Path, out: Path, *more: object) -> Result:
    """A chunk for each document, so that sums have an order."""
    prompts = ("--prompts", micro / "prompts.jsonl", "--rounds", 1, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", 1)
        return dgq("calibrate", micro, "-o", out, *prompts, *more)


@pytest.fixture(scope="module")
def stats(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("budget") / "stats"
    assert _calibrate(micro, out).exit_code == 0
    return out


def _floor(micro: Path, stats: Path | None) -> int:
    """Of converting with STATS, or of calibrating."""
    source = open_source(str(micro))
    plan = make_plan(source, find_recipe("gguf", None))
    todo = [tensor for tensor in plan.tensors if refinable(tensor)] if stats else []
    if stats is None:
        sizes = Sizes.most(source.config)
    else:
        from dgq.convert.calibration.stats import read_stats

        sizes = Sizes.of(read_stats(stats, source).chunks)
    return max(sum(parts.values()) for parts in Needs(source, "cpu", sizes, todo).moments().values())


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are quantised one by one, so that their Hessians can be gathered one by one."""
    monkeypatch.setattr(schedule, "GROUP", {"cpu": 1, "cuda": 1})


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | str, bool]]:
    """Each way back through a stage, and whether the stage comes again."""
    found: list[tuple[int | str, bool]] = []
    real = passes.SamplePasses.back

    def back(self: passes.SamplePasses, stage: int | str, sense: Any, again: bool = False) -> None:
        found.append((stage, again))
        real(self, stage, sense, again)

    monkeypatch.setattr(passes.SamplePasses, "back", back)
    return found


def _room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    real = refine.check_memory
    monkeypatch.setattr(refine, "check_memory", lambda *given: min(room, real(*given)))


@pytest.mark.parametrize("recipe", ["nvfp4", "q4_k_m"])
@pytest.mark.usefixtures("single", "few_steps")
def test_bytes_do_not_depend_on_the_budget(
    recipe: str, micro: Path, stats: Path, tmp_path: Path, ways: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All Hessians of a layer at once, some, and one by one; and a budget that just holds the floor."""
    to = "gguf" if recipe == "q4_k_m" else recipe
    command = ("convert", micro, "--to", to, "--stats", stats, "--device", "cpu", "-o")
    counts = []
    for name, room in (("all", 1 << 40), ("some", 3 << 19), ("one", 0)):
        ways.clear()
        with monkeypatch.context() as patch:
            _room(patch, room)
            result = dgq(*command, tmp_path / name)
        assert result.exit_code == 0, result.output
        counts.append(len(ways))
        assert all(dict(ways)[stage] is False for stage, _ in ways), "the last time each is written"
    assert dgq(*command, tmp_path / "floor", "--ram", f"{_floor(micro, stats)}B").exit_code == 0
    assert counts[0] <= 4 < counts[1] < counts[2]
    for file in (tmp_path / "all").iterdir():
        for name in ("some", "one", "floor"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), (name, file.name)


def test_an_experts_hessians_are_the_same_alone() -> None:
    """Gathered with all the others, and in two ways; of so many tokens that a library adds up parts of them in turn."""
    generator = torch.Generator().manual_seed(0)
    told = [
        (torch.randn(3000, 96, generator=generator), torch.randn(3000, 40, generator=generator), n % 3)
        for n in range(6)
    ]
    found = []
    for ways in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        sense = refine.Hessians(3)
        found.append([])
        for part in ways:
            sense.watch({"w": part})
            for x, g, expert in told:
                sense("w", x, g, expert)
            found[-1].append(sense.of("w", part))
    for side in (0, 1):
        together, apart = (torch.cat([pair[side] for pair in pairs]) for pairs in found)
        assert torch.equal(together, apart)


@pytest.mark.usefixtures("single", "few_steps")
def test_calibration_does_not_depend_on_the_budget(micro: Path, stats: Path, tmp_path: Path) -> None:
    result = _calibrate(micro, tmp_path / "stats", "--ram", f"{_floor(micro, None)}B")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes()


@pytest.mark.usefixtures("single", "few_steps")
def test_work_in_several_ways_goes_on(
    micro: Path, stats: Path, tmp_path: Path, ways: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off inside a layer, between two of its ways; gone on with in one."""
    command = ("convert", micro, "--to", "nvfp4", "--stats", stats, "--device", "cpu", "-o")
    result = dgq(*command, tmp_path / "whole")
    assert result.exit_code == 0, result.output
    real, calls = refine.feedback, []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        _room(patch, 0)
        patch.setattr(refine, "feedback", fail)
        assert dgq(*command, tmp_path / "again").exit_code == 130
    assert ways[-1] == (0, True)
    result = dgq(*command, tmp_path / "again")
    assert result.exit_code == 0 and "going on with" in result.stderr
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_budget_below_the_floor(micro: Path, stats: Path, tmp_path: Path) -> None:
    """One line, before any work: what is needed and what takes it."""
    convert = ("convert", micro, "--to", "gguf", "--stats", stats, "--device", "cpu", "-o", tmp_path / "out")
    calibrate = ("calibrate", micro, "--prompts", micro / "prompts.jsonl", "--device", "cpu", "-o", tmp_path / "out")
    for command, least in ((convert, _floor(micro, stats)), (calibrate, _floor(micro, None))):
        result = dgq(*command, "--ram", f"{least - 1}B")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        assert f"needs {shown(least)} at least" in result.stderr and "--ram" in result.stderr
        assert "libraries 488 MiB" in result.stderr and not list(tmp_path.iterdir())
    result = dgq("convert", micro, "--to", "gguf", "-o", tmp_path / "out", "--ram", "100MiB", "--device", "cpu")
    assert result.exit_code == 2 and "slices of a thread" in result.stderr and not list(tmp_path.iterdir())


def test_what_the_sampler_gave_is_counted(micro: Path, real: Plan, tmp_path: Path) -> None:
    """bfloat16, a canvas for each prompt: of a step and of those before; no more than TOKENS have room for."""
    floor = _floor(micro, None) + 2 * (2 * 4) * 16 * 256 * 2  # 2 documents up to 4 times, 16 tokens, rows of 256
    result = _calibrate(micro, tmp_path / "stats", "--trajectories", "--ram", f"{floor - 1}B")
    assert result.exit_code == 2 and f"needs {shown(floor)} at least" in result.stderr, result.output
    assert _calibrate(micro, tmp_path / "stats", "--trajectories", "--ram", f"{floor}B").exit_code == 0
    config, given = real.source.config, (1 << 18) // (1 + 4 * 256) * 256
    assert Sizes.most(config, walked=1000).given == 2 * given and Sizes.most(config, walked=3).given == 2 * 3 * 256
    sizes = Sizes.most(config, walked=1000)
    for device in ("cpu", "cuda"):
        needs, plain = (Needs(real.source, device, one) for one in (sizes, Sizes.most(config)))
        sums = [
            sum(n.moments()["layer"].values()) if device == "cpu" else sum(n.ram().values()) for n in (needs, plain)
        ]
        assert sums[0] - sums[1] == 2 * given * 2816 * 2
    chunk = Chunk(((5,) * 9,), torch.zeros(2, 16, dtype=torch.int64), (0, 0), torch.ones(2), {1: torch.zeros(16, 4)})
    assert Sizes.of([chunk, chunk]).given == 2 * 16


@pytest.mark.usefixtures("few_steps")
def test_without_an_option_it_keeps_to_what_is_free(
    micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", micro, "--to", "gguf", "--stats", stats, "--device", "cpu", "-o", tmp_path / "out")
    free = _floor(micro, stats) * 10 // 8
    monkeypatch.setattr(budget, "free_ram", lambda: free - 10)
    result = dgq(*command)
    assert result.exit_code == 2 and "80% of what is free" in result.stderr and "give --ram to try" in result.stderr
    monkeypatch.setattr(budget, "free_ram", lambda: free + 10)
    assert dgq(*command).exit_code == 0


def test_free_memory_is_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    free = budget.free_ram()
    assert 0 < free <= total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget.free_ram() == pytest.approx(free / 4, rel=0.2)


def test_fewer_threads_by_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    assert [Budget(ram=n * mib).threads(8, 300 * mib, 100 * mib, "cpu") for n in (400, 599, 5000)] == [1, 2, 8]
    with pytest.raises(InputError, match="--ram 399 MiB: converting needs 400 MiB at least"):
        Budget(ram=399 * mib).threads(8, 300 * mib, 100 * mib, "cpu")
    assert Budget(ram=5000 * mib, vram=2 * budget.SLICES).threads(8, 300 * mib, 100 * mib, "cuda") == 2


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = write_sparse_26b(tmp_path_factory.mktemp("budget") / "real")
    return make_plan(open_source(str(path), weights=False), find_recipe("bnb4", None))


def _layer(plan: Plan, number: int) -> list[PlannedTensor]:
    return [t for t in plan.tensors if f"layers.{number}." in str(t.source) and refinable(t)]


def test_hessians_of_the_26b_by_hand(real: Plan) -> None:
    by_name = {str(t.source).split(f"layers.{5}.")[1]: t for t in _layer(real, 5)}
    gate_up, down = Hessian.of(by_name["experts.gate_up_proj"]), Hessian.of(by_name["experts.down_proj"])
    assert gate_up.apart == gate_up.shared == 4 * (2816**2 + 1408**2)
    assert (down.apart, down.shared) == (4 * 704**2, 4 * (704**2 + 2816**2))
    assert Hessian.of(by_name["self_attn.o_proj.weight"]).apart == 4 * (8192**2 + 2816**2)
    assert at_once(by_name["experts.gate_up_proj"], "cuda") == 33 and at_once(by_name["experts.down_proj"], "cpu") == 33


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("room", [2 * GIB, 3 * GIB, 4 * GIB, 6 * GIB])
def test_trips_of_the_26b(real: Plan, device: str, room: int) -> None:
    """Every expert once, in order; no trip above the room; and none more than needed."""
    for number in (0, 5):  # a sliding layer, a full one
        tensors = _layer(real, number)
        found = trips(tensors, device, room)
        seen: dict[str, int] = {}
        for trip in found:
            for name, part in trip.items():
                assert part.start == seen.get(name, 0)
                seen[name] = part.stop
        shapes = {str(t.source): t.shape[0] if len(t.shape) == 3 else 1 for t in tensors}
        assert seen == shapes
        sums = {str(t.source): Hessian.of(t) for t in tensors}
        shared: dict[str, int] = {}  # of the weights begun so far
        for trip in found:
            shared |= {name: sums[name].shared for name in trip}
            own = sum(sums[name].apart * (part.stop - part.start) for name, part in trip.items())
            assert sum(shared.values()) + own <= room
        whole = sum(sums[name].shared + sums[name].apart * count for name, count in shapes.items())
        fewest = whole // (room - sum(shared.values()) - 1.25 * GIB)
        assert (len(found) == 1) == (whole <= room) and len(found) <= 2 + fewest


def test_floors_of_the_26b(real: Plan) -> None:
    """What README says: a GPU of 12 GB, and 8 GiB of RAM, hold them."""
    todo = [tensor for tensor in real.tensors if refinable(tensor)]
    for device, most in (("cpu", 5.0), ("cuda", 8.0)):
        needs = Needs(real.source, device, Sizes.most(real.source.config), todo)
        floor = max(sum(parts.values()) for parts in needs.moments().values())
        assert 4 < floor / GIB < most
        moments = needs.moments()
        assert moments["head"]["embeddings"] == 2 * 262144 * 2816 and moments["head"]["logits"] == 4 * GIB // 2
        assert needs.scratch == 32 * 2816 * (4 if device == "cpu" else 2)


# changes to the model below; tokens through the second half at once
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "experts": ({}, 512),
    "hidden": ({"hidden_size": 512}, 256),
    "inner": ({"moe_intermediate_size": 128}, 512),
    "attention": ({"head_dim": 256, "global_head_dim": 512}, 64),
    "vocabulary": ({"vocab_size": 16384}, 256),
}


def shaped(shape: str, path: Path, monkeypatch: pytest.MonkeyPatch, **more: int) -> Source:
    """A model of that shape, larger than what is counted in pieces: all pieces small, nothing beside them."""
    changes, tokens = SHAPES[shape]
    config = micro_config()
    config["text_config"] |= {
        "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 64, "num_experts": 16,
        "top_k_experts": 8, "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2,
        "global_head_dim": 128, "vocab_size": 4096,
    } | changes | more  # fmt: skip
    config["canvas_length"] = 64
    monkeypatch.setattr("dgq.runtime.model.layers.DECODE_BUDGET", 1 << 18)
    for module in ("dgq.convert.layerwise.stream", "dgq.convert.layerwise.estimate"):
        monkeypatch.setattr(f"{module}.FEED_TOKENS", {"cpu": tokens, "cuda": tokens})
        monkeypatch.setattr(f"{module}.HEAD_TOKENS", 128)
    for table in ("BASE", "WORKSPACE"):
        monkeypatch.setattr(estimate, table, {"cpu": 0, "cuda": 0})
    return open_source(str(write_micro(path, config, shards=0)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_counted_is_allocated(shape: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk through a layer, back through it, and through the head, in float32, and in bfloat16 as on a GPU."""
    source = shaped(shape, tmp_path / "micro", monkeypatch)
    chunk = Chunk(((5,) * 100, (6,) * 64), torch.zeros(8, 64, dtype=torch.int64), (0,) * 4 + (1,) * 4, torch.ones(8).long())  # fmt: skip # noqa: E501
    sizes = Sizes(chunk.tokens, 100, 4 * 64)
    tensors = make_plan(source, find_recipe("gguf", None)).tensors
    counted = Needs(source, device, sizes, [t for t in tensors if refinable(t)]).moments()
    for moment, allocated in _allocated(source, chunk, torch.float32 if device == "cpu" else torch.bfloat16).items():
        parts = counted[moment]
        found = sum(n for part, n in parts.items() if part not in ("weights", "embeddings", "Hessians"))
        print(f"{shape} {device} {moment}: {found:,} counted, {allocated:,} allocated, {found / allocated:.2f}")
        assert allocated <= found <= 1.8 * allocated


def _weighted(name: str, x: torch.Tensor, g: torch.Tensor, expert: int | None) -> None:
    x.float() * g.float().square().mean(-1, keepdim=True)  # as refine.Hessians does


def _allocated(source: Source, chunk: Chunk, dtype: torch.dtype) -> dict[str, int]:
    stream = Stream(source.config, Rows(source), "cpu", dtype)
    x = torch.randn(chunk.tokens, source.config.hidden).to(dtype)

    def most(action: Callable[[], object]) -> int:
        def graded() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                action()

        return peak(graded)

    found = {"layer": 0, "way back": 0}
    for index in range(2):
        layer, back = stream.layer(index, InputSums(source.config.experts)), stream.layer(index, backward=_weighted)
        found["layer"] = max(found["layer"], most(lambda layer=layer: layer(chunk, x.clone())))
        found["way back"] = max(found["way back"], most(lambda back=back: back.pull(chunk, x.clone(), x.clone())))
    stream.soften(torch.zeros(1, source.config.vocab))  # reads the table
    found["head"] = max(
        most(lambda: [stream.soften(logits) for _, logits in stream.leave(chunk, x.clone())]),
        most(lambda: stream.pull_leave(chunk, x.clone(), 0, lambda *_: None)),
    )
    return found


@pytest.mark.parametrize(("scheme", "shape", "outputs"), [("nvfp4", (4, 32, 128), True), ("nf4", (4, 320, 128), True), ("nf4", (1, 4096, 128), False)])  # fmt: skip # noqa: E501
def test_what_quantising_takes(scheme: str, shape: tuple[int, int, int], outputs: bool) -> None:
    experts, rows, columns = shape
    weight = torch.randn(shape).bfloat16()
    h, g = (torch.eye(size).expand(experts, size, size).clone() for size in (columns, rows if outputs else 1))
    quantise = partial(feedback, hessian=h, scheme=SCHEMES[scheme], outputs=g if outputs else None)
    allocated = peak(lambda: by_matrix(quantise, weight)) + 4 * (h.numel() + g.numel())
    counted = estimate._quantising(Hessian(0, 0, rows, columns, outputs, False), experts, rows)
    print(f"{scheme} {shape}: {counted:,} counted, {allocated:,} allocated, {counted / allocated:.2f}")
    assert allocated <= counted <= 1.8 * allocated


def test_plan_says_what_stats_will_take(micro: Path, stats: Path) -> None:
    found = json.loads(dgq("plan", micro, "--to", "gguf", "--no-probe", "--json").stdout)["with_stats"]
    assert found["cpu"]["scratch"] == 2 * found["cuda"]["scratch"] == (1 << 18) * 4 * 256 * 4, "of 2 layers and 2 more"
    for device in ("cpu", "cuda"):
        assert 0 < found[device]["calibrate"] <= found[device]["convert"] <= found[device]["at_once"]
    assert found["cpu"]["calibrate"] == _floor(micro, None)
    page = dgq("plan", micro, "--to", "gguf", "--no-probe").stdout
    assert "of disk beside the artifact" in page and "to be quick" in page
