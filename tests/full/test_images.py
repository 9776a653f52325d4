"""Image prompts against transformers' own: processor, vision tower, masks, logits, and generate()'s tokens.

tiny's vision tower is random; its text model is trained. An image of 70 soft tokens is longer than its window of 64.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from micro import write_micro
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.image_utils import load_image
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

import dgq.runtime
from dgq.convert.cli.__main__ import main
from dgq.quant.errors import InputError
from dgq.runtime.engine import batch, engine
from dgq.runtime.engine.batch import OnSlots
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.engine.plain import Plain
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.images import open_image, placed
from dgq.runtime.model.model import Model
from dgq.runtime.model.slots import PromptView
from dgq.runtime.shape.pictured import Pictured, pictures, pieces
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
SIZES = {"wide.png": (160, 112), "tall.jpg": (100, 300), "square.png": (97, 90)}


class _Processor(Gemma4Processor):
    """transformers' own, which wants audio and video parts besides."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None


@pytest.fixture(scope="module")
def pictures_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, size in SIZES.items():
        noise = PIL.Image.fromarray((rng.random((6, 6, 3)) * 255).astype("uint8"))
        noise.resize(size, PIL.Image.Resampling.BICUBIC).save(room / name)
    return {name: room / name for name in SIZES}


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_artifact(TINY)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Model:
    return artifact.load("cpu", torch.float32)


@pytest.fixture(scope="module")
def tower(artifact: Artifact) -> Any:
    return artifact.vision.tower("cpu", torch.float32)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template = (TINY / "chat_template.jinja").read_text()
    found = _Processor(None, Gemma4ImageProcessorPil.from_pretrained(TINY), tokenizer, None, template)
    found.boa_token = found.eoa_token = "<no audio>"
    return found


def prompt_of(artifact: Artifact, tower: Any, text: Any, images: list[Any]) -> Pictured:
    ids, shown, front = placed(artifact.tokenizer, text, images)
    return artifact.vision.prompt(ids, shown, tower, front)


def theirs_of(processor: Any, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
    loaded = [[load_image(str(image)) for image in images]]
    return dict(processor(text=[text], images=loaded, return_tensors="pt", add_special_tokens=False))


ONE = ("<bos>what is <|image|> this?", ["wide.png"])
TWO = ("<bos><|image|><|image|>Sort: wind apple king door", ["wide.png", "tall.jpg"])
APART = ("<bos><|image|>and" + " then" * 40 + "<|image|> which?", ["square.png", "wide.png"])


@pytest.mark.parametrize(("text", "names"), [ONE, TWO, APART], ids=["one", "two", "two apart"])
def test_logits_are_transformers(
    text: str, names: list[str], artifact: Artifact, model: Model, tower: Any, oracle: Any, processor: Any,
    pictures_of: dict[str, Path],
) -> None:  # fmt: skip
    """Ids, soft tokens, and the logits of a noised canvas, with and without self-conditioning."""
    images = [pictures_of[name] for name in names]
    given = theirs_of(processor, text, images)
    prompt = prompt_of(artifact, tower, text, images)
    assert list(prompt) == given["input_ids"][0].tolist()
    assert [int(one) for one in prompt.is_image] == given["mm_token_type_ids"][0].tolist()
    with torch.no_grad():
        seen = oracle.model.encoder.get_image_features(given["pixel_values"], given["image_position_ids"])
        torch.testing.assert_close(prompt.embeddings, seen.pooler_output, atol=1e-5, rtol=0)
        theirs = DynamicCache(config=oracle.config.get_text_config())
        length = len(prompt)
        masks = oracle.model.encoder.create_masks_for_generate(
            config=oracle.config,
            inputs_embeds=torch.empty(1, length, 0),
            attention_mask=torch.ones(1, length, dtype=torch.bool),
            past_key_values=theirs,
            position_ids=torch.arange(length)[None],
            mm_token_type_ids=given["mm_token_type_ids"],
        )
        oracle.model.encoder(
            input_ids=given["input_ids"],
            attention_mask=masks,
            past_key_values=theirs,
            position_ids=torch.arange(length)[None],
            pixel_values=given["pixel_values"],
            image_position_ids=given["image_position_ids"],
        )
    cache = batch.encode_each(model, [prompt], length + artifact.config.canvas)
    canvas = torch.randint(0, artifact.config.vocab, (1, 64), generator=torch.Generator().manual_seed(1))
    ours = model.decode(canvas, cache)
    again = model.decode(canvas, cache, ours / 0.7)
    step = {"decoder_input_ids": canvas, "past_key_values": theirs}
    step["decoder_position_ids"] = torch.arange(length, length + 64)[None]
    with torch.no_grad():
        expected, expected_again = oracle(**step).logits, oracle(**step, self_conditioning_logits=ours / 0.7).logits
    print("largest difference", float((ours - expected).abs().max()), float((again - expected_again).abs().max()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(again, expected_again, atol=1e-4, rtol=0)
    blind = model.decode(canvas, batch.encode_each(model, [list(prompt)], length + 64))
    assert float((blind - expected).abs().max()) > 0.05, "the images made no difference"


@pytest.mark.usefixtures("no_compiler")
def test_tokens_are_generates(
    artifact: Artifact, model: Model, tower: Any, oracle: Any, processor: Any, pictures_of: dict[str, Path]
) -> None:
    """A batch of a prompt with two images, one with one and one with none, padded on the left."""
    cases = [TWO, ("<bos>Sort: wind <|image|>", ["tall.jpg"]), ("<bos>Sort: wind apple king door", [])]
    rows: list[Any] = []
    for text, names in cases:
        images = [pictures_of[name] for name in names]
        rows.append(prompt_of(artifact, tower, text, images) if names else artifact.tokenizer.encode(text))
    generation = GenerationConfig(SamplerConfig(steps=8), (1,), artifact.generation.pad_id)
    result = generate(model, Request(rows, generation, 128, seed=3, rng="torch"))

    given = [theirs_of(processor, text, [pictures_of[name] for name in names]) for text, names in cases[:2]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    kinds = torch.zeros_like(ids)
    for row, one in enumerate(given):
        kinds[row, longest - one["input_ids"].shape[1] :] = one["mm_token_type_ids"][0]
    torch.manual_seed(3)
    found = oracle.generate(
        ids, attention_mask=ids != 0, mm_token_type_ids=kinds,
        **{key: torch.cat([one[key] for one in given]) for key in ("pixel_values", "image_position_ids")},
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1), disable_compile=True, pad_token_id=0,
        max_new_tokens=128, max_denoising_steps=8, t_min=0.4, t_max=0.8, stability_threshold=1,
        confidence_threshold=0.005, eos_token_id=[1],
    )  # fmt: skip
    assert result.canvases.tolist() == found.sequences[:, longest:].tolist()


def test_pieces_split_no_image(
    artifact: Artifact, model: Model, tower: Any, pictures_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in pieces of 30 tokens, images whole, is the prompt at once; on fixed memory, too (rings wrap)."""
    prompts = [prompt_of(artifact, tower, text, [pictures_of[name] for name in names]) for text, names in (APART, TWO)]
    cut = list(pieces(prompts[:1], 30))
    assert [piece.start for piece in cut[1:]] == [piece.stop for piece in cut[:-1]] and cut[-1].stop == len(prompts[0])
    lengths = [piece.stop - piece.start for piece in cut]
    assert max(lengths) == 70 and sum(length <= 30 for length in lengths) == len(lengths) - 2
    both = list(pieces(prompts, 30))
    assert all(pictures(prompts, piece, model.device) is None or piece.stop - piece.start >= 60 for piece in both)

    canvas = torch.randint(0, artifact.config.vocab, (1, 64), generator=torch.Generator().manual_seed(2))
    for prompt in prompts:
        expected = model.decode(canvas, batch.encode_each(model, [prompt], len(prompt) + 64))
        with monkeypatch.context() as patched:
            patched.setattr(batch, "PREFILL", 30)
            found = model.decode(canvas, batch.encode_each(model, [prompt], len(prompt) + 64))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        for step in (30, 512):
            backend = Plain(model)
            backend.prefill = step
            slots = dgq.runtime.model.slots.Slots(model.config, 1, len(prompt) + 64, "cpu", torch.float32)
            for piece in pieces([prompt], step):
                view = PromptView(slots, 0, piece.start, piece.stop - piece.start)
                ids = torch.tensor(prompt[piece])[None]
                backend.encode_prompt(ids, view, pictures([prompt], piece, model.device))
            slots.lengths.fill_(len(prompt))
            state = backend.new_state(1, SamplerConfig())
            state.canvas.copy_(canvas)
            found = backend.decode(state, dgq.runtime.model.slots.CanvasView(slots, 1, 64))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_session_takes_them(
    artifact: Artifact, model: Model, tower: Any, pictures_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots, as on a GPU, and the reference give one batch the same tokens; and each row what it gets alone."""
    rows: list[Any] = [artifact.tokenizer.encode("Sort: wind apple king door")]
    rows += [prompt_of(artifact, tower, text, [pictures_of[name] for name in names]) for text, names in (ONE, TWO)]
    expected = generate(model, Request(rows, artifact.generation, 64, seed=5, steps=6))
    alone = generate(model, Request(rows[2:], artifact.generation, 64, seed=5, steps=6, rows=[2]))
    assert alone.tokens == expected.tokens[2:]

    class Anywhere(OnSlots):
        def __init__(self, model: Any, prompts: Any, capacity: int, sampler: Any, random: Any, pad_id: int) -> None:
            super().__init__(model, prompts, capacity, sampler, random)

    monkeypatch.setattr(engine, "OnCache", Anywhere)
    assert generate(model, Request(rows, artifact.generation, 64, seed=5, steps=6)).tokens == expected.tokens


def test_engine_and_chats(artifact: Artifact, tower: Any, processor: Any, pictures_of: dict[str, Path]) -> None:
    """dgq.runtime.load's engine: images beside a text, beside messages, in their parts; before the text by default."""
    wide, tall = pictures_of["wide.png"], pictures_of["tall.jpg"]
    own = dgq.runtime.load(TINY, "cpu")
    parts = [{"type": "image", "image": wide}, {"type": "text", "text": "what "}]
    parts += [{"type": "image", "image": PIL.Image.open(tall)}, {"type": "text", "text": "is it"}]
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    expected = theirs_of(processor, chat, [wide, tall])["input_ids"][0].tolist()
    assert list(own.ids([{"role": "user", "content": parts}])) == expected
    split = [part if part["type"] == "text" else {"type": "image"} for part in parts]
    assert list(own.ids([{"role": "user", "content": split}], [wide, tall])) == expected
    marked = [{"role": "user", "content": "<|image|>what <|image|>is it"}]
    assert list(own.ids(marked, [wide, tall])) == expected
    before = [{"role": "user", "content": "what is it"}]
    begins = theirs_of(processor, chat.replace("what <|image|>", "<|image|>what "), [wide, tall])
    assert list(own.ids(before, [wide, tall])) == begins["input_ids"][0].tolist()
    raw = theirs_of(processor, "<bos><|image|>what", [tall])["input_ids"][0].tolist()
    assert list(own.ids("what", [tall])) == list(own.ids("<bos>what", [tall])) == raw
    assert list(own.ids(own.tokenizer.encode("<|image|>what"), [tall])) == raw

    answers = own.generate_batch(["what", before], [[tall], []], max_new_tokens=64, steps=3, seed=1)
    assert own.generate("what", [tall], max_new_tokens=64, steps=3, seed=1).tokens == answers[0].tokens
    blocks = list(own.stream("what", images=[[tall]], max_new_tokens=64, steps=3, seed=1, every_step=False))
    assert blocks[0].canvas[0].tolist()[: len(answers[0].tokens)] == answers[0].tokens


def fails(*arguments: Any, code: int = 2) -> str:
    result = CliRunner().invoke(main, ["run", *map(str, arguments)])
    assert result.exit_code == code and not result.stdout, result.output
    (line,) = result.stderr.splitlines()
    return line


def png(width: int, height: int) -> bytes:
    """One that says it is this large, and holds ten bytes."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0" * 10)))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_files_that_are_no_images(tmp_path: Path, pictures_of: dict[str, Path]) -> None:
    whole = pictures_of["wide.png"].read_bytes()
    cases = {
        "text.png": (b"hello", "is no image that dgq opens"),
        "empty.jpg": (b"", "is no image that dgq opens"),
        "cut.png": (whole[:200], "cannot be decoded"),
        "large.png": (png(12_000, 12_000), "too large (12000 x 12000 pixels, 144 million); dgq takes 134 million"),
        "huge.png": (png(60_000, 60_000), "too large (Image size (3600000000 pixels)"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        line = fails(TINY, "what", "--image", tmp_path / name)
        assert f"{tmp_path / name}: " in line and said in line
    assert "no such file" in fails(TINY, "what", "--image", tmp_path / "none.png")
    assert "is no file" in fails(TINY, "what", "--image", tmp_path)
    PIL.Image.new("RGB", (48, 48)).save(tmp_path / "program.eps")
    assert "is no image that dgq opens" in fails(TINY, "what", "--image", tmp_path / "program.eps")
    PIL.Image.new("RGB", (3000, 20)).save(tmp_path / "strip.png")
    line = fails(TINY, "what", "--image", tmp_path / "strip.png")
    assert "strip.png: is 210 patches long and narrow, the tower has places for 64" in line


def test_files_as_cameras_and_scanners_make_them(tmp_path: Path, pictures_of: dict[str, Path]) -> None:
    """On their side, in other colours, moving; 16-bit gray is what it is in 8 bits, for which Pillow gives white."""
    image = PIL.Image.open(pictures_of["wide.png"])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path / "turned.png")[1]
    assert turned.size == (112, 160) and turned.tobytes() == image.transpose(PIL.Image.Transpose.ROTATE_270).tobytes()
    assert turned.tobytes() == load_image(str(tmp_path / "turned.png")).tobytes()
    image.convert("CMYK").save(tmp_path / "print.tiff")
    for mode in ("L", "P", "RGBA", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    image.save(tmp_path / "moving.webp", save_all=True, append_images=[turned.resize(image.size)], lossless=True)
    for file in ("print.tiff", "L.png", "P.png", "RGBA.png", "1.png", "moving.webp"):
        assert open_image(tmp_path / file)[1].tobytes() == load_image(str(tmp_path / file)).tobytes(), file
    gray = np.asarray(image.convert("L"))
    for file in ("deep.png", "deep.tiff"):
        PIL.Image.fromarray(gray.astype(np.uint16) * 256 + 77).save(tmp_path / file)
        assert np.array_equal(np.asarray(open_image(tmp_path / file)[1])[..., 0], gray)
    PIL.Image.fromarray(gray.astype(np.float32)).save(tmp_path / "float.tiff")
    assert "float.tiff: has 32-bit gray values" in fails(TINY, "what", "--image", tmp_path / "float.tiff")


def test_prompts_that_do_not_fit(tmp_path: Path, pictures_of: dict[str, Path]) -> None:
    wide = pictures_of["wide.png"]
    line = fails(TINY, "<|image|> and <|image|>", "--image", wide)
    assert "the prompt has 2 <|image|> for 1 image" in line
    assert "the prompt says <|image|>, and no image is given" in fails(TINY, "<|image|> what")
    own, parts = dgq.runtime.load(TINY, "cpu"), [{"type": "image"}, {"type": "image", "path": wide}]
    with pytest.raises(InputError, match=r"has 2 <\|image\|> for 1 image"):
        own.ids([{"role": "user", "content": parts}])
    with pytest.raises(InputError, match="no image is given"):
        own.ids([{"role": "user", "content": parts[:1]}])
    with pytest.raises(InputError, match="images of 1 prompts for 2"):
        own.generate_batch(["a", "b"], [[wide]])
    many = [argument for _ in range(28) for argument in ("--image", wide)]
    assert "the prompt's 2019 tokens and 64 new ones" in fails(TINY, "what", *many, "--max-new-tokens", 4)
    blind = shutil.copytree(TINY, tmp_path / "blind")
    (blind / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}{% endfor %}")
    assert "the prompt has 0 <|image|> for 1 image" in fails(blind, "what", "--chat", "--image", wide)
    settings = json.loads((TINY / "processor_config.json").read_text())
    settings["image_processor"]["max_soft_tokens"] = 71
    (blind / "processor_config.json").write_text(json.dumps(settings))
    assert "the image processor's settings are not usable" in fails(blind, "what", "--image", wide)
    settings["image_processor"] |= {"max_soft_tokens": 70, "patch_size": 14}
    (blind / "processor_config.json").write_text(json.dumps(settings))
    assert "the image processor's patch_size is 14, the tower's 16" in fails(blind, "what", "--image", wide)
    assert "has no vision tower, which images need" in fails(write_micro(tmp_path / "text"), "what", "--image", wide)


def test_run_takes_images(pictures_of: dict[str, Path], tmp_path: Path) -> None:
    """What the engine gives; as BF16 and W4A4, where the image is rounded nowhere but in the experts."""
    out = tmp_path / "nvfp4"
    made = CliRunner().invoke(main, ["convert", "tiny", "--to", "nvfp4", "--input-scale", "0.02", "-o", str(out)])
    assert made.exit_code == 0, made.output
    images = [pictures_of["wide.png"], pictures_of["tall.jpg"]]
    arguments = ["Sort: wind apple", "--chat", "--max-new-tokens", "64", "--steps", "4", "--seed", "3", "--json"]
    found = {}
    for more in ((), ("--activations", "nvfp4"), ("--rng", "torch")):
        given = [argument for image in images for argument in ("--image", str(image))]
        result = CliRunner().invoke(main, ["run", str(out), *arguments, *given, *more])
        assert result.exit_code == 0, result.output
        found[more] = json.loads(result.stdout)
        assert found[more]["images"] == 2 and found[more]["prompt_tokens"] > 130
    own = dgq.runtime.load(out, "cpu")
    chat = [{"role": "user", "content": "Sort: wind apple"}]
    answer = own.generate(chat, images, max_new_tokens=64, steps=4, seed=3)
    assert found[()]["tokens"] == answer.tokens
    assert answer.tokens != own.generate(chat, images[:1], max_new_tokens=64, steps=4, seed=3).tokens
