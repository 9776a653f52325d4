"""How many tokens a picture becomes, by request: ids, patches and soft tokens against transformers' processor and tower
with the same max_soft_tokens; and pictures across the border of a piece of a long prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_images import TINY, processor  # noqa: F401  # a fixture
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.image_utils import load_image

import dgq.runtime
from dgq.convert import plan
from dgq.convert.cli.__main__ import main
from dgq.convert.estimate.forecast import PlanOptions
from dgq.quant.errors import InputError
from dgq.runtime.engine import batch
from dgq.runtime.engine.api import Engine
from dgq.runtime.files.images import IMAGE_TOKENS
from dgq.runtime.shape.pictured import Pictured, pieces


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "page.png"
    noise = PIL.Image.fromarray((np.random.default_rng(0).random((9, 9, 3)) * 255).astype("uint8"))
    noise.resize((310, 190), PIL.Image.Resampling.BICUBIC).save(file)
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny with places for 256 patches a side, as 1120 tokens need; it has 64, and the released model 10,240."""
    path = tmp_path_factory.mktemp("places") / "tiny"
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["position_embedding_size"] = 256
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    name = next(one for one in tensors if one.endswith("position_embedding_table"))
    tensors[name] = tensors[name].repeat(1, 4, 1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return dgq.runtime.load(checkpoint, "cpu")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("most", IMAGE_TOKENS)
def test_as_transformers_processor_has_it(most: int, engine: Engine, processor: Any, picture: Path) -> None:  # noqa: F811
    text = "<bos>what is <|image|> this?"
    theirs = processor(
        text=[text], images=[[load_image(str(picture))]], return_tensors="pt", add_special_tokens=False,
        images_kwargs={"max_soft_tokens": most},
    )  # fmt: skip
    vision = engine.artifact.vision.with_tokens(most)
    patches = vision.patches(picture)
    assert torch.equal(patches.values, theirs["pixel_values"])
    assert torch.equal(patches.positions, theirs["image_position_ids"])
    ids, images = engine.tokenizer.encode(text), [picture]
    blank = torch.zeros(patches.soft_tokens, engine.artifact.config.hidden)
    prompt = vision.prompt(ids, images, lambda _: blank)
    assert list(prompt) == theirs["input_ids"][0].tolist()
    assert most / 1.5 < sum(prompt.is_image) <= most


def test_logits_across_a_border(engine: Engine, processor: Any, oracle: Any, picture: Path, monkeypatch: Any) -> None:  # noqa: F811
    """A picture of up to 560 tokens that begins before the 512th token of a prompt: a canvas' logits are transformers',
    which encodes all at once, in pieces of every size."""
    text = "<bos>" + "then " * 300 + "<|image|>" + "and " * 90 + "what is this?"
    given = processor(
        text=[text], images=[[load_image(str(picture))]], return_tensors="pt", add_special_tokens=False,
        images_kwargs={"max_soft_tokens": 560},
    )  # fmt: skip
    prompt = engine.ids(text, [picture], image_tokens=560)
    assert isinstance(prompt, Pictured) and list(prompt) == given["input_ids"][0].tolist()
    first = list(prompt).index(engine.artifact.vision.tokens.image)
    assert first < batch.PREFILL < first + sum(prompt.is_image)
    model, length = engine.model, len(prompt)
    assert len(list(pieces([prompt], batch.PREFILL))) > 2
    canvas = torch.randint(0, engine.artifact.config.vocab, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = DynamicCache(config=oracle.config.get_text_config())
        places = {"past_key_values": cache, "position_ids": torch.arange(length)[None]}
        masks = oracle.model.encoder.create_masks_for_generate(
            config=oracle.config, inputs_embeds=torch.empty(1, length, 0),
            attention_mask=torch.ones(1, length, dtype=torch.bool), mm_token_type_ids=given["mm_token_type_ids"],
            **places,
        )  # fmt: skip
        shown = {key: given[key] for key in ("input_ids", "pixel_values", "image_position_ids")}
        oracle.model.encoder(attention_mask=masks, **shown, **places)
        at = torch.arange(length, length + 64)[None]
        expected = oracle(decoder_input_ids=canvas, past_key_values=cache, decoder_position_ids=at).logits
    for step in (batch.PREFILL, 100, 4096):
        monkeypatch.setattr(batch, "PREFILL", step)
        found = model.decode(canvas, batch.encode_each(model, [prompt], length + 64))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_requests(engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, Python's calls and a conversation's turns take the number; others are refused in one line."""
    lengths = {most: len(engine.ids("a", [picture], image_tokens=most)) for most in (None, 70, 140)}
    assert lengths[70] < lengths[140] and lengths[None] == lengths[70]  # as tiny's processor_config.json has it
    command = ["run", "tiny", "a", "--device", "cpu", "--image", str(picture), "--max-new-tokens", "1", "--steps", "1"]
    done = CliRunner().invoke(main, [*command, "--image-tokens", "140", "--json"])
    assert json.loads(done.stdout)["prompt_tokens"] == lengths[140]
    assert CliRunner().invoke(main, [*command, "--image-tokens", "300"]).exit_code == 2
    settings = {"max_new_tokens": 1, "steps": 1}
    chats = [engine.chat(image_tokens=most).ask("a", images=[picture], **settings) for most in (70, 140)]
    assert chats[1].prompt_tokens - chats[0].prompt_tokens == lengths[140] - lengths[70]
    small = dgq.runtime.load(TINY, "cpu")
    with pytest.raises(InputError, match="the tower has places for 64; crop it, or ask for fewer image tokens"):
        small.ids("a", [picture], image_tokens=1120)
    with pytest.raises(InputError, match="image tokens are 300, expected one of 70, 140, 280, 560, 1120"):
        engine.generate("a", [picture], image_tokens=300)


def test_plan_counts_them() -> None:
    """By arithmetic: nine patches a token, tiny's tower in bfloat16, and a mask of one and of two bytes a pair."""
    tower = json.loads((TINY / "config.json").read_text())["vision_config"]
    for most in IMAGE_TOKENS:
        needs = plan("tiny", "nvfp4", PlanOptions(probe=False, image_tokens=most)).needs["vision"]
        patches = 9 * most
        wide = 2 * patches * (3 * tower["intermediate_size"] + 6 * tower["hidden_size"])
        assert needs["image_tokens"] == most + 2 and needs["image"] == wide + 3 * patches**2
    with pytest.raises(InputError, match="image tokens are 7,"):
        plan("tiny", "nvfp4", PlanOptions(probe=False, image_tokens=7))
    page = CliRunner().invoke(main, ["plan", "tiny", "--to", "gguf", "--no-probe", "--image-tokens", "560"])
    assert "for an image of 562 tokens of context" in " ".join(page.output.split())
