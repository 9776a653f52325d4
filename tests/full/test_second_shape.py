"""The second shape (tests/tools/second.py) where `tiny` has luck: converters, artifacts in the runtime and in
transformers, blocks and tokens, images, bfloat16, and twelve layers that transformers saved."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import bench_bf16_parity as parity
import bitsandbytes.functional as bnb
import numpy as np
import PIL.Image
import pytest
import test_artifact_parity
import torch
from second import PACKED, in_transformers, second_config, write_second, write_seeing
from test_artifact_parity import Both
from test_runtime_parity import both as tokens_of_both
from test_runtime_parity import opened, prompts
from test_schemes import _reference
from transformers import DynamicCache

import dgq.runtime.hf  # noqa: F401  # so that transformers opens what dgq wrote
from dgq.convert import convert
from dgq.convert.write.conversion import ConvertOptions
from dgq.runtime.engine.batch import encode_each
from dgq.runtime.files.artifact import Artifact, open_artifact
from dgq.runtime.files.images import placed
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model

FORMATS = {"nvfp4-w4a16": "nvfp4", "nvfp4-all": "nvfp4", "bnb4-dq": "bnb4", "q4_k_m": "gguf"}
EAGER = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
pytestmark = pytest.mark.xdist_group("second")


@pytest.fixture(scope="session")
def source(shared: Any) -> Path:
    """With rows that blocks fit, two layers, and few tokens."""
    config = second_config(layers=2, vocab=512, widths=PACKED)
    config["text_config"]["layer_types"] = ["sliding_attention", "full_attention"]
    path: Path = shared.made("second-packed", lambda folder: write_second(folder, config=config))
    return path


@pytest.fixture(scope="module", params=FORMATS)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def artifact(recipe: str, source: Path, shared: Any) -> Artifact:
    def made(folder: Path) -> None:
        convert(source, FORMATS[recipe], folder / "out", ConvertOptions(recipe, effort="stock"))

    return open_artifact(shared.made(f"second-{recipe}", made) / "out")


@pytest.fixture(scope="module")
def both(artifact: Artifact, source: Path) -> Both:
    """The artifact's weights packed in the runtime, and decoded in transformers."""
    oracle = in_transformers(source, **EAGER)
    for name, weight in artifact.weights.items():
        target = oracle.get_parameter(name) if "layer_scalar" not in name else oracle.get_buffer(name)
        with torch.no_grad():
            target.copy_(weight.dequantize())
    return Both(
        artifact, Model(artifact.config, artifact.weights, options=LoadOptions(keep_decoded=0)), oracle, (110, 30, 70)
    )


def nvfp4_by_arithmetic(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of eight magnitudes, ties to the even one, times E4M3 scales of 16, times one scale an expert."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    whole = weight.abs().amax((-2, -1), keepdim=True) / torch.tensor(6 * 448.0)
    blocks = weight.unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / (whole * 6)).to(torch.float8_e4m3fn).float()
    steps = (scales * whole).unsqueeze(-1)
    scaled = (blocks / steps).double()
    far = (scaled.abs().unsqueeze(-1) - values).abs()
    code = far.argmin(-1)
    after = (code + 1).clamp(max=7)
    tie = (far.gather(-1, after.unsqueeze(-1)) == far.gather(-1, code.unsqueeze(-1))).squeeze(-1)
    code = torch.where(tie & (code % 2 == 1), after, code)
    return (values[code].float() * scaled.sign().float() * steps).flatten(-2)


def test_bytes_of_converters(artifact: Artifact, source: Path) -> None:
    """Each matrix against its format's own code, or arithmetic; what is in 16 bits is the source's."""
    original, schemes = open_artifact(source).weights, set()
    for name, weight in artifact.weights.items():
        first, scheme = original[name].dequantize(), weight.scheme.name
        schemes.add(scheme)
        if scheme == "nvfp4":
            few = slice(0, 3 if first.dim() == 3 else None)  # experts, which are scaled one by one
            assert torch.equal(weight.dequantize()[few], nvfp4_by_arithmetic(first[few])), name
            continue
        elif scheme.startswith("nf4"):
            bf16, double = original[name].dequantize(torch.bfloat16), scheme == "nf4_dq"
            packed, state = bnb.quantize_4bit(bf16, quant_type="nf4", blocksize=64, compress_statistics=double)
            state.dtype = torch.float32
            expected = bnb.dequantize_4bit(packed, state)
        elif weight.scheme.ggml is not None and scheme not in ("f32", "bf16", "f16"):
            theirs = _reference(weight.scheme, first.flatten(0, -2).numpy())
            assert np.array_equal(weight.parts[""].flatten(0, -2).numpy(), theirs), name
            continue
        else:
            expected = first
        assert torch.equal(weight.dequantize(), expected), name
    quantised = schemes - {"f32", "bf16"}
    assert quantised == ({"q4_k", "q5_0", "q6_k", "q8_0"} if artifact.kind == "gguf" else quantised) != set()


def test_logits_of_three_rows(both: Both) -> None:
    """Padded on the left, past the window, over two committed blocks, with and without self-conditioning."""
    test_artifact_parity.test_logits_over_blocks(both)


def test_transformers_opens_them(recipe: str, artifact: Artifact, both: Both) -> None:
    """Packed modules of dgq.runtime.hf, a batch of three rows, against the decoded weights."""
    if recipe in ("q4_k_m", "nvfp4-all"):
        pytest.skip("transformers has no loader for it")
    found = in_transformers(artifact.path)
    generator, vocab = torch.Generator().manual_seed(0), artifact.config.vocab
    ids = torch.randint(5, vocab, (3, 20), generator=generator)
    canvas = torch.randint(0, vocab, (3, artifact.config.canvas), generator=generator)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, decoder_input_ids=canvas).logits for model in (found, both.oracle))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_tokens_over_blocks(shared: Any) -> None:
    """Three rows of different lengths, two blocks, ids beyond 65,536: generate()'s tokens. A random model is not sure
    early; "tinyA" is whose confidence the test of that one has."""
    pair = opened("tinyA", shared.made("second-16", lambda folder: write_second(folder)))
    rows = prompts(pair[2], [13, 3, 7], 4)
    result, expected = tokens_of_both(pair, rows, 12, eos=(1,), steps=2, blocks=2)
    assert result.canvases.tolist() == expected.tolist()
    assert int(result.canvases.max()) > 65_535


def test_images(tmp_path: Path) -> None:
    """An image of 70 soft tokens, over four windows: soft tokens and logits are transformers'."""
    artifact = open_artifact(write_seeing(tmp_path / "seeing"))
    oracle, model = in_transformers(artifact.path, **EAGER), artifact.load("cpu", torch.float32)
    noise = (np.random.default_rng(2).random((112, 160, 3)) * 255).astype("uint8")
    tower = artifact.vision.tower("cpu", torch.float32)
    ids, shown, front = placed(artifact.tokenizer, "Sort: wind apple", [PIL.Image.fromarray(noise)])
    prompt, patches = artifact.vision.prompt(ids, shown, tower, front), artifact.vision.patches(shown[0])
    length, canvas = len(prompt), torch.arange(artifact.config.canvas)[None] * 50
    at, kinds = torch.arange(length)[None], torch.tensor([prompt.is_image]).int()
    cache = DynamicCache(config=oracle.config.get_text_config())
    with torch.no_grad():
        seen = oracle.model.encoder.get_image_features(patches.values, patches.positions).pooler_output
        torch.testing.assert_close(prompt.embeddings, seen, atol=1e-5, rtol=0)
        masks = oracle.model.encoder.create_masks_for_generate(
            config=oracle.config, inputs_embeds=torch.empty(1, length, 0), past_key_values=cache, position_ids=at,
            attention_mask=torch.ones(1, length, dtype=torch.bool), mm_token_type_ids=kinds,
        )  # fmt: skip
        oracle.model.encoder(
            input_ids=torch.tensor(prompt[:])[None], attention_mask=masks, past_key_values=cache, position_ids=at,
            pixel_values=patches.values, image_position_ids=patches.positions,
        )  # fmt: skip
        places = torch.arange(length, length + canvas.shape[1])[None]
        expected = oracle(decoder_input_ids=canvas, past_key_values=cache, decoder_position_ids=places).logits
    found = model.decode(canvas, encode_each(model, [prompt], length + canvas.shape[1]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_bfloat16_is_as_far_as_transformers_is() -> None:
    """From float32, in the median position, with a packed table: near-ties of a router decide the largest distance of
    so few prompts, see tests/benchmarks/bench_bf16_parity.py."""
    made = parity.made(*parity.CASES[1], vocab=512, device="cpu")
    options = argparse.Namespace(path="plain", prompts=2, seed=0, unrounded_scale=False)
    figures = parity.measured(made, options)
    assert all(figures[part]["factor"]["median"] <= 1.25 for part in ("first", "again")), figures


def test_twelve_layers_that_transformers_saved(tmp_path: Path) -> None:
    """per_layer_config's keys are "02", "05", "08" and "11": the same logits as the unsaved model's, from BF16 and from
    its conversion; and transformers' logits."""
    config = second_config(layers=12, vocab=512, widths=(128, 64, 64))
    unsaved = write_second(tmp_path / "unsaved", config=config)
    in_transformers(unsaved, torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="5MB")
    saved = (tmp_path / "saved" / "config.json").read_text()
    assert '"02"' in saved and '"11"' in saved
    for file in unsaved.glob("*token*"):
        shutil.copy(file, tmp_path / "saved")
    canvas = torch.arange(32)[None] * 13
    logits = []
    for name in ("unsaved", "saved"):
        for recipe in (None, "nvfp4-w4a16"):
            path = tmp_path / name
            if recipe is not None:
                path = tmp_path / f"{name}-packed"
                convert(tmp_path / name, "nvfp4", path, ConvertOptions(recipe, effort="stock"))
            model = open_artifact(path).load("cpu", torch.float32)
            logits.append(model.decode(canvas, encode_each(model, [[2, 7, 9, 300]], 40)))
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    theirs = in_transformers(unsaved, **EAGER)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([[2, 7, 9, 300]]), decoder_input_ids=canvas).logits
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
