"""ggml's schemes against code we did not write: libgguf (another build of ggml), ggml's own row functions, gguf-py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import libggml
import libgguf
import numpy as np
import pytest
import torch

from dgq.quant.ggml import Q4_K, Q5_0, Q6_K, Q8_0, GGMLScheme
from dgq.quant.types import Packed

SCHEMES = (Q4_K, Q5_0, Q6_K, Q8_0)
ROWS, COLUMNS = 12, 768


def _weights() -> dict[str, torch.Tensor]:
    """Every kind of block a checkpoint may hold, each (12, 768) float32."""
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(ROWS, COLUMNS, generator=g)
    chi = torch.rand(ROWS, COLUMNS, generator=g).clamp(min=1e-3)
    outlier = normal.clone()
    outlier[:, ::97] *= 300
    sparse = normal * (torch.rand(ROWS, COLUMNS, generator=g) < 0.05)
    mixed = normal.clone()
    mixed[:, :256] = 0
    mixed[::2, 256:512] = 0.25
    return {
        "normal": normal * 0.02,
        "heavy-tailed": normal / chi.sqrt() * 0.02,
        "outliers": outlier * 0.02,
        "positive": normal.abs() * 0.02,
        "constant": torch.full((ROWS, COLUMNS), 0.0371),
        "negative constant": torch.full((ROWS, COLUMNS), -1.5),
        "zero": torch.zeros(ROWS, COLUMNS),
        "sparse": sparse,
        "mixed": mixed,
        "tiny": normal * 1e-9,
        "subnormal": normal * 1e-39,
        "huge": normal * 1e4,
        "overflowing": normal * 1e30,
        "bf16": (normal * 0.02).bfloat16().float(),
    }


WEIGHTS = _weights()
IDS = {"ids": lambda value: value if isinstance(value, str) else value.name}


def _reference(scheme: GGMLScheme, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[scheme.name.upper()]
    return np.asarray(libgguf.quantize_rows(rows, kind, imatrix=importance)).view(np.uint8).reshape(len(rows), -1)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES, **IDS)
def test_bytes_equal_another_build_of_ggml(scheme: GGMLScheme, kind: str) -> None:
    weight = WEIGHTS[kind]
    ours = scheme.quantize(weight)[""].numpy()
    np.testing.assert_array_equal(ours, _reference(scheme, weight.numpy()))


@pytest.mark.parametrize("kind", ("normal", "heavy-tailed", "sparse", "zero", "constant", "bf16"))
@pytest.mark.parametrize("scheme", SCHEMES, **IDS)
def test_importance_reaches_the_quantiser(scheme: GGMLScheme, kind: str) -> None:
    weight = WEIGHTS[kind]
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-4
    ours = scheme.quantize(weight, importance)[""].numpy()
    np.testing.assert_array_equal(ours, _reference(scheme, weight.numpy(), importance.numpy()))
    if kind == "normal" and scheme is not Q8_0:  # Q8_0 has nothing to choose
        assert (ours != scheme.quantize(weight)[""].numpy()).any()


@pytest.mark.parametrize("scheme", SCHEMES, **IDS)
def test_a_fused_expert_weight_is_each_expert_alone(scheme: GGMLScheme) -> None:
    g = torch.Generator().manual_seed(3)
    experts = torch.randn(5, 6, COLUMNS, generator=g)
    importance = torch.rand(5, COLUMNS, generator=g)
    fused = scheme.quantize(experts, importance)[""]
    for expert in range(5):
        alone = scheme.quantize(experts[expert], importance[expert])[""]
        assert torch.equal(fused[expert], alone)
    packed = Packed(scheme, (5, 6, COLUMNS), {"": fused})
    assert torch.equal(packed[2].dequantize(), packed.dequantize()[2])
    assert packed[2].shape == (6, COLUMNS) and packed[1:3].shape == (2, 6, COLUMNS)


@pytest.mark.parametrize("scheme", (Q5_0, Q8_0), **IDS)
def test_bytes_equal_gguf_py(scheme: GGMLScheme) -> None:
    """gguf-py encodes these two in numpy; on ordinary weights it agrees with the C code."""
    weight = WEIGHTS["normal"]
    theirs = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[scheme.name.upper()])
    np.testing.assert_array_equal(scheme.quantize(weight)[""].numpy(), theirs)


@pytest.mark.parametrize("scheme", SCHEMES, **IDS)
def test_decoding_any_bytes_equals_ggml_bit_for_bit(scheme: GGMLScheme) -> None:
    """All bit patterns, not only those an encoder writes: random bytes, with finite scales."""
    raw = np.random.default_rng(5).integers(0, 256, (64, 2 * scheme.block_bytes), dtype=np.uint8)
    blocks = torch.from_numpy(raw).view(-1, scheme.block_bytes)
    halves = {"q4_k": (0, 2), "q6_k": (208,), "q5_0": (0,), "q8_0": (0,)}[scheme.name]
    for start in halves:
        scale = torch.randn(len(blocks), 1).half()
        blocks[:, start : start + 2] = scale.view(torch.uint8)
    ours = scheme.dequantize({"": torch.from_numpy(raw)}).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), _ggml_rows(scheme, raw).view(np.uint32))
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[scheme.name.upper()])
    np.testing.assert_array_equal(ours, theirs)


def _ggml_rows(scheme: GGMLScheme, raw: np.ndarray) -> np.ndarray:
    """ggml's dequantize_row_*, straight from the C library."""
    root = Path(next(iter(libggml.__path__)))
    library = ctypes.CDLL(str(next(root.glob("lib*/libggml-base.so"))))
    function = getattr(library, f"dequantize_row_{scheme.name.replace('_k', '_K')}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    out = np.empty((len(raw), raw.shape[1] // scheme.block_bytes * scheme.block), np.float32)
    function(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="704 are no multiple of q4_k's block of 256"):
        Q4_K.quantize(torch.zeros(2, 704))


@pytest.mark.parametrize("scheme", SCHEMES, **IDS)
def test_the_largest_weight_survives_and_the_next_need_not(scheme: GGMLScheme) -> None:
    weight = torch.full((1, 256), scheme.max_abs)
    decoded = scheme.dequantize(scheme.quantize(weight))
    assert torch.allclose(decoded, weight, rtol=0.1)
    lost = scheme.dequantize(scheme.quantize(WEIGHTS["overflowing"]))
    assert not torch.allclose(lost, WEIGHTS["overflowing"], rtol=0.5)
