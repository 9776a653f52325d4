"""KL as `dgq validate` reports it beside one computed without dgq's runtime, decoders and measures: the artifact's file
decoded by gguf-py, bitsandbytes or modelopt into transformers' model, KL by torch's own kl_div in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from others import DECODED
from pictures import draw_nothing
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dgq.convert.cli.__main__ import main
from dgq.convert.source.models import open_model
from dgq.convert.validation.questions import LEVELS, canvases, questions

pytestmark = pytest.mark.xdist_group("validate-meter")
transformers: Any = pytest.importorskip("transformers")
TINY = Path(str(files("dgq.recipes").joinpath("tiny")))
FORMATS = {"nvfp4": "nvfp4-w4a16", "bnb4": "bnb4", "gguf": "q4_k_m"}
Oracle = Any


@cache
def oracle() -> Oracle:
    return transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


def filled(weights: Mapping[str, Tensor]) -> Oracle:
    model = oracle()
    # tied ones have two names
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    copied = [name for name in weights if name in places]
    assert len(copied) >= 142
    for name in copied:
        with torch.no_grad():
            places[name].copy_(weights[name].view(places[name].shape))
    return model


@torch.no_grad()
def logits(model: Oracle, prompt: tuple[int, ...], noised: Tensor, given: list[Tensor] | None) -> list[list[Tensor]]:
    """[level][plain, conditioned] (canvas, vocab); given: what each level's second is conditioned on, or its first."""
    cache_ = transformers.DynamicCache(config=model.config.get_text_config())
    ids = torch.tensor([prompt])
    real = torch.ones_like(ids, dtype=torch.bool)
    model.model.encoder(
        input_ids=ids, attention_mask=real, past_key_values=cache_, position_ids=torch.arange(len(prompt))[None]
    )
    canvas = noised.shape[-1]
    step = {"past_key_values": cache_, "decoder_attention_mask": functional.pad(real, (0, canvas), value=True),
            "decoder_position_ids": torch.arange(len(prompt), len(prompt) + canvas)[None]}  # fmt: skip
    found = []
    for level, tokens in enumerate(noised):
        plain = model(decoder_input_ids=tokens[None], **step).logits
        condition = plain if given is None else given[level][None]
        second = model(decoder_input_ids=tokens[None], self_conditioning_logits=condition, **step).logits
        found.append([plain[0], second[0]])
    return found


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, converted: Callable[[str], Path]) -> Path:
    """The artifacts, and report/, which the reference's file suffices for: SRC adds nothing to what is held here."""
    folder = files("dgq.recipes").joinpath("prompts")
    texts, tasks = (folder.joinpath(f"heldout_{kind}.jsonl").read_text("utf-8") for kind in ("text", "tasks"))
    path = tmp_path_factory.mktemp("meter")
    (path / "prompts.jsonl").write_text("\n".join([texts.splitlines()[10], tasks.splitlines()[5]]))
    for to, recipe in FORMATS.items():
        shutil.copytree(converted(recipe), path / to)
    commands = [
        ["validate", "--against", "tiny", "--prompts", path / "prompts.jsonl", "--quick", "--reference", path / "tiny"],
        ["validate", *(path / to for to in FORMATS), "--reference", path / "tiny", "-o", path / "report"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for command in commands:
            result = CliRunner().invoke(main, [str(argument) for argument in command])
            assert (path / "report").is_dir() or result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def asked(room: Path) -> list[tuple[tuple[int, ...], Tensor, list[list[Tensor]]]]:
    """Of each question the prompt, its canvas at all levels, and the logits of transformers' own model."""
    found, _ = questions(open_model("tiny"), "tiny", room / "prompts.jsonl", 0)
    noised = canvases(found, range(len(found)), 0, 2048)  # (levels, questions, canvas)
    reference = filled({name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()})
    return [(q.prompt, noised[:, i], logits(reference, q.prompt, noised[:, i], None)) for i, q in enumerate(found)]


@pytest.mark.parametrize("to", FORMATS)
def test_kl_by_others_code(
    to: str, room: Path, asked: list[tuple[tuple[int, ...], Tensor, list[list[Tensor]]]]
) -> None:
    report = json.loads((room / "report" / "report.json").read_text())
    ours = {one["name"]: one for one in report["artifacts"]}[to]["fixed"]["by_level"]
    artifact = filled(DECODED[to](room / to))
    sums = torch.zeros(len(LEVELS), 2, dtype=torch.float64)
    for prompt, noised, wanted in asked:
        found = logits(artifact, prompt, noised, [level[0] for level in wanted])
        for level in range(len(LEVELS)):
            for c in range(2):
                p, q = (side[level][c].double().log_softmax(-1) for side in (wanted, found))
                sums[level, c] += functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    theirs = (sums / len(asked)).tolist()
    for level, row in zip(LEVELS, theirs, strict=True):
        for name, value in zip(("plain", "conditioned"), row, strict=True):
            assert value > 1e-5, "there is something to measure"
            assert ours[f"{level}"][name]["kl"][0] == pytest.approx(value, rel=0.01, abs=1e-6), (level, name)
            print(f"{to} {level} {name}: ours {ours[f'{level}'][name]['kl'][0]:.8f}, theirs {value:.8f}")
