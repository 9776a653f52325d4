"""What must be the same on a GPU: bytes of every scheme and artifact, and the tokens of the counter's random stream.

Skipped without CUDA. Schemes are held against their own CPU bytes here, which the other tests hold against ggml,
modelopt and bitsandbytes.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kinds import KINDS, block

from dgq.convert.cli.__main__ import main
from dgq.quant.schemes.dense import BF16
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.model.model import Model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = Path(__file__).parents[2] / "recipes" / "tiny"
FORMATS = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4", "q4_k_m": "gguf"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["nvfp4", "nf4", "nf4_dq", "q4_k", "q5_0", "q6_k", "q8_0"])
def test_bytes_of_a_scheme(scheme: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.stack([block(kind, 48, 768, generator) for _ in range(3)]).float()
    if kind == "huge":
        weight *= 1e-32 if scheme[0] == "q" else 1e-8
    expected = SCHEMES[scheme].quantize(weight)
    found = SCHEMES[scheme].quantize(weight.cuda())
    assert found.keys() == expected.keys()
    for name, part in found.items():
        assert part.is_cuda and part.shape == expected[name].shape
        raw = [p.cpu().contiguous().flatten().view(torch.uint8) for p in (part, expected[name])]
        assert torch.equal(*raw), f"{int((raw[0] != raw[1]).sum())} of {len(raw[0])} bytes of {name!r} differ"
    decoded = SCHEMES[scheme].dequantize(found).cpu()
    assert torch.equal(decoded, SCHEMES[scheme].dequantize(expected))


@pytest.mark.parametrize("recipe", FORMATS)
def test_files_of_an_artifact(recipe: str, tmp_path: Path) -> None:
    """Every file of `tiny` converted on the GPU is the CPU's (input scales given: a calibration adds up elsewhere)."""
    digests = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        arguments = [
            "convert",
            "tiny",
            "--to",
            FORMATS[recipe],
            "--recipe",
            recipe,
            "--effort",
            "stock",
            "-o",
            str(out),
            "--device",
            device,
        ]
        arguments += ["--input-scale", "0.02"] if recipe == "nvfp4" else []
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()})
    assert digests[0] == digests[1]


def test_files_weighed_by_an_imatrix(tmp_path: Path) -> None:
    golden = Path(__file__).parent.parent / "golden" / "tinyA"
    made = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        arguments = ["convert", str(golden), "--to", "gguf", "-o", str(out), "--device", device]
        arguments += ["--imatrix", str(golden / "reference.imatrix.gguf")]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        made.append((out / "tinyA-Q4_K_M.gguf").read_bytes())
    assert made[0] == made[1]


def test_calibrated_input_scales_agree(tmp_path: Path) -> None:
    scales = []
    for device in ("cpu", "cuda"):
        arguments = ["convert", "tiny", "--to", "nvfp4", "-o", str(tmp_path / device), "--device", device, "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        scales.append(json.loads(result.stdout)["input_scales"]["amax"])
    for side in ("encoder", "decoder"):
        for name, value in scales[0][side].items():
            assert scales[1][side][name] == pytest.approx(value, rel=1e-3), (side, name)


@pytest.mark.parametrize("recipe", [None, *FORMATS])
def test_tokens_are_the_cpus(recipe: str | None, tmp_path: Path) -> None:
    """rng=counter in float32: a batch of tasks of different lengths, and each format."""
    path = TINY
    if recipe:
        path = tmp_path / "out"
        arguments = ["convert", "tiny", "--to", FORMATS[recipe], "--recipe", recipe, "-o", str(path)]
        assert CliRunner().invoke(main, arguments).exit_code == 0
    artifact = open_artifact(path)
    lines = files("dgq.recipes").joinpath("prompts", "heldout_tasks.jsonl").read_text("utf-8").splitlines()[:24]
    prompts = [artifact.tokenizer.chat(json.loads(line)["messages"]) for line in lines]
    results = [
        generate(artifact.load(device, torch.float32), Request(prompts, artifact.generation, 64, seed=7))
        for device in ("cpu", "cuda")
    ]
    same = [a == b for a, b in zip(results[0].tokens, results[1].tokens, strict=True)]
    assert all(same), f"{len(same) - sum(same)} of {len(same)} rows differ"
    assert results[0].steps == results[1].steps and any(count > 1 for row in results[0].steps for count in row)


def test_images_by_kernels(tmp_path: Path) -> None:
    """Prompts with images on slots: in float32 the CPU's tokens; by kernels in bfloat16, in pieces and at once, a
    prompt's keys and values as near to float32's as the reference's operations in bfloat16 are; and an answer."""
    import numpy as np
    import PIL.Image

    from dgq.runtime.engine.fast import Fast
    from dgq.runtime.engine.plain import Plain
    from dgq.runtime.files.images import placed
    from dgq.runtime.model.slots import PromptView, Slots
    from dgq.runtime.shape.pictured import pictures, pieces

    artifact, rng = open_artifact(TINY), np.random.default_rng(0)
    images = [PIL.Image.fromarray((rng.random((h, w, 3)) * 255).astype("uint8")) for h, w in ((112, 160), (96, 96))]
    text = "<|image|>" + "a long way " * 30 + "<|image|>Sort: wind apple king door"
    ids, shown, front = placed(artifact.tokenizer, text, images)
    prompts = [
        artifact.vision.prompt(ids, shown, artifact.vision.tower(device, torch.float32), front)
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(prompts[1].embeddings.cpu(), prompts[0].embeddings, atol=1e-4, rtol=0)
    results = [
        generate(artifact.load(device, torch.float32), Request([prompt], artifact.generation, 64, seed=7))
        for device, prompt in zip(("cpu", "cuda"), prompts, strict=True)
    ]
    assert results[0].tokens == results[1].tokens

    exact, fast = artifact.load("cuda", torch.float32), artifact.load("cuda")
    plain = artifact.load("cuda", torch.bfloat16, kernels=False)

    def held(passes: Plain | Fast, dtype: torch.dtype, step: int) -> list[torch.Tensor]:
        slots = Slots(fast.config, 1, len(ids) + 256, "cuda", dtype)
        for piece in pieces(prompts[1:], step):
            view = PromptView(slots, 0, piece.start, piece.stop - piece.start)
            part = torch.tensor(prompts[1][piece], device="cuda")[None]
            passes.encode_prompt(part, view, pictures(prompts[1:], piece, fast.device))
        return [buffer.float() for buffer in slots.buffers]

    def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[tuple[float, float]]:
        """Each layer's error, of all places and of the median place."""
        errors = []
        for one, other in zip(ours, theirs, strict=True):
            places = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-9)
            errors.append((float((one - other).norm() / other.norm()), float(places[other.norm(dim=-1) > 0].median())))
        return errors

    truth = held(Plain(exact), torch.float32, 512)
    for one, other in zip(held(Plain(exact), torch.float32, 80), truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    noise = off(held(Plain(plain), torch.bfloat16, 512), truth)
    for step in (512, 80):
        found = off(held(Fast(fast), torch.bfloat16, step), truth)
        for (whole, median), (most, usual) in zip(found, noise, strict=True):
            assert whole < 1.25 * most + 1e-3 and median < 1.1 * usual, (step, whole, most, median, usual)
    assert generate(fast, Request(prompts[1:], artifact.generation, 64, seed=7)).steps[0]


@pytest.mark.parametrize("recipe", ["nvfp4-w4a16", "bnb4"])
def test_transformers_opens_it(recipe: str, tmp_path: Path) -> None:
    """Packed on the GPU, where device_map says: its logits are the CPU's, and it writes."""
    from transformers import DiffusionGemmaForBlockDiffusion

    import dgq.runtime.hf  # noqa: F401

    arguments = ["convert", "tiny", "--to", FORMATS[recipe], "--recipe", recipe, "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    vocab, generator = open_artifact(TINY).config.vocab, torch.Generator().manual_seed(0)
    ids, canvas = (torch.randint(12, vocab, (1, n), generator=generator) for n in (20, 64))
    found = []
    for device in ("cpu", "cuda"):
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(
            tmp_path / "out", dtype=torch.float32, device_map={"": device}
        )
        with torch.no_grad():
            found.append(model(input_ids=ids.to(device), decoder_input_ids=canvas.to(device)).logits.cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=0)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device_map="auto")
    out = model.generate(ids.cuda(), max_new_tokens=64, max_denoising_steps=4, disable_compile=True)
    assert getattr(out, "sequences", out).shape[1] > 20


def test_eights_by_kernels() -> None:
    """FP8 weights, which become bfloat16 when they are loaded, beside NVFP4 ones: the tokens of bfloat16's."""
    artifact = open_artifact(TINY)
    eights, plain = {}, {}
    for name, weight in artifact.weights.items():
        eights[name] = plain[name] = weight
        if len(weight.shape) > 1 and "_proj" in name:
            values = weight.dequantize()
            scale = values.abs().amax(-1, keepdim=True) / 448
            parts = {"": (values / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
            eights[name] = Packed(FP8, weight.shape, parts)
            plain[name] = Packed(BF16, weight.shape, {"": eights[name].dequantize(torch.bfloat16)})
        if name.endswith("experts.down_proj"):
            packed = SCHEMES["nvfp4"].quantize(weight.dequantize())
            eights[name] = plain[name] = Packed(SCHEMES["nvfp4"], weight.shape, packed)
    prompts = [artifact.tokenizer.encode(text) for text in ("Once upon a time there was a king", "The wind")]
    results = [
        generate(Model(artifact.config, weights, "cuda"), Request(prompts, artifact.generation, 128, seed=1, steps=6))
        for weights in (eights, plain)
    ]
    assert results[0].tokens == results[1].tokens and len(results[0].tokens[0]) == 128
