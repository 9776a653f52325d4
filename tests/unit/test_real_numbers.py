"""Numbers of the released model that are exact in `tiny` by luck: a width whose root no bfloat16 holds, thirty layers,
whose numbers transformers pads with zeros. The right values are transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from micro import GOLDEN, micro_config, micro_tensors
from second import HIDDEN
from transformers import AutoConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaTextRotaryEmbedding,
    DiffusionGemmaTextScaledWordEmbedding,
)

from dgq.quant.errors import InputError
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import Packed
from dgq.runtime.model.attention import rope_frequencies, rope_tables
from dgq.runtime.model.layers import embed, embedding_scale, soft_embed
from dgq.runtime.model.loading import LoadOptions
from dgq.runtime.model.model import Model
from dgq.runtime.shape.config import ModelConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton.runtime.)?interpreter"),
]
REAL = GOLDEN / "real26b" / "config.json"
WIDTHS = (256, HIDDEN, 704, 768, 2816)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_scaled_as_transformers_scales_them(hidden: int, dtype: torch.dtype) -> None:
    table = torch.randn(40, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs = DiffusionGemmaTextScaledWordEmbedding(40, hidden, 0, hidden**0.5)
    theirs.weight.data = table.to(dtype)
    ids = torch.arange(40)
    packed = Packed(SCHEMES["bf16"], tuple(table.shape), {"": table})
    assert torch.equal(embed(ids, packed, dtype), theirs(ids))
    certain = torch.full((40, 40), -torch.inf).fill_diagonal_(0)  # softmax gives each row of the table alone
    assert torch.equal(soft_embed(certain, packed, dtype), theirs(ids))


def test_the_released_width_is_rounded() -> None:
    """sqrt(2816) is 53.066; a bfloat16 holds 53.0 and 53.25."""
    assert embedding_scale(2816, torch.bfloat16) == 53.0
    assert embedding_scale(2816, torch.float32) == pytest.approx(2816**0.5, rel=1e-7)


@pytest.mark.parametrize(("hidden", "scheme"), [(HIDDEN, "bf16"), (HIDDEN, "q8_0"), (768, "q6_k")])
def test_the_fast_backend_embeds_as_transformers_does(
    hidden: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a packed table, as a .gguf or nvfp4-all has on a small card, the factor had not been rounded: every number
    was 1.0013 times (Q8_0) or .9987 times (Q6_K) transformers'."""
    fast = pytest.importorskip("dgq.runtime.engine.fast", reason="needs Triton", exc_type=ImportError)
    monkeypatch.setattr("dgq.runtime.model.loading.decodes", lambda *_: False)  # packed, as on a small card
    raw = micro_config()
    raw["text_config"] |= {
        "hidden_size": hidden, "intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 128,
    }  # fmt: skip
    weights = {}
    for name, values in micro_tensors(raw).items():
        kind = SCHEMES[scheme if "embed_tokens" in name else "bf16"]
        weights[name] = Packed(kind, tuple(values.shape), kind.quantize(values))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig.from_json(raw, "config.json")
    backend = fast.Fast(Model(config, weights, device, torch.bfloat16, options=LoadOptions(kernels=True)))
    theirs = DiffusionGemmaTextScaledWordEmbedding(128, hidden, 0, hidden**0.5)
    theirs.weight.data = next(w for n, w in weights.items() if "embed_tokens" in n).dequantize(torch.bfloat16)
    ids = torch.tensor([0, 1, 7, 64, 127])
    assert torch.equal(backend._embed(ids.to(device)).cpu(), theirs(ids))


FAR = (0, 1, 1023, 65_535, 65_537, 131_071, 262_143)


@pytest.fixture(scope="module")
def rotary(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, DiffusionGemmaTextRotaryEmbedding]:
    """The released config, and transformers' rotary embedding for it."""
    path = tmp_path_factory.mktemp("real")
    (path / "config.json").write_bytes(REAL.read_bytes())
    config = AutoConfig.from_pretrained(path).get_text_config()
    return ModelConfig.from_file(REAL), DiffusionGemmaTextRotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_beyond_65536(
    rotary: tuple[ModelConfig, DiffusionGemmaTextRotaryEmbedding], kind: str, dtype: torch.dtype
) -> None:
    """The angles of the reference's operations are transformers', to the bit, up to the last position."""
    config, theirs = rotary
    layer = next(one for one in config.layers if one.is_sliding == (kind == "sliding_attention"))
    positions = torch.tensor([FAR])
    ours = rope_tables(rope_frequencies(config, layer), positions, dtype)
    for mine, expected in zip(ours, theirs(torch.zeros(1, dtype=dtype), positions, kind), strict=True):
        assert torch.equal(mine.squeeze(2), expected)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_positions_beyond_65536_by_kernels(
    rotary: tuple[ModelConfig, DiffusionGemmaTextRotaryEmbedding], kind: str
) -> None:
    """The kernel's angles are float32, as transformers' are; cos and sin differ by what their libraries do."""
    fused = pytest.importorskip("dgq.runtime.kernels.fused", reason="needs Triton", exc_type=ImportError)
    config, theirs = rotary
    layer = next(one for one in config.layers if one.is_sliding == (kind == "sliding_attention"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = torch.tensor(FAR, dtype=torch.int32, device=device)
    ours = fused.rotations(lengths, rope_frequencies(config, layer).to(device), 1)
    for mine, expected in zip(ours, theirs(torch.zeros(1), torch.tensor([FAR]), kind), strict=True):
        torch.testing.assert_close(mine.cpu(), expected[0, :, : mine.shape[1]], atol=2e-6, rtol=0)


def test_the_released_config_saved_by_transformers_is_read(tmp_path: Path) -> None:
    """Its per_layer_config has the keys "05", "11", … for 30 layers."""
    (tmp_path / "config.json").write_bytes(REAL.read_bytes())
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "config.json"
    assert "05" in json.loads(saved.read_text())["text_config"]["per_layer_config"]
    assert ModelConfig.from_file(saved) == ModelConfig.from_file(REAL)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (("5", "05"), "two entries for layer 5, '5' and '05'"),
        (("30",), "entry '30' for 30 layers"),
        (("-1",), "entry '-1' for 30 layers"),
        (("5 ",), "entry '5 ' for 30 layers"),
        (("٥",), "entry '٥' for 30 layers"),  # a decimal digit, and none of JSON's
        (("1_1",), "entry '1_1' for 30 layers"),
        (("0" * 5000,), "for 30 layers"),
    ],
)
def test_other_keys_are_refused(keys: tuple[str, ...], text: str) -> None:
    raw = json.loads(REAL.read_text())
    raw["text_config"]["per_layer_config"] = {key: {"head_dim": 512} for key in keys}
    with pytest.raises(InputError, match="per_layer_config has") as caught:
        ModelConfig.from_json(raw, "config.json")
    assert text in str(caught.value)
