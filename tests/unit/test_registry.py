"""Nothing of a scheme is forgotten: each row of the registry has a reference for its bytes, a decision for the GPU, a
recipe that uses it and a line in the guides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from dgq.convert.plans.recipes import recipes
from dgq.quant.errors import InputError
from dgq.quant.schemes.fp8 import FP8
from dgq.quant.schemes.registry import SCHEMES
from dgq.quant.types import DECODED, GPUForm, Packed, Scheme
from dgq.runtime.kernels.repack import COLUMNS, REPACK, tile

ROOT = Path(__file__).parents[2]
PLAIN = {"bf16", "f16", "f32"}
ANOTHER_GGML = ("test_schemes.py", "test_bytes_equal_another_build_of_ggml")
MODELOPT = ("test_nvfp4.py", "oracle_modelopt")
BITSANDBYTES = ("test_bnb.py", "bitsandbytes")

# Scheme -> the file that holds its bytes against code that is not dgq's, and what says so there. Casts are torch's.
ORACLES: dict[str, tuple[str, str]] = {
    "q4_k": ANOTHER_GGML,
    "q5_0": ANOTHER_GGML,
    "q5_k": ANOTHER_GGML,
    "q6_k": ANOTHER_GGML,
    "q8_0": ANOTHER_GGML,
    "iq4_nl": ANOTHER_GGML,
    "nvfp4": MODELOPT,
    "nf4": BITSANDBYTES,
    "nf4_dq": BITSANDBYTES,
}
QUANTISED = [name for name in SCHEMES if name not in PLAIN]


def test_each_scheme_has_a_reference_for_its_bytes() -> None:
    assert set(ORACLES) == set(QUANTISED), "a scheme without a row here, or a row without a scheme"
    for name, (file, words) in ORACLES.items():
        (path,) = (ROOT / "tests").rglob(file)
        text = path.read_text()
        assert words in text, f"{name}: {file} no longer holds {words}"
        if words == ANOTHER_GGML[1]:
            (row,) = [line for line in text.splitlines() if line.startswith("SCHEMES = (")]
            assert name.upper() in row, f"{name}: {file} does not walk it"


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_decides_how_the_gpu_holds_it(name: str) -> None:
    """A decision that can be carried out, and whose bits are what the tiles of a whole number of tiles take."""
    scheme = SCHEMES[name]
    form = scheme.gpu
    assert isinstance(form, GPUForm) and form.tiles in REPACK, f"{name}: nobody makes tiles {form.tiles!r}"
    assert (form.tiles == "table") == (form.table is not None)
    if form.table is not None:
        assert len(form.table.values) == 16 and form.table.group in (32, COLUMNS)
    weight = torch.randn(1, 128, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    tiles = tile(Packed(scheme, (1, 128, 256), scheme.quantize(weight)), gated=False)
    high = 0 if form.table is not None else tiles.high.nbytes  # a table is one for all tiles
    assert 8 * (tiles.codes.nbytes + tiles.scales.nbytes + high) == form.bits * weight.numel()
    if form.embedding:
        assert name in ("q6_k", "q8_0"), "dense_kernels.table_rows decodes these two"


def test_a_scheme_whose_tiles_nobody_makes_is_an_error() -> None:
    class Unknown:
        name, gpu, shared = "q3", GPUForm("q3", bits=3.0), frozenset[str]()

    scheme: Any = Unknown()
    with pytest.raises(ValueError, match="w: q3 wants tiles 'q3', and there are"):
        tile(Packed(scheme, (1, 128, 64), {"": torch.zeros(1, 128, 64)}), gated=False, name="w")


@pytest.mark.parametrize("name", QUANTISED)
def test_each_scheme_has_a_recipe(name: str) -> None:
    assert any(name in recipe.schemes for recipe in recipes().values()), f"{name}: no recipe of dgq's uses it"


@pytest.mark.parametrize("name", QUANTISED)
def test_each_scheme_has_a_line_in_the_guides(name: str) -> None:
    guides = [path.read_text() for path in (ROOT / "recipes" / "guides").glob("*.md")]
    assert any(name in line for text in guides for line in text.splitlines() if line.startswith("|")), name


@pytest.mark.parametrize("name", SCHEMES)
def test_facts_agree(name: str) -> None:
    """Block, bits and number are ggml's where there is a type; a grid's blocks divide the scheme's; a fallback fits."""
    scheme = SCHEMES[name]
    if scheme.ggml is not None:
        kind = gguf.GGMLQuantizationType[scheme.ggml.name]
        assert kind.value == scheme.ggml.id
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert (block, 8 * block_bytes / block) == (scheme.block, scheme.bits)
        mixed = {"q4_k": "_M", "q5_k": "_M"}.get(name, "")
        file_type = "ALL_F32" if name == "f32" else f"MOSTLY_{scheme.ggml.name}{mixed}"
        assert gguf.LlamaFileType[file_type] == scheme.ggml.file_type
        if scheme.ggml.fallback is not None:
            other = SCHEMES[scheme.ggml.fallback]
            assert scheme.block % other.block == 0 and other.bits > scheme.bits
    if scheme.grid is None:
        assert name in PLAIN and not scheme.searched
    else:
        grid = scheme.grid(torch.ones(1, 2, 256))
        assert scheme.block % grid.block == 0 and grid.block % grid.sub == 0
        assert bool((grid.levels.diff() > 0).all()) and grid.levels.dtype == torch.float32


def test_schemes_that_are_only_read_say_so() -> None:
    scheme: Scheme = FP8
    assert scheme.gpu == DECODED and scheme.grid is None
    with pytest.raises(InputError, match="dgq reads this scheme and does not write it"):
        scheme.quantize(torch.zeros(1, 1))
