"""Names and shapes against a checkpoint and a .gguf that other people's code wrote."""

import math
from pathlib import Path

import pytest

from dgq.quant.errors import InputError
from dgq.quant.files.gguf_file import GGUFReader
from dgq.quant.files.hf_dir import HFDir
from dgq.runtime.shape.config import ModelConfig
from dgq.runtime.shape.names import (
    EMBEDDING,
    ROPE_FREQS,
    VISION,
    check_tensors,
    expected_tensors,
    gguf_name,
    hf_name,
    layer_of,
)

TINY_A = Path(__file__).parent.parent / "golden" / "tinyA"
CONFIG = ModelConfig.from_file(TINY_A / "config.json")


def test_expected_is_what_the_checkpoint_holds():
    specs = HFDir(TINY_A).specs
    assert expected_tensors(CONFIG) == {n: s.shape for n, s in specs.items() if not n.startswith(VISION)}


def test_map_is_the_converters():
    reader = GGUFReader(TINY_A / "reference.Q4_K_M.gguf")
    shapes = {gguf_name(name): shape for name, shape in expected_tensors(CONFIG).items()}
    assert shapes == {name: reader.shape(name) for name in reader if name != ROPE_FREQS}


def test_map_is_its_own_inverse():
    for name in expected_tensors(CONFIG):
        own = gguf_name(name)
        assert own is not None and hf_name(own) == name
    for unknown in (ROPE_FREQS, "blk.0.other.weight", "blk.x.attn_q.weight", "output.weight"):
        assert hf_name(unknown) is None
    for unknown in ("model.encoder.vision_tower.x", "lm_head.weight", "model.decoder.layers.0.other"):
        assert gguf_name(unknown) is None


def test_the_layer_of_a_name():
    for name in expected_tensors(CONFIG):
        number = layer_of(name)
        assert (number is None) == (".layers." not in name)
        assert number is None or f"layers.{number}." in name
        assert number == layer_of(gguf_name(name) or "")


def test_check_tensors():
    good = expected_tensors(CONFIG)
    check_tensors(good, good, "f")
    missing = {name: shape for name, shape in good.items() if name != EMBEDDING}
    for bad, words in (
        (missing, [f"f: tensor {EMBEDDING} is missing (1 of"]),
        (good | {"lm_head.weight": (512, 256)}, ["f: tensor lm_head.weight is not part of the model"]),
        (missing | {"model.embed.weight": (512, 256)}, [EMBEDDING, "model.embed.weight", "renamed"]),
        (good | {EMBEDDING: (512, 255)}, [f"tensor {EMBEDDING} has shape [512, 255], the config says [512, 256]"]),
    ):
        with pytest.raises(InputError) as error:
            check_tensors(bad, good, "f")
        assert all(word in str(error.value) for word in words)


def test_the_26b():
    """The released shape: 691 tensors a .gguf copies (692 with rope_freqs), 25,250,987,068 elements with its 256."""
    text = {
        "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704, "num_experts": 128,
        "top_k_experts": 8, "num_attention_heads": 16, "num_hidden_layers": 30, "head_dim": 256,
        "num_key_value_heads": 8, "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024,
        "vocab_size": 262144,
    }  # fmt: skip
    config = ModelConfig.from_json({"model_type": "diffusion_gemma", "text_config": text}, "config.json")
    shapes = expected_tensors(config)
    assert len(shapes) == 691
    assert sum(math.prod(shape) for shape in shapes.values()) + 256 == 25_250_987_068
    assert shapes["model.decoder.layers.5.self_attn.k_proj.weight"] == (1024, 2816)
    assert "model.decoder.layers.5.self_attn.v_proj.weight" not in shapes
    assert config.rope_angles == 64
