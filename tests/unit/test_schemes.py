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
from kinds import KINDS, block

from dgq.quant.schemes.fourbit import count_below, is_below, largest
from dgq.quant.schemes.ggml.blocks import GGMLScheme
from dgq.quant.schemes.ggml.iq4_nl import IQ4_NL
from dgq.quant.schemes.ggml.q4_k import Q4_K
from dgq.quant.schemes.ggml.q5_0 import Q5_0
from dgq.quant.schemes.ggml.q5_k import Q5_K
from dgq.quant.schemes.ggml.q6_k import Q6_K
from dgq.quant.schemes.ggml.q8_0 import Q8_0
from dgq.quant.schemes.nf4 import NF4, NF4_DQ
from dgq.quant.schemes.nvfp4 import NVFP4
from dgq.quant.types import Packed, Scheme

SCHEMES = (Q4_K, Q5_0, Q5_K, Q6_K, Q8_0, IQ4_NL)
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
    halves = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q5_0": (0,), "q8_0": (0,), "iq4_nl": (0,)}[scheme.name]
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", (NVFP4, NF4, NF4_DQ), **IDS)
def test_bytes_do_not_depend_on_pieces_or_strides(scheme: Scheme, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block, of a few that end inside rows, and of everything; a weight that is a view of others."""
    generator = torch.Generator().manual_seed(4)
    fused = torch.stack([block(kind, 24, 320, generator) for _ in range(2)])
    expected = scheme.quantize(fused)
    spread = torch.zeros(2, 24, 640, dtype=torch.bfloat16)[..., ::2].copy_(fused)
    for piece, weight in ((1, fused), (448, fused), (1 << 30, fused), (1 << 17, spread), (448, fused.float())):
        monkeypatch.setattr("dgq.quant.schemes.fourbit._PIECE", piece)
        before = weight.clone()
        for name, part in scheme.quantize(weight).items():
            pair = [t.contiguous().flatten().view(torch.uint8) for t in (part, expected[name])]
            assert part.shape == expected[name].shape and torch.equal(*pair), (piece, name)
        assert torch.equal(weight, before), "the weight was written to"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_the_largest_of_every_block(dtype: torch.dtype) -> None:
    """Of all bit patterns, NaN and infinities among them, and with one weight at every place of a block."""
    generator = torch.Generator().manual_seed(6)
    raw = torch.randint(0, 256, (640, 64 * dtype.itemsize), generator=generator).to(torch.uint8)
    one = torch.eye(64).to(dtype) * -3
    for weight in (raw.view(dtype), raw.view(dtype).nan_to_num(0, 1, -1), one, torch.full((1, 64), -0.0, dtype=dtype)):
        for size in (16, 64):
            expected = weight.float().unflatten(-1, (-1, size)).abs().amax(-1)
            assert torch.equal(largest(weight, size).nan_to_num(-1, -2), expected.nan_to_num(-1, -2))
    assert bool(largest(raw.view(dtype), 16).isnan().any()) and not bool((largest(one, 64) != 3).any())


def test_sorting_into_intervals() -> None:
    """Below, at and above every bound by one step, both zeros, subnormals, infinities, NaN of either sign."""
    bounds = torch.tensor([-1.0, -0.25, 0.0, 1e-40, 0.25, 3.5])
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38, -3e38])
    steps = [torch.nextafter(bounds, torch.full_like(bounds, to)) for to in (torch.inf, -torch.inf)]
    nan = torch.tensor([-(1 << 22)], dtype=torch.int32).view(torch.float32)
    x = torch.cat([bounds, *steps, ends, nan])
    count = [sum(float(bound) < v for bound in bounds) if v == v else len(bounds) for v in x.tolist()]
    assert count_below(x, bounds).tolist() == count
    for bound in bounds.tolist():
        assert is_below(x, bound).tolist() == [int(v < bound) for v in x.tolist()]
