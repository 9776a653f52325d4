"""`dgq calibrate --trajectories`: its canvases and what conditions them are the engine's own, step for step."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from micro import write_micro

from dgq.convert.calibration import calibrate as calibration
from dgq.convert.calibration import trajectories
from dgq.convert.calibration.stats import read_stats
from dgq.convert.cli.__main__ import main
from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.layerwise.passes import Rows, SamplePasses
from dgq.convert.layerwise.samples import BINS
from dgq.convert.layerwise.stream import Stream
from dgq.convert.source.checkpoint import open_source
from dgq.runtime.engine.batch import encode_each
from dgq.runtime.model.layers import soft_embed
from dgq.runtime.model.model import Model
from dgq.runtime.model.rng import CounterRandom
from dgq.runtime.model.sampler import decide
from dgq.runtime.shape.names import EMBEDDING
from dgq.runtime.shape.settings import GenerationConfig

TEXT = "the king went to the wind and the apple of the door was in the house of the king for a day " * 3


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_micro(tmp_path_factory.mktemp("micro") / "model")
    settings = json.loads((path / "generation_config.json").read_text())  # few steps: a near tie would part the two
    (path / "generation_config.json").write_text(json.dumps(settings | {"max_denoising_steps": 6}))
    (path / "prompts.txt").write_text("\n\n".join([TEXT, TEXT[20:], TEXT[40:]]))
    return path


def calibrate(micro: Path, out: Path, *more: str) -> Result:
    options = ["--prompts", str(micro / "prompts.txt"), "--rounds", "1", "--device", "cpu", "--json", *more]
    return CliRunner().invoke(main, ["calibrate", str(micro), "-o", str(out), *options])


@pytest.fixture(scope="module")
def stats(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats"
    result = calibrate(micro, out, "--trajectories")
    assert result.exit_code == 0, result.output
    return out


def test_canvases_are_the_engines(micro: Path, stats: Path) -> None:
    """Each is a step of the whole model's own sampling, with the embedding of the step before; a prompt has one. Its
    kind is the share of it that the step before did not accept."""
    source = open_source(str(micro))
    found = read_stats(stats, source)
    assert found.about["trajectories"] is True
    sampler = GenerationConfig.from_file(micro / "generation_config.json", source.config).sampler
    chunk, model = found.chunks[0], Model(source.config, source, "cpu", torch.float32)
    assert sorted(chunk.owner[place] for place in chunk.given) == list(range(len(chunk.prompts)))
    random = CounterRandom(0, range(len(chunk.prompts)), 16, source.config.vocab, torch.device("cpu"))
    rows = torch.arange(len(chunk.prompts))
    cache, canvas, logits = encode_each(model, chunk.prompts, 400), random.canvas(rows, 0), None
    waiting, noise = dict(chunk.given), torch.ones(len(rows))
    for step in range(1, sampler.steps + 1):
        draw = partial(random.draw, rows=rows, block=0, step=step)
        new = decide(model.decode(canvas, cache, logits), sampler.steps + 1 - step, sampler, draw)
        canvas, logits, noise = new.canvas, new.logits, 1 - new.accepted.float().mean(-1)
        soft = soft_embed(logits, source[EMBEDDING], torch.float32)
        for place, given in list(waiting.items()):
            row = chunk.owner[place]
            if torch.equal(chunk.canvases[place], canvas[row]):
                torch.testing.assert_close(given.float(), soft[row], rtol=1e-2, atol=1e-2)
                assert int(chunk.kind[place]) == 1 + min(BINS - 1, int(float(noise[row]) * BINS))
                del waiting[place]
    assert not waiting, "a canvas that the engine never came by"


@pytest.mark.parametrize(("drawn", "step"), [(0.9, 2), (0.4, 3), (0.3, 4)])
def test_any_step_is_as_likely(drawn: float, step: int, micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th of them takes the place of what was kept before by a chance of 1/k."""
    monkeypatch.setattr(trajectories.random, "Random", lambda _: SimpleNamespace(random=lambda: drawn))
    kept, walks = {}, []
    enter = trajectories._Walk.enter

    def seen(self: trajectories._Walk, number: int) -> torch.Tensor:
        kept[number] = self.chunk.canvases.clone()
        walks.append(self)
        return enter(self, number)

    monkeypatch.setattr(trajectories._Walk, "enter", seen)
    source = open_source(str(micro))
    stream = Stream(source.config, source, "cpu", torch.float32)
    chunk = Chunk(((5, 6, 7),), torch.zeros(2, 16, dtype=torch.int64), (0, 0), torch.ones(2, dtype=torch.int64))
    sampler = replace(GenerationConfig.from_file(micro / "generation_config.json", source.config).sampler, steps=4)
    with (micro / "states").open("w+b", buffering=0) as file:
        (found,) = trajectories.walked(stream, [chunk], sampler, 0, 0, file, lambda: None)
    assert sorted(kept) == [1, 2, 3, 4] and list(found.given) == [0]
    assert torch.equal(found.canvases[0], kept[step][0]) and not torch.equal(kept[3], kept[4])


def test_what_was_kept_conditions(micro: Path, stats: Path, tmp_path: Path) -> None:
    """The second pass takes what the sampler gave, and the canvas's own logits only where it gave nothing."""
    source = open_source(str(micro))
    chunk = read_stats(stats, source).chunks[0]
    stream = Stream(source.config, Rows(source), "cpu", torch.float32)
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / str(i)).open("x+b", buffering=0)) for i in range(3)]
        way = SamplePasses(stream, [chunk], [0], files[0], files[1:])
        way.first(lambda: None)
        both, soft = way.doubled[0], way.soft(0)
    conditioned = [i for i, kind in enumerate(both.kind.tolist()) if kind > BINS]
    assert len(conditioned) == len(chunk.owner)
    for canvas, given in chunk.given.items():
        (at,) = (i for i in conditioned if torch.equal(both.canvases[i], chunk.canvases[canvas]))
        assert torch.equal(soft[at], given.float())
    assert 0 < len(chunk.given) < len(conditioned)


def test_killed_it_goes_on_and_ends_in_the_same_bytes(
    micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration.SamplePasses, "first", stopped)
        assert calibrate(micro, tmp_path / "stats", "--trajectories").exit_code == 130
    assert (tmp_path / ".stats.calibration" / "0-walked.safetensors").is_file()
    other = calibrate(micro, tmp_path / "stats")
    assert other.exit_code == 2 and "another calibration's unfinished work" in other.output
    assert calibrate(micro, tmp_path / "stats", "--trajectories").exit_code == 0
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes()


def test_it_serves_a_conversion(micro: Path, stats: Path, tmp_path: Path) -> None:
    common = ["convert", str(micro), "--to", "gguf", "--device", "cpu"]
    command = [*common, "--stats", str(stats), "-o", str(tmp_path / "made")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
