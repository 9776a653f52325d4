"""The runtime against transformers' DiffusionGemma: uncompiled, dynamic cache, sdpa, float32.

tinyA is random and sharp (window 16, canvas 32); tiny is trained, so that its canvases settle and stop early. second-16
and second-48 are random and have none of these two's luck (tests/tools/second.py).
"""

import json
from pathlib import Path

import pytest
import torch
from second import WINDOWS, write_second

from dgq.runtime.engine import batch
from dgq.runtime.engine.engine import Request, generate
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

TESTS = Path(__file__).parent.parent
PROMPTS = TESTS.parent / "recipes" / "prompts"
MODELS = {"tinyA": TESTS / "golden" / "tinyA", "tiny": TESTS.parent / "recipes" / "tiny"}
# Random weights never get confident enough for the released threshold; 0.08 nats stops most of tinyA's canvases.
CONFIDENCE = {"tinyA": 0.08, "tiny": 0.005}

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_compiler")


SECONDS = {f"second-{window}": window for window in WINDOWS}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(name, our model, its artifact, transformers' model) of one checkpoint."""
    return opened(request.param, MODELS[request.param])


@pytest.fixture(scope="module", params=[*MODELS, *SECONDS])
def shape(request, shared):
    """The same, of the second shapes too: for tests of a few passes, since their vocabulary is large."""
    name = request.param
    if name in MODELS:
        return opened(name, MODELS[name])
    return opened(name, shared.made(name, lambda path: write_second(path, SECONDS[name])))


def opened(name, path):
    artifact = open_artifact(path)
    oracle = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    return name, artifact.load(), artifact, oracle


def prompts(artifact, lengths, seed=0):
    """Random tokens, `lengths` in quarters of a window."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [n * artifact.config.window // 4 for n in lengths]
    return [torch.randint(5, artifact.config.vocab, (n,), generator=generator).tolist() for n in lengths]


def asked(pair, count, seed):
    """Prompts that a trained model has an answer to, every third one a long text; random tokens for tinyA."""
    name, _, artifact, _ = pair
    if name == "tinyA":
        return prompts(artifact, [1 + (7 * i + 5 * seed) % 17 for i in range(count)], seed)
    tasks, texts = (
        [json.loads(line) for line in (PROMPTS / f"heldout_{kind}.jsonl").read_text().splitlines()]
        for kind in ("tasks", "text")
    )
    chats = [artifact.tokenizer.chat(tasks[8 * seed + i]["messages"]) for i in range(count)]
    long = [artifact.tokenizer.encode(texts[seed + i]["text"])[: 3 * artifact.config.window] for i in range(count)]
    return [long[i] if (i + seed) % 3 == 2 else chats[i] for i in range(count)]


def padded(rows, pad):
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])


@pytest.mark.parametrize("lengths", [(2,), (15,), (10, 3, 7)], ids=["short", "past the window", "left padding"])
def test_logits_over_blocks(shape, lengths):
    """With and without self-conditioning, before any committed block and after each of three; of two where the
    vocabulary is large."""
    name, model, artifact, oracle = shape
    config = artifact.config
    ids, real = padded(prompts(artifact, lengths), artifact.generation.pad_id)
    generator = torch.Generator().manual_seed(1)
    cache = model.new_cache(len(lengths))
    theirs = transformers.DynamicCache(config=oracle.config.get_text_config())
    padding = None if real.all() else ~real
    for block in range(3 if name in SECONDS else 4):
        start = cache.length
        model.encode(ids, cache, padding=padding)
        canvas = torch.randint(0, config.vocab, (len(lengths), config.canvas), generator=generator)
        ours = model.decode(canvas, cache)
        ours_again = model.decode(canvas, cache, ours / 0.7)
        with torch.no_grad():
            positions = torch.arange(start, start + ids.shape[1])[None]
            oracle.model.encoder(input_ids=ids, attention_mask=real, past_key_values=theirs, position_ids=positions)
            seen = torch.nn.functional.pad(real, (0, config.canvas), value=True)
            step = {"decoder_input_ids": canvas, "past_key_values": theirs, "decoder_attention_mask": seen}
            step["decoder_position_ids"] = torch.arange(cache.length, cache.length + config.canvas)[None]
            expected = oracle(**step).logits
            expected_again = oracle(**step, self_conditioning_logits=ours / 0.7).logits
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0, msg=lambda m, b=block: f"block {b}: {m}")
        torch.testing.assert_close(ours_again, expected_again, atol=1e-4, rtol=0)
        ids, padding = canvas, None
        real = seen


def oracle_generate(oracle, rows, pad, seed, **settings):
    ids, real = padded(rows, pad)
    torch.manual_seed(seed)
    bound = transformers.models.diffusion_gemma.generation_diffusion_gemma.EntropyBoundSamplerConfig(
        entropy_bound=settings.pop("entropy_bound")
    )
    masks = {} if real.all() else {"attention_mask": real}
    out = oracle.generate(ids, sampler_config=bound, disable_compile=True, pad_token_id=pad, **masks, **settings)
    return out.sequences[:, ids.shape[1] :], out.tokens_per_forward


def both(pair, rows, seed, eos, steps, blocks, bound=0.1, stability=1):
    """Committed canvases of ours and theirs for one seed, and our result."""
    name, model, artifact, oracle = pair
    sampler = SamplerConfig(steps=steps, entropy_bound=bound, stability=stability, confidence=CONFIDENCE[name])
    pad = artifact.generation.pad_id
    tokens = blocks * artifact.config.canvas
    result = generate(model, Request(rows, GenerationConfig(sampler, eos, pad), tokens, seed=seed, rng="torch"))
    expected, per_forward = oracle_generate(
        oracle, rows, pad, seed, max_new_tokens=tokens, max_denoising_steps=steps, entropy_bound=bound, t_min=0.4,
        t_max=0.8, stability_threshold=stability, confidence_threshold=CONFIDENCE[name], eos_token_id=list(eos),
    )  # fmt: skip
    for row, counts in enumerate(result.steps):
        valid = (expected[row] != pad).sum() if pad is not None else expected.shape[1]
        assert float(per_forward[row]) == pytest.approx(float(valid) / sum(counts))
    return result, expected


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_single_prompts(pair, seed):
    """5 prompts, 3 blocks each, stopping early; <eos> alone ends a row, so that (nearly) all blocks are made. On tiny
    the released 48 steps: seed 2's long text never settles and takes them all, in one block."""
    steps, blocks = (48, 1 if seed == 2 else 3) if pair[0] == "tiny" else (10, 3)
    result, expected = both(pair, asked(pair, 1, seed), seed, eos=(1,), steps=steps, blocks=blocks)
    assert result.canvases.tolist() == expected.tolist()


def test_tokens_of_a_batch(pair):
    """Rows of different lengths; some end at a token that the first run showed to be produced."""
    rows = asked(pair, 3, 5)
    free, expected = both(pair, rows, 11, eos=(1,), steps=8, blocks=2)
    assert free.canvases.tolist() == expected.tolist()
    eos = int(free.canvases[1, 3])
    result, expected = both(pair, rows, 11, eos=(1, eos), steps=8, blocks=2)
    assert result.canvases.tolist() == expected.tolist()
    assert result.ended[1] and len(result.steps[1]) == 1
    assert result.tokens[1] == free.canvases[1, : free.canvases[1].tolist().index(eos)].tolist()


@pytest.mark.parametrize(("bound", "stability"), [(2.0, 2), (0.02, 0)])
def test_tokens_under_other_settings(pair, bound, stability):
    rows = asked(pair, 2, 7)
    result, expected = both(pair, rows, 2, eos=(1,), steps=10, blocks=2, bound=bound, stability=stability)
    assert result.canvases.tolist() == expected.tolist()


def test_some_canvases_stopped_early(pair):
    """The tests above would say little if nothing ever stopped, or everything at once."""
    name, model, artifact, _ = pair
    sampler = SamplerConfig(steps=16, confidence=CONFIDENCE[name])
    settings = GenerationConfig(sampler, (1,), artifact.generation.pad_id)
    result = generate(model, Request(asked(pair, 3, 3), settings, 3 * artifact.config.canvas, seed=4, rng="torch"))
    early = [flag for row in result.stopped_early for flag in row]
    assert any(early)
    assert len({count for row in result.steps for count in row}) > 1


def test_chunked_prefill(shape, monkeypatch):
    """A prompt encoded in pieces is the prompt encoded at once: logits, one prompt after the other and padded."""
    _, model, artifact, _ = shape
    rows = prompts(artifact, [17, 11], 9)
    longest = max(map(len, rows))
    canvas = torch.randint(5, artifact.config.vocab, (2, artifact.config.canvas))
    lengths, encode = [], model.encode

    def logits():
        lengths.clear()
        prefills = batch.encode_each(model, rows, longest + 1), batch._prefill(model, rows, 0, longest + 1)
        return [model.decode(canvas, cache) for cache in prefills]

    monkeypatch.setattr(model, "encode", lambda ids, *a, **k: (lengths.append(ids.shape[1]), encode(ids, *a, **k)))
    whole = logits()
    assert lengths == [*map(len, rows), longest]
    monkeypatch.setattr(batch, "PREFILL", 13)
    for found, expected in zip(logits(), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert max(lengths) == 13 and sum(lengths) == sum(map(len, rows)) + longest
