"""Configs: both styles, GGUF metadata, defaults, and one line for each mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.runtime.shape.config import LayerConfig, ModelConfig
from dgq.runtime.shape.settings import GenerationConfig, SamplerConfig

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
RAW = json.loads((TINY_A / "config.json").read_text())


def parse(**changes):
    """config.json with changes: keys of text_config, or top__key; None removes."""
    raw = json.loads(json.dumps(RAW))
    for key, value in changes.items():
        target, key = (raw, key[5:]) if key.startswith("top__") else (raw["text_config"], key)
        target[key] = value
        if value is None:
            del target[key]
    return ModelConfig.from_json(raw, "config.json")


def test_both_styles_and_gguf_agree():
    config = ModelConfig.from_file(TINY_A / "config.json")
    assert config == ModelConfig.from_file(TINY_A / "config.transformers5.23.json")
    metadata = GGUFReader(TINY_A / "reference.Q4_K_M.gguf").metadata
    gguf = ModelConfig.from_gguf(metadata, "x.gguf")
    assert gguf.norm_eps == pytest.approx(config.norm_eps, rel=1e-6)  # float32 there
    assert replace(gguf, norm_eps=config.norm_eps) == config
    sliding, full = LayerConfig(True, 64, 2), LayerConfig(False, 128, 1)
    assert config.layers == (sliding, sliding, full, sliding, sliding, full)
    assert [layer.has_v_proj for layer in config.layers] == [True, True, False] * 2
    assert (config.hidden, config.experts, config.top_k, config.window, config.canvas) == (256, 12, 4, 16, 32)
    assert config.rope_angles == 16


def test_defaults():
    config = parse(layer_types=None, global_head_dim=None, num_global_key_value_heads=None, rope_parameters=None)
    assert [layer.is_sliding for layer in config.layers] == [True] * 5 + [False]
    assert config.layers[5] == LayerConfig(False, 512, 2)
    assert (config.rope_theta, config.rope_theta_sliding, config.rope_partial) == (1e6, 1e4, 0.25)
    assert config.eos_ids == (1,)
    assert parse(top__eos_token_id=[1, 106]).eos_ids == (1, 106)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top__model_type": "gemma4"}, ["model_type", "gemma4", "diffusion_gemma"]),
        ({"top__text_config": None}, ["text_config is missing"]),
        ({"hidden_size": None}, ["text_config.hidden_size is missing"]),
        ({"hidden_size": "256"}, ["text_config.hidden_size is '256'"]),
        ({"hidden_size": True}, ["text_config.hidden_size is True"]),
        ({"num_experts": 0}, ["text_config.num_experts is 0"]),
        ({"vocab_size": 2**40}, ["text_config.vocab_size is 1099511627776"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers is 10000000"]),
        ({"layer_types": ["full_attention"]}, ["layer_types has 1 entries", "6"]),
        ({"layer_types": ["linear_attention"] * 6}, ["layer_types", "linear_attention"]),
        ({"layer_types": ["sliding_attention"] * 6}, ["last layer must be full_attention"]),
        ({"top_k_experts": 13}, ["top_k_experts 13", "12"]),
        ({"num_key_value_heads": 3}, ["4 heads", "3 key-value"]),
        ({"head_dim": 63}, ["head_dim 63 is odd"]),
        ({"sliding_window": 1}, ["sliding_window is 1"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps is -1.0"]),
        ({"hidden_activation": "silu"}, ["hidden_activation is 'silu'", "gelu_pytorch_tanh"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"use_bidirectional_attention": "all"}, ["use_bidirectional_attention is 'all'"]),
        ({"top__tie_word_embeddings": False}, ["tie_word_embeddings is False"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}}, ["'yarn'"]),
        ({"rope_parameters": {"full_attention": {"factor": 8.0}, "sliding_attention": {}}}, ["factor is 8.0"]),
        ({"per_layer_config": {"2": {"head_dim": "128"}}}, ["per_layer_config.2.head_dim is '128'"]),
    ],
)
def test_mistakes_are_one_line(changes, words):
    with pytest.raises(InputError) as error:
        parse(**changes)
    text = str(error.value)
    assert "\n" not in text and text.startswith("config.json: ")
    for word in words:
        assert word in text


def test_unreadable_files(tmp_path):
    path = tmp_path / "config.json"
    for content in (None, "{", "[]", "\udcff"):
        if content is not None:
            path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=r"config\.json"):
            ModelConfig.from_file(path)


def test_gguf_mistakes():
    metadata = GGUFReader(TINY_A / "reference.Q4_K_M.gguf").metadata
    arch = "diffusion-gemma."
    for changes, words in (
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3'"),
        ({"diffusion.canvas_length": None}, "diffusion.canvas_length is missing"),
        ({arch + "expert_count": None}, "diffusion-gemma.expert_count is missing"),
        ({arch + "attention.sliding_window_pattern": [True]}, "sliding_window_pattern has 1 entries for block_count 6"),
        ({arch + "attention.head_count_kv": ["x"] * 6}, "attention.head_count_kv"),
        ({arch + "attention.value_length": 64}, "attention.value_length is 64"),
        ({arch + "attention.shared_kv_layers": 2}, "attention.shared_kv_layers is 2"),
    ):
        with pytest.raises(InputError, match=r"x\.gguf: ") as error:
            ModelConfig.from_gguf({**metadata, **changes}, "x.gguf")
        assert words in str(error.value)


def test_generation_settings(tmp_path):
    config = ModelConfig.from_file(TINY_A / "config.json")
    absent = GenerationConfig.from_file(tmp_path / "generation_config.json", config)
    assert absent == GenerationConfig(SamplerConfig(48, 0.4, 0.8, 0.1, 1, 0.005), (1,), 0, 256)
    read = GenerationConfig.from_file(TINY_A / "generation_config.json", config)
    assert read == replace(absent, eos_ids=(1, 282, 287))
    own = {"max_denoising_steps": 9, "t_max": 1, "stability_threshold": 0, "sampler_config": {"entropy_bound": 0.3}}
    read = GenerationConfig.from_json(own, config, "g.json")
    assert read.sampler == SamplerConfig(9, 0.4, 1.0, 0.3, 0, 0.005)
    metadata = GGUFReader(TINY_A / "reference.Q4_K_M.gguf").metadata
    bare = GenerationConfig.from_gguf(metadata, config, "x.gguf")
    assert bare.eos_ids == (1, 357, 362)  # <eos>, <turn|>, <|tool_response>
    assert bare.sampler.t_min == pytest.approx(0.4)
    bare = GenerationConfig.from_gguf({**metadata, "diffusion.eb_max_steps": None}, config, "x.gguf")
    assert bare.sampler.steps == 48


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"t_min": 0.9}, "t_max 0.8 is not above t_min 0.9"),
        ({"max_denoising_steps": -1}, "max_denoising_steps is -1"),
        ({"stability_threshold": -1}, "stability_threshold is -1"),
        ({"eos_token_id": [1, 512]}, "eos_token_id 512 is outside the vocabulary of 512"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"sampler_config": {"_cls_name": "Other"}}, "_cls_name is 'Other'"),
        ({"sampler_config": {}}, "sampler_config.entropy_bound is missing"),
    ],
)
def test_bad_generation_settings(raw, words):
    config = ModelConfig.from_file(TINY_A / "config.json")
    with pytest.raises(InputError) as error:
        GenerationConfig.from_json(raw, config, "g.json")
    assert str(error.value).startswith("g.json: ") and words in str(error.value)
