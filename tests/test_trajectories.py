"""`dgq calibrate --trajectories`: its canvases and what conditions them are the engine's own, step for step."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from micro import write_micro

from dgq.convert import survey
from dgq.convert.cli import main
from dgq.convert.source import open_source
from dgq.convert.stats import read_stats
from dgq.runtime.batch import encode_each
from dgq.runtime.layers import soft_embed
from dgq.runtime.model import Model
from dgq.runtime.names import EMBEDDING
from dgq.runtime.rng import CounterRandom
from dgq.runtime.sampler import decide
from dgq.runtime.settings import GenerationConfig

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
    """Each is a step of the whole model's own sampling, with the embedding of the step before; a prompt has one."""
    source = open_source(str(micro))
    found = read_stats(stats, source)
    assert found.about["trajectories"] is True
    sampler = GenerationConfig.from_file(micro / "generation_config.json", source.config).sampler
    chunk, model = found.chunks[0], Model(source.config, source, "cpu", torch.float32)
    assert sorted(chunk.owner[place] for place in chunk.given) == list(range(len(chunk.prompts)))
    random = CounterRandom(0, range(len(chunk.prompts)), 16, source.config.vocab, torch.device("cpu"))
    rows = torch.arange(len(chunk.prompts))
    cache, canvas, logits = encode_each(model, chunk.prompts, 400), random.canvas(rows, 0), None
    waiting = dict(chunk.given)
    for step in range(1, sampler.steps + 1):
        draw = partial(random.draw, rows=rows, block=0, step=step)
        new = decide(model.decode(canvas, cache, logits), sampler.steps + 1 - step, sampler, draw)
        canvas, logits = new.canvas, new.logits
        soft = soft_embed(logits, source[EMBEDDING], torch.float32)
        for place, given in list(waiting.items()):
            row = chunk.owner[place]
            if torch.equal(chunk.canvases[place], canvas[row]):
                torch.testing.assert_close(given.float(), soft[row], rtol=1e-2, atol=1e-2)
                del waiting[place]
    assert not waiting, "a canvas that the engine never came by"


def test_killed_it_goes_on_and_ends_in_the_same_bytes(
    micro: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(survey.Passes, "first", stopped)
        assert calibrate(micro, tmp_path / "stats", "--trajectories").exit_code == 130
    assert (tmp_path / ".stats.calibration" / "0-walked.done").is_file()
    other = calibrate(micro, tmp_path / "stats")
    assert other.exit_code == 2 and "another calibration's unfinished work" in other.output
    assert calibrate(micro, tmp_path / "stats", "--trajectories").exit_code == 0
    assert (tmp_path / "stats").read_bytes() == stats.read_bytes()


def test_it_serves_a_conversion(micro: Path, stats: Path, tmp_path: Path) -> None:
    common = ["convert", str(micro), "--to", "gguf", "--device", "cpu"]
    command = [*common, "--stats", str(stats), "-o", str(tmp_path / "made")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
