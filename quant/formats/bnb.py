"""bitsandbytes 4-bit on disk: a Linear in the keys that transformers loads, a fused expert weight packed as one.

    Linear X.weight (out, in)                  experts …experts.gate_up_proj (E, rows, in)
      X.weight                U8  [n/2, 1]       …gate_up_proj               U8   [E, rows, in/2]
      X.weight.absmax         F32 [n/64]         …gate_up_proj.absmax        F32  [E, rows, in/64]
    and for both, below the weight's name:
      .quant_map  F32 [16]      .quant_state.bitsandbytes__nf4  U8, a JSON text {quant_type, blocksize, dtype, shape, …}
    with double quantisation:
      .absmax U8    .nested_absmax F32 [ceil(n/64/256)]    .nested_quant_map F32 [256]    nested_offset in the JSON

FP4 has …bitsandbytes__fp4 in its place, and another quant_map; it is read, and never written. So is a vision tower
whose Linears bitsandbytes packed, with blocks that go on over the ends of rows.

bitsandbytes' own QuantState decodes each of them. Stock transformers loads the Linears and raises on the packed
experts, for which it has no place. The JSON text of double quantisation is padded with spaces to one length, so that
every size is known before the offset is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dgq.quant.errors import InputError
from dgq.quant.schemes.fp4 import FP4, FP4_MAP
from dgq.quant.schemes.nf4 import BLOCK, NESTED, NF4, NF4_DQ, QUANT_MAP, nest, row_numbers
from dgq.quant.types import Entry, Packed, Scheme, Stored

STATES = ".quant_state.bitsandbytes__"
STATE = STATES + "nf4"
LONGEST_NUMBER = "-1.2345678901234567e-123"
LONGEST_STATE = 4096


@dataclass
class BitsAndBytes:
    """The layout. double: absmax in 8 bits; kind: nf4 or fp4. While a weight is split, its absmax wait here for the
    last slice."""

    double: bool
    kind: str = NF4.name
    _waiting: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def slices(self) -> Scheme:
        return NF4

    def scheme_of(self, name: str) -> Scheme:
        return FP4 if self.kind == FP4.name else NF4_DQ if self.double else NF4

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        if len(shape) == 3:
            return name.rpartition(".")[0].endswith(".experts")
        return len(shape) == 2 and name.endswith(".weight") and "embed_tokens" not in name

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        fused = len(shape) == 3
        blocks = -(-math.prod(shape) // BLOCK)
        absmax = (*shape[:-1], shape[-1] // BLOCK) if fused else (blocks,)
        tensors: dict[str, Entry] = {
            name: ("U8", (*shape[:-1], shape[-1] // 2) if fused else (-(-math.prod(shape) // 2), 1)),
            name + ".absmax": ("U8" if self.double else "F32", absmax),
            name + ".quant_map": ("F32", (16,)),
        }
        if self.double:
            tensors[name + ".nested_absmax"] = ("F32", (-(-blocks // NESTED),))
            tensors[name + ".nested_quant_map"] = ("F32", (256,))
        return tensors | {name + STATES + self.kind: ("U8", (len(self._state(shape, None)),))}

    def split(self, name: str, shape: tuple[int, ...], piece: Packed, start: int) -> Iterator[tuple[str, torch.Tensor]]:
        absmax = piece.parts["absmax"]
        yield name, piece.parts[""]
        if self.double:
            self._waiting.setdefault(name, []).append(absmax)
        else:
            yield name + ".absmax", absmax
        if start + piece.shape[0] < shape[0]:
            return
        offset = None
        if self.double:
            nested = nest(torch.cat(self._waiting.pop(name)))
            offset = float(nested["nested_offset"])
            for suffix in ("absmax", "nested_absmax", "nested_quant_map"):
                yield f"{name}.{suffix}", nested[suffix]
        yield name + ".quant_map", QUANT_MAP
        yield name + STATE, torch.frombuffer(bytearray(self._state(shape, offset)), dtype=torch.uint8)

    def join(self, name: str, shape: tuple[int, ...], stored: Stored) -> Packed:
        """The weight as it lies on disk. InputError for another block size or table, or absmax no quantiser writes."""
        absmax = stored.tensor(name + ".absmax").view(*shape[:-1], -1)
        parts = {"": stored.tensor(name).view(*shape[:-1], -1), "absmax": absmax}
        return self._joined(name, shape, parts, stored)

    def decoded(self, name: str, shape: tuple[int, ...], stored: Stored) -> torch.Tensor:
        """A weight of any shape, float32: its blocks go on over the ends of rows, and the last may be short. InputError
        as of join()."""
        numel = math.prod(shape)
        blocks, codes = -(-numel // BLOCK), stored.tensor(name).flatten()
        codes = torch.nn.functional.pad(codes, (0, blocks * BLOCK // 2 - len(codes)))
        parts = {"": codes.view(blocks, -1), "absmax": stored.tensor(name + ".absmax").view(blocks, 1)}
        packed = self._joined(name, (blocks, BLOCK), parts, stored, shape)
        return packed.dequantize().flatten()[:numel].view(shape)

    def _joined(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: dict[str, torch.Tensor],
        stored: Stored,
        written: tuple[int, ...] | None = None,
    ) -> Packed:
        """parts: codes and absmax of the weight as `shape` has it; written: its shape in quant_state, if another."""
        state = _read_state(name, written or shape, stored, self.kind)
        if not torch.equal(stored.tensor(name + ".quant_map"), FP4_MAP if self.kind == FP4.name else QUANT_MAP):
            table = f"{name}.quant_map is not the table of {self.kind.upper()}"
            raise InputError(f"{stored.file(name)}: {table}; dgq decodes only that")
        if self.double:
            parts["nested_absmax"] = _positive(stored, name + ".nested_absmax")
            parts["nested_quant_map"] = stored.tensor(name + ".nested_quant_map")
            if not bool(parts["nested_quant_map"].isfinite().all()):
                raise InputError(f"{stored.file(name)}: {name}.nested_quant_map holds values that are not finite")
            parts["nested_offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
            parts["row"] = row_numbers(shape)
            if self.kind != FP4.name:
                return Packed(NF4_DQ, shape, parts)
            parts = {"": parts[""], "absmax": NF4_DQ.absmax(parts)}
        else:
            _positive(stored, name + ".absmax")
        return Packed(FP4 if self.kind == FP4.name else NF4, shape, parts)

    def _state(self, shape: tuple[int, ...], offset: float | None) -> bytes:
        """The JSON text; offset None gives the longest it can be."""
        state: dict[str, Any] = {"quant_type": self.kind, "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        if not self.double:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0}
        text = json.dumps(state)[:-2]
        return (
            (text + (LONGEST_NUMBER if offset is None else json.dumps(offset)) + "}")
            .encode()
            .ljust(len(text) + len(LONGEST_NUMBER) + 1)
        )


def _positive(stored: Stored, name: str) -> torch.Tensor:
    values = stored.tensor(name)
    wrong = ~(values.isfinite() & (values >= 0))
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise InputError(f"{stored.file(name)}: {name} holds {float(values[tuple(where)])} at {where}; damaged")
    return values


def _read_state(name: str, shape: tuple[int, ...], stored: Stored, kind: str) -> dict[str, Any]:
    """The quant_state's JSON, held against what it must say."""
    entry = name + STATES + kind
    where = f"{stored.file(entry)}: {entry}"
    try:
        state = json.loads(bytes(stored.tensor(entry).tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise InputError(f"{where} is no JSON object; damaged")
    nested = name + ".nested_absmax" in stored
    expected: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "shape": list(shape)}
    expected |= {"nested_blocksize": NESTED, "nested_dtype": "float32"} if nested else {}
    for key, value in expected.items():
        if state.get(key) != value:
            raise InputError(f"{where} says {key} {str(state.get(key))[:60]}, dgq reads {value} there")
    offset = state.get("nested_offset")
    if nested and not (type(offset) is float and 0 <= offset <= torch.finfo(torch.float32).max):
        raise InputError(f"{where} says nested_offset {str(offset)[:60]}, expected a number: the mean of absmax")
    return state


def quantization_config(skipped: list[str], double: bool) -> dict[str, Any]:
    """config.json's `quantization_config`, as transformers' BitsAndBytesConfig writes it. skipped: modules left in
    16 bit, patterns matched from the start of a module's name."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def skip_patterns(kept: list[str], quantised: list[str]) -> list[str]:
    """Patterns that keep transformers from converting the text modules `kept` (full names under model.decoder.) in
    both stacks, and that match none of `quantised`: one a kind of module where all layers agree."""
    kind = re.compile(r"^.*\.layers\.\d+\.")
    split = {kind.sub("", name) for name in quantised}
    patterns = ["lm_head", "model.encoder.vision_tower", "model.encoder.embed_vision"]
    for name in kept:
        below = kind.sub("", name)
        if below in split or below == name:
            patterns += [name, name.replace("model.decoder.", "model.encoder.language_model.", 1)]
        elif (pattern := r".*\.layers\.\d+\." + re.escape(below)) not in patterns:
            patterns.append(pattern)
    return patterns
