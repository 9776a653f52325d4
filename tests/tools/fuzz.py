"""Fuzzing what strangers write: safetensors headers, indexes, configs, GGUF files, dgq.json, recipes, imatrices.

    python tests/tools/fuzz.py [--cases 6000] [--seed 1] [--workers 2] [--seconds S] [--coverage] [--only CASE]
        [--keep DIR]

Structure-aware, and the same by seed: a good input is taken apart, changed where it is a value, a length, an offset, a
name or a link, and put together again; a few are only damaged. Each goes through the commands that read it, in worker
processes: at most 5 seconds a case, 1 GiB above what the process had, writes only below the output directory (an audit
hook sees every other), the input as it was. It must end well, or in one line and exit code 2. "Well" is held against
oracles: byte ranges that tile the file, weights that are finite, a verify that notices what was not sealed again.
The last line is a JSON object; exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SECONDS, MEMORY = 5, 1 << 30
SINGLE, INDEX, PROVENANCE = "model.safetensors", "model.safetensors.index.json", "dgq.json"
QUANTISED = {"nvfp4": "nvfp4", "nvfp4-w4a16": "nvfp4", "bnb4": "bnb4", "bnb4-dq": "bnb4"}
SOURCES = ("single", "sharded", "newer")
COVERED = (
    *(f"quant/files/{name}" for name in ("hf_dir", "gguf_file", "imatrix")),
    *(f"quant/formats/{name}" for name in ("modelopt", "bnb")),
    *(f"runtime/shape/{name}" for name in ("config", "settings", "fields", "vision", "names")),
    *(f"runtime/files/{name}" for name in ("weights", "quantization", "artifact", "tokenizer")),
    *(
        f"convert/{name}"
        for name in ("verification/verify", "verification/inspect", "source/checkpoint", "write/provenance")
    ),
    "convert/plans/recipe",
)
ROOT = Path(__file__).resolve().parents[2]
RUN = ("--max-new-tokens", "1", "--steps", "1", "--json")

# --- values ---------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 16, 64, 32, 128, 255, 256, 512, 2**31 - 1, 2**31, 2**32, 2**47, 2**48, 2**63,
    2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf, "", " ", "x", "nf4",
    "NVFP4", "FP8", "modelopt", "bitsandbytes", "compressed-tensors", "W4A16_NVFP4", "\ud800", "\udcff", "\0", "a\nb",
    "\x1b[31mred", "\u202e", "é", "U8", "F32", "F64", "F8_E4M3", "BF16", "default", "full_attention", "../../outside",
    "../outside.safetensors", "/etc/passwd", "..", ".", "/", "C:\\x", "x" * 5000, "x/y", "true", [], {}, [1], [[]],
    [None], {"a": 1}, {"": ""}, [0, 0], [128, 64], [2**63, 0], ["x"], {"bytes": 1, "sha256": "x"}, [-1], [1, "x"],
)  # fmt: skip
RAW = (
    "1e400", "-1e400", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 900 + "1" + "}" * 900, '{"a": 1, "a": 2}',
    "[" * 200_000, "1.", "\\", "\"", "0x10", "1e-400", "-0", "[" + "0," * 20_000 + "0]", "\u0000", "tru", '"\\ud800"',
)  # fmt: skip
# of config.json: values that lead somewhere, whether the key is there or not
KNOWING: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default", "proportional", "linear"), "partial_rotary_factor": (1.0, 0.25, 0.0),
    "num_hidden_layers": (1025, 1, 3), "num_experts": (4096, 2**31 - 1), "tie_word_embeddings": (False,),
    "hidden_size": (96, 2**20), "moe_intermediate_size": (2**30, 40), "vision_config": (None, "x"),
    "quantization_config": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_method": "fp8"}, {"quant_method": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "quant_method": ("compressed-tensors", "modelopt", "bitsandbytes"), "quant_algo": ("NVFP4", "W4A16_NVFP4", "FP8"),
    "use_clipped_linears": (True,), "standardize": (True, False), "group_size": (32, "16"),
    "per_layer_config": ({"9": {}}, {"0": {"head_dim": 8}}, {"1": {"sliding_window": 4}}, {"1": []}),
}  # fmt: skip
TEMPLATES = (
    "{{ messages[0].content", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages | tojson }}\x1b[2J",
    "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "{% include '/etc/passwd' %}", "\ud800",
)  # fmt: skip


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value + 32, value ^ 1 << 31, value))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value / 3, float(int(value)), value))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice(
            (value + "x", value[:cut], value[:cut] + rng.choice("/.\n\x7fé0") + value[cut:], value.upper())
        )
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value[-1:], value[::-1], [value], value * 2))
    return dict(list(value.items())[1:]) if isinstance(value, dict) else value


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def mutated(data: Any, rng: random.Random, raw: list[str] | None = None) -> Any:
    """Some values changed. raw: takes what JSON's own writer cannot write, a mark stands in its place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(places(data))
        if not spots:
            return copy.deepcopy(rng.choice(ODD))
        if rng.random() < 0.3:  # as likely deep in a short branch as somewhere in a long one
            spots = [spot for spot in spots if spot[0] is data] or spots
        if isinstance(data, dict) and "text_config" in data and rng.random() < 0.25:
            key = rng.choice(list(KNOWING))
            holders = [spot[0] for spot in spots if spot[1] == key]
            holders = holders or [data, data, data["text_config"], *(one for one in data.values() if _is_dict(one))]
            rng.choice(holders)[key] = copy.deepcopy(rng.choice(KNOWING[key]))
            continue
        holder, key = rng.choice(spots)
        kind = rng.random()
        if kind < 0.12:
            del holder[key]
        elif kind < 0.2 and isinstance(holder, dict):
            holder[str(rng.choice(ODD))[:300] if rng.random() < 0.7 else key + "x"] = holder.pop(key)
        elif kind < 0.5:
            holder[key] = near(holder[key], rng)
        elif kind < 0.58:
            other, at = rng.choice(spots)
            with suppress(KeyError, IndexError):
                holder[key] = copy.deepcopy(other[at])
        elif kind < 0.66 and raw is not None:
            raw.append(rng.choice(RAW))
            holder[key] = f"@@{len(raw) - 1}@@"
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))  # they are changed in turn
    return data


def json_text(data: Any, rng: random.Random) -> bytes:
    raw: list[str] = []
    text = json.dumps(mutated(data, rng, raw))
    for number, value in enumerate(raw):
        text = text.replace(f'"@@{number}@@"', value)
    if rng.random() < 0.06:  # one key twice
        keys = list(re.finditer(r'"[^"\\]+": ', text))
        if keys:
            key = rng.choice(keys)
            text = text[: key.start()] + key[0] + json.dumps(rng.choice(ODD)) + ", " + text[key.start() :]
    if rng.random() < 0.04:
        text = rng.choice(("\ufeff" + text, text + text, text + " " * 70_000, text[:-1], "[" + text + "]"))
    return text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, rng: random.Random, span: int = 0) -> bytes:
    """Bytes flipped, put in, taken out, cut off; within the first `span` if given."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(max(1, min(len(found), span or len(found))))
        kind = rng.randrange(6)
        if kind == 0:
            found[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 40))))
        elif kind == 1:
            del found[at : at + rng.choice((1, 4, 8, 200))]
        elif kind == 2:
            found[at : at + 8] = rng.choice((0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
        elif found:
            found[min(at, len(found) - 1)] = rng.choice((0, 255, *b'"09,{[', rng.randrange(256)))
    return bytes(found[: rng.randrange(len(found) + 1)] if rng.random() < 0.12 else found)


# --- safetensors ----------------------------------------------------------------------------------------------------


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: bytes, payload: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def safetensors(data: bytes, rng: random.Random) -> bytes:
    header, payload = split_header(data)
    names = [name for name in header if name != "__metadata__"]
    kind = rng.random()
    if kind < 0.07:
        return damaged(data, rng, len(data) - len(payload))
    if kind < 0.14:
        return data[: len(data) - len(payload)] + damaged(payload, rng)
    if kind < 0.2:
        length = len(data) - len(payload) - 8
        lie = rng.choice((0, 1, length - 1, length + 1, len(data) - 8, len(data), 10**8 + 1, 2**31, 2**63, 2**64 - 1))
        return with_header(data[8 : 8 + length], payload, lie)
    if kind < 0.45:
        return with_header(json_text(header, rng), payload)
    states = [name for name in names if "quant_state" in name]
    if states and kind < 0.65:
        name = rng.choice(states)
        start, stop = header[name]["data_offsets"]
        text = payload[start:stop]
        text = b"" if rng.random() < 0.1 else state_changed(text, rng)
        if rng.random() < 0.5:
            text = text[: stop - start].ljust(stop - start)
        payload = with_bytes(header, name, payload, text)
        return with_header(json.dumps(header).encode(), payload)
    for _ in range(rng.choice((1, 1, 2))):
        payload = entry_changed(header, names, payload, rng)
    return with_header(json.dumps(header).encode("utf-8", "surrogatepass"), payload)


def state_changed(text: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(text, rng)
    state = json.loads(text)
    known = {"nested_offset": (1, -0.5, 1e39, "0.1"), "quant_type": ("fp4",), "blocksize": (128,), "shape": ([1],)}
    if rng.random() < 0.3:
        key = rng.choice(list(known))
        return json.dumps(state | {key: rng.choice(known[key])}).encode()
    return json_text(state, rng)


def with_bytes(header: dict[str, Any], name: str, payload: bytes, data: bytes) -> bytes:
    """The payload with other bytes for one U8 tensor, all that lies behind it moved."""
    start, stop = header[name]["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [at + len(data) - (stop - start) for at in entry["data_offsets"]]
    header[name] |= {"shape": [len(data)], "data_offsets": [start, start + len(data)]}
    return payload[:start] + data + payload[stop:]


def entry_changed(header: dict[str, Any], names: list[str], payload: bytes, rng: random.Random) -> bytes:
    """One tensor's line: type, shape, bytes, name; some of it still fits. The payload, perhaps of another length."""
    one, two = rng.choice(names), rng.choice(names)
    kind = rng.choice((*range(15), 13, 14, 14))
    special = [name for name in names if name.endswith(("scale", "scale_2", "absmax", "quant_map"))]
    text = [name for name in names if "model.decoder." in name]
    if kind == 14 and special and rng.random() < 0.7:
        one = rng.choice(special)
    if kind == 13 and text:
        one = rng.choice(text)
    entry = header[one]
    start, stop = entry["data_offsets"]
    if kind == 0:
        sizes = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
        twins = [name for name in names if name != one and sizes[name] == sizes[one] > 0]
        if twins and rng.random() < 0.5:  # two on one place, and no gap
            shape = entry["shape"]
            payload = with_bytes(header, one, payload, b"")
            entry["shape"], two = shape, rng.choice(twins)
        entry["data_offsets"] = list(header[two]["data_offsets"])
    elif kind == 1:
        by = rng.choice((1, -1, 8, 2**31, 2**48, 2**63, -(2**31)))
        entry["data_offsets"] = [start + by, stop + by] if rng.random() < 0.5 else [start, stop + by]
    elif kind == 2:
        entry["data_offsets"] = rng.choice(
            ([stop, start], [start], [start, stop, 0], [float(start), stop], [True, stop])
        )
    elif kind == 3:
        same = {"BF16": ("F16", "I16"), "F32": ("I32", "U32"), "U8": ("I8", "BOOL"), "F8_E4M3": ("F8_E5M2", "U8")}
        others = ("F64", "F4", "BOOL", "F8_E8M0", "bf16")
        entry["dtype"] = rng.choice(same.get(entry["dtype"], others) if rng.random() < 0.7 else others)
    elif kind == 4:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [math.prod(entry["shape"])], [*entry["shape"], 0],
             [2**32, 2**32], [2**63, 2], [-1, *entry["shape"][1:]], [], [1] * 5000, "64", [1.0]),
        )  # fmt: skip
    elif kind == 5:  # the same bytes as another type
        entry["dtype"], entry["shape"] = "U8", [stop - start]
    elif kind == 6:
        entry["shape"], entry["data_offsets"] = [0, 2**47], [start, start]
    elif kind == 7:
        header[one], header[two] = header[two], header[one]
    elif kind == 8:
        name = rng.choice(
            (one + "x", "x" * 70_000, "a\nb", "\x1b[2J", "", "\ud800", "lm_head.weight", "..", one.upper())
        )
        header[name] = header.pop(one)
        names.remove(one)
    elif kind == 9:
        at = len(payload)
        header[rng.choice(("extra", "model.encoder.x", one + ".absmax", "\x07"))] = (
            {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}
        )  # fmt: skip
        return payload + bytes(8)
    elif kind == 10:
        header["__metadata__"] = rng.choice(ODD)
    elif kind == 11:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(ODD)
    elif kind == 12:
        return (
            payload[: rng.randrange(len(payload))] if rng.random() < 0.5 else payload + bytes(rng.choice((1, 8, 4096)))
        )
    elif kind == 13:  # copies of tied weights, the same and another
        encoder = "model.encoder.language_model."
        copy = "lm_head.weight" if "embed_tokens" in one else one.replace("model.decoder.", encoder)
        header[copy] = dict(entry) | {"data_offsets": [len(payload), len(payload) + stop - start]}
        if rng.random() < 0.2:
            header[copy]["dtype"] = "F16"
        return payload + (payload[start:stop] if rng.random() < 0.7 else bytes(stop - start))
    else:  # values that no quantiser writes
        value = struct.pack("<f", rng.choice((math.nan, math.inf, -1.0, 0.0, 3.3e38, 1e-45)))
        raw = rng.choice((value, value, value[2:], b"\x7f", b"\xff", b"\x80\xfe"))[: stop - start]
        at = rng.choice((start, stop - len(raw)))
        if rng.random() < 0.3 and raw:  # everywhere
            at, raw = start, raw * ((stop - start) // len(raw))
        return payload[:at] + raw + payload[at + len(raw) :]
    return payload


# --- GGUF -----------------------------------------------------------------------------------------------------------

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
NUMBERS = (0, 1, 2, 3, 5, 31, 33, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**61, 2**63, 2**64 - 1)


class GGUF:
    """A file in its parts: keys [name, type, bytes], tensors [name, dims, type, offset], payload."""

    def __init__(self, data: bytes) -> None:
        """ValueError or struct.error if it cannot be read to its end."""
        self._data, self._at, self.magic = data, 4, b"GGUF"
        if data[:4] != b"GGUF":
            raise ValueError("magic")
        self.version, tensors, keys = struct.unpack("<IQQ", self._take(20))
        self.keys = [[self._string(), kind := self._number(4), self._value(kind)] for _ in range(keys)]
        self.tensors = [
            [self._string(), [self._number(8) for _ in range(self._number(4))], self._number(4), self._number(8)]
            for _ in range(tensors)
        ]
        self.counts: list[int | None] = [None, None]
        self.payload = data[-(-self._at // 32) * 32 :]
        self.head = self._at

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("end")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _string(self) -> bytes:
        return self._take(self._number(8))

    def _value(self, kind: int) -> bytes:
        start = self._at
        if kind == 8:
            self._string()
        elif kind == 9:
            element, count = self._number(4), self._number(8)
            if element == 8:
                for _ in range(count):
                    self._string()
            elif element in SIZES:
                self._take(SIZES[element] * count)
            else:
                raise ValueError("element")
        elif kind in SIZES:
            self._take(SIZES[kind])
        else:
            raise ValueError("kind")
        return self._data[start : self._at]

    def bytes(self) -> bytes:
        counts = [
            len(found) if lie is None else lie
            for lie, found in zip(self.counts, (self.tensors, self.keys), strict=True)
        ]
        parts = [self.magic, struct.pack("<IQQ", self.version, *counts)]
        for key, kind, value in self.keys:
            parts += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind), value]
        for name, dims, kind, offset in self.tensors:
            parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(dims))]
            parts += [struct.pack(f"<{len(dims)}Q", *dims), struct.pack("<IQ", kind, offset)]
        head = b"".join(parts)
        return head + bytes(-len(head) % 32) + self.payload


def text_value(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def gguf_changed(data: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    parts = GGUF(data)
    if kind < 0.08:
        return damaged(data, rng, parts.head)
    if kind < 0.13:
        return data[: parts.head] + damaged(data[parts.head :], rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        (key_changed if rng.random() < 0.6 or not parts.tensors else tensor_changed)(parts, rng)
    return parts.bytes()


def key_changed(parts: GGUF, rng: random.Random) -> None:
    keys = parts.keys
    if not keys:
        return
    known = [key for key in keys if key[0].startswith((b"diffusion", b"imatrix")) or b"token" in key[0]]
    key = rng.choice(known if known and rng.random() < 0.4 else keys)
    name, kind, value = key
    what = rng.randrange(13)
    texts = (b"", b"x", b"\xff\xfe", b"\xed\xa0\x80", b"a\nb", b"\x1b[2J", b"\0", b"../x", b"x" * 70_000, b"gemma4")
    if name.endswith(b"chat_template"):
        texts = tuple(text.encode("utf-8", "surrogatepass") for text in TEMPLATES)
    if what == 0:
        keys.remove(key)
    elif what == 1:
        keys.append([name, kind, value])
    elif what == 2:
        key[0] = rng.choice((name + b"x", *texts))
    elif what == 3:
        key[1] = rng.choice((*range(14), 2**31, 2**32 - 1))
    elif what == 4:
        parts.version = rng.choice((0, 1, 2, 3, 4, 2**24 * 3))
        parts.magic = rng.choice((b"GGUF", b"GGUF", b"GGML", b"FUGG"))
    elif what == 5:
        parts.counts[rng.randrange(2)] = rng.choice((*NUMBERS, len(keys) - 1, len(keys) + 1))
    elif what == 6:
        pack = rng.choice((("I", 4), ("Q", 10), ("i", 5)))
        number = rng.choice((0, 1, 2, 3, 8, 16, 64, 4096, 2**30, 2**31 - 1))
        keys.append([b"general.alignment", pack[1], struct.pack("<" + pack[0], number)])
    elif what == 7:  # well-formed, of another type
        strings = struct.pack("<IQ", 8, 2) + text_value(b"a") + text_value(b"b")
        numbers = struct.pack("<IQ2i", 5, 2, 1, 2)
        key[1:] = rng.choice(
            ([4, bytes(4)], [6, bytes(4)], [7, b"\1"], [8, text_value(b"x")], [9, strings], [9, numbers])
        )
    elif kind == 8:
        key[2] = text_value(rng.choice(texts), rng.choice((None, None, None, *NUMBERS)))
    elif kind == 9:
        element, count = struct.unpack("<IQ", value[:12])
        lies = (*NUMBERS, count - 1, count + 1)
        body = value[12:]
        if what == 12:
            count = rng.choice(lies) % 2**64
        elif what == 8:
            element = rng.choice((*range(14), 2**32 - 1))
        elif what == 9 and element == 8:
            body = text_value(b"", rng.choice(lies) % 2**64) + body[8:]
        elif what == 10 and element in SIZES and body:
            at = rng.randrange(count) * SIZES[element]
            raw = rng.choice((*NUMBERS, 7, 8)).to_bytes(8, "little")[: SIZES[element]]
            body = body[:at] + raw + body[at + SIZES[element] :]
        elif element == 8 and count:
            first = int.from_bytes(body[:8], "little")
            body = text_value(rng.choice(texts)) + body[8 + first :]
        else:
            element, count, body = 8, 2, text_value(b"a") + text_value(b"b")
        key[2] = struct.pack("<IQ", element, count) + body
    elif kind in SIZES:
        size = SIZES[kind]
        known = int.from_bytes(value, "little")
        number = rng.choice((*NUMBERS, known + 1, known * 2, known // 2, 8, 100, 511, 512)) % 256**size
        floats = struct.pack("<f" if size == 4 else "<d", rng.choice((math.nan, math.inf, -1.0, 0.0, 1e30, 0.3)))
        key[2] = floats[:size] if kind in (6, 12) else number.to_bytes(size, "little")


def tensor_changed(parts: GGUF, rng: random.Random) -> None:
    tensors = parts.tensors
    tensor, other = rng.choice(tensors), rng.choice(tensors)
    if rng.random() < 0.1:
        tensor = next((one for one in tensors if one[0] == b"rope_freqs.weight"), tensor)
    name, dims, _, offset = tensor
    what = rng.randrange(11)
    if what == 0:
        tensors.remove(tensor)
    elif what == 10:  # all of a kind
        ending = name.rpartition(b".")[2]
        tensors[:] = [one for one in tensors if not one[0].endswith(ending)]
    elif what == 1:
        tensors.append([*tensor])
    elif what == 2:
        texts = (name + b"x", b"", b"\xff", b"\x1b[2J\n", b"x" * 70_000, other[0], b"output.weight", name + b".in_sum2")
        tensor[0] = rng.choice(texts)
    elif what == 3:
        tensor[1] = rng.choice(
            (
                [],
                dims[::-1],
                [*dims, 1],
                [1] * 5,
                [*dims, 1, 1, 1],
                [1] * 300,
                [math.prod(dims)],
                [*dims[:-1], dims[-1] * 2],
            )
        )
    elif what == 4:
        at = rng.randrange(len(dims)) if dims else 0
        tensor[1] = [
            *dims[:at],
            rng.choice((*NUMBERS, *((dims[at] * 2, dims[at] + 32) if dims else ()))),
            *dims[at + 1 :],
        ]
    elif what == 5:
        tensor[2] = rng.choice((*range(42), 2**31, 2**32 - 1))
    elif what == 6:
        tensor[3] = rng.choice(
            (*NUMBERS, offset + 1, offset + 32, len(parts.payload), len(parts.payload) - 32, other[3])
        )
    elif what == 7:
        tensor[3], other[3] = other[3], tensor[3]
    elif what == 8:
        value = struct.pack("<f", rng.choice((math.nan, math.inf, -1.0, 0.0, 0.0, 1e30, -math.inf)))
        value *= rng.choice((1, min(1 << 16, math.prod(dims))))
        parts.payload = parts.payload[:offset] + value + parts.payload[offset + len(value) :]
    else:
        cut = rng.choice((0, 32, len(parts.payload) - 1, rng.randrange(len(parts.payload) + 1)))
        parts.payload = parts.payload[:cut] if rng.random() < 0.7 else parts.payload + bytes(rng.choice((1, 32, 100)))


# --- recipes --------------------------------------------------------------------------------------------------------


def toml_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(bool(value)).lower()
    if isinstance(value, float):
        return {"nan": "nan", "inf": "inf", "-inf": "-inf"}.get(str(value), repr(value))
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(one)}" for key, one in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str) else str(value)


def toml_changed(data: bytes, rng: random.Random) -> bytes:
    recipe = tomllib.loads(data.decode())
    kind = rng.random()
    if kind < 0.12:
        return damaged(data, rng)
    rules = recipe["rule"]
    rule = rng.choice(rules)
    schemes = ("bf16", "f16", "f32", "q4_k", "q5_0", "q6_k", "q8_0", "nvfp4", "nf4", "nf4_dq", "mxfp4", "", "Q4_K")
    if rng.random() < 0.6:
        schemes = {"nvfp4": ("bf16", "nvfp4"), "bnb4": ("bf16", "nf4", "nf4_dq")}.get(recipe["format"], schemes[:7])
    if kind < 0.16:
        recipe["label"] = rng.choice(
            ("../../../outside/x", "/x", "a/../../b", ".", "", "x" * 300, "\x1b[31m", "a b", "é")
        )
    elif kind < 0.2:
        recipe["activations"] = rng.choice(("nvfp4", "fp8", ""))
    elif kind < 0.24:  # one layer unlike the others
        match = rng.choice(("*layers.1.mlp*", "*.1.*", "*q_proj*", "blk.0.*", "*experts*"))
        rules.insert(0, {"match": match, "scheme": rng.choice(schemes)})
    elif kind < 0.36:
        rule[rng.choice(("scheme", "scheme", "more_bits"))] = rng.choice(schemes)
    elif kind < 0.44:
        rule["match"] = rng.choice(
            ("*" * 2000, "[", "[!", "*a" * 400, "?", "", "*.experts.*", "(?i)*", "[z-a]*", "*[\\]", "*.1.*", "**/x")
        )
    elif kind < 0.52:
        rng.shuffle(rules)
    elif kind < 0.56:
        rules.remove(rule)
    elif kind < 0.64:
        recipe["fallback"] = {rng.choice(schemes): rng.choice(schemes) for _ in range(rng.randrange(4))}
    elif kind < 0.68:
        recipe["refuse_experts"] = [rng.choice((0, 4, 6, 8, -1, 2**70))]
    else:
        mutated(recipe, rng)
    if not isinstance(recipe, dict):
        return toml_value(recipe).encode("utf-8", "surrogatepass")
    lines = [f"{json.dumps(key)} = {toml_value(value)}" for key, value in recipe.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# --- cases ----------------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """path: what a command is given; file: what was changed; changed: whether a byte is not as it was; sealed: whether
    dgq.json was made to agree."""

    seed: str
    path: Path
    file: Path
    changed: bool
    sealed: bool
    parses: bool


def parses(file: Path) -> bool:
    """JSON, or a header that is; TOML; GGUF up to its tensors."""
    try:
        if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size > 1 << 28:
            return False
        data = file.read_bytes()
        if file.suffix == ".json":
            json.loads(data)
        elif file.suffix == ".toml":
            tomllib.loads(data.decode())
        elif file.suffix == ".gguf":
            GGUF(data)
        elif file.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            json.loads(data[8 : 8 + length])
            return length <= len(data) - 8
    except (OSError, ValueError, RecursionError, struct.error):
        return False
    return True


def link_ops(file: Path, outside: Path, rng: random.Random) -> None:
    """The file gone, elsewhere, of another kind."""
    kind = rng.choice(
        ("gone", *("elsewhere",) * 4, "dangling", "directory", "loop", "empty", "fifo", "zero", "huge", "closed")
    )
    data = file.read_bytes()
    file.unlink()
    if kind == "elsewhere":
        (outside / file.name).write_bytes(data)
        file.symlink_to(outside / file.name)
    elif kind == "dangling":
        file.symlink_to(outside / "nothing")
    elif kind == "directory":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "huge":  # a hole; none of it on the disk
        with file.open("wb") as hole:
            hole.write(data)
            hole.truncate(3 << 30)
    elif kind == "closed":
        file.symlink_to("/proc/self/mem")


def lead_out(index: Path, secret: Path, rng: random.Random) -> None:
    """A shard that lies outside, under the name that would find it there."""
    document = json.loads(index.read_bytes())
    shard = rng.choice(sorted(set(document["weight_map"].values())))
    shutil.move(index.parent / shard, secret / shard)
    away = rng.choice((f"../../secret/{shard}", str(secret / shard), f"./../../secret/{shard}"))
    document["weight_map"] = {name: away if file == shard else file for name, file in document["weight_map"].items()}
    index.unlink()
    index.write_text(json.dumps(document))


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".safetensors": safetensors, ".gguf": gguf_changed, ".toml": toml_changed,
    ".json": lambda data, rng: damaged(data, rng) if rng.random() < 0.08 else json_text(json.loads(data), rng),
}  # fmt: skip
# what is changed, in turn: (seeds, pattern of the file)
TARGETS = (
    (SOURCES, "*.safetensors"), (("sharded", "newer"), INDEX), (SOURCES, "config.json"), (("gguf",), "*.gguf"),
    (tuple(QUANTISED), PROVENANCE), (("recipes",), "*.toml"), (tuple(QUANTISED), "*.safetensors"),
    (tuple(QUANTISED), "*config.json"), (("bare",), "*.gguf"), (("gguf",), PROVENANCE), (("imatrix",), "*.gguf"),
    (("bnb4", "bnb4-dq"), "*.safetensors"), (("gguf",), "*.json"), (SOURCES, "*.json"), (("recipes",), "*.toml"),
    (("bare",), "*.gguf"), (SOURCES, "*.safetensors"), (tuple(QUANTISED), "config.json"),
)  # fmt: skip


def make_case(number: int, rng: random.Random, seeds: Path, room: Path) -> Input:
    """A good input beside its seed, one file of it changed."""
    names, pattern = TARGETS[number % len(TARGETS)]
    seed = rng.choice(names)
    path = room / "input" / seed
    path.mkdir(parents=True)
    for file in sorted((seeds / seed).iterdir()):
        os.link(file, path / file.name)
    file = rng.choice(sorted(path.glob(pattern)))
    before = file.read_bytes()
    alone = rng.random() < 0.05  # nothing but a file more or less
    if not alone and rng.random() < 0.05:
        link_ops(file, room / "outside", rng)
        changed = True
    elif not alone and pattern == INDEX and rng.random() < 0.1:
        lead_out(file, room / "secret", rng)
        changed = True
    else:
        try:
            after = before if alone else CHANGES[file.suffix](before, rng)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, struct.error):
            after = damaged(before, rng)  # a second change stumbled over the first
        file.unlink()
        file.write_bytes(after)
        changed = after != before
    if rng.random() < (0.7 if alone else 0.04):
        extra = ("extra", "b.gguf", "b.safetensors", "..x", "a\nb", "\x1b[2J", "model-2.json", SINGLE, INDEX)
        with suppress(FileExistsError), (path / rng.choice(extra)).open("xb") as out:
            out.write(b"x")
            changed = True
    elif alone or rng.random() < 0.03:  # a kind of file gone
        for one in path.glob(rng.choice(("*.safetensors", "*.gguf", "config.json", "tokenizer*.json"))):
            with suppress(IsADirectoryError):
                one.unlink()
                changed = True
    if rng.random() < 0.1 and not pattern.startswith("*.toml"):
        template = rng.choice(TEMPLATES).encode("utf-8", "surrogatepass")
        (path / "chat_template.jinja").unlink(missing_ok=True)
        (path / "chat_template.jinja").write_bytes(template)
        changed = True
    sealed = (path / PROVENANCE).exists() and rng.random() < 0.5 and sealed_again(path, file)
    valid = parses(file)
    if seed in ("bare", "recipes", "imatrix"):
        path = file
    return Input(seed, path, file, changed, sealed, valid)


def sealed_again(path: Path, file: Path) -> bool:
    """dgq.json agrees with the files (if it was not what was changed), and with itself. False if that cannot be."""
    from dgq.convert.write.provenance import FILE, sealed, text

    if not parses(path / FILE):  # it may be a link to a device without end
        return False
    try:
        document = json.loads((path / FILE).read_bytes())
        document.pop("sha256", None)
        if file.name != FILE:
            document["files"] = {}
            for one in path.iterdir():
                if one.is_symlink() or not one.is_file() or one.stat().st_size > 1 << 28:
                    return False
                if one.name != FILE:
                    data = one.read_bytes()
                    document["files"][one.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        data = text(sealed(document)).encode()
        (path / FILE).unlink()
        (path / FILE).write_bytes(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


Command = tuple[str, ...]


def commands(case: Input, rng: random.Random, out: Path, seeds: Path) -> list[Command]:
    """What reads it."""
    path, some = str(case.path), rng.random()
    as_json = ("--json",) if rng.random() < 0.5 else ()
    if case.seed == "recipes":
        to = tomllib.loads((seeds / "recipes" / case.file.name).read_text())["format"]
        recipe = ("--to", to, "--recipe", path)
        found = [("plan", str(seeds / "sharded"), *recipe, "--no-probe", *as_json)]
        if some < 0.3:
            scale = ("--input-scale", "0.01") if case.file.stem == "nvfp4" else ()
            found.append(("convert", str(seeds / "sharded"), *recipe, "-o", str(out / "new"), "--threads", "1", *scale))
        return found
    if case.seed == "imatrix":
        return [
            ("convert", str(seeds / "sharded"), "--to", "gguf", "--imatrix", path, "-o", str(out / "new"), *as_json)
        ]
    found = [("inspect", path, *as_json)]
    if case.seed in SOURCES:
        to = rng.choice(("nvfp4", "bnb4", "gguf"))
        found.append(("plan", path, "--to", to, "--no-probe", *as_json))
        if some < 0.35:
            scale = ("--input-scale", "0.01") if to == "nvfp4" else ()
            found.append(("convert", path, "--to", to, "-o", str(out / "new"), "--threads", "1", *scale))
    else:
        found.append(("verify", path, "--threads", "1", *as_json))
    if some > 0.4:
        found.append(("run", path, "hi", *RUN, *(("--chat",) if rng.random() < 0.4 else ())))
    if rng.random() < 0.02:
        found.append(("inspect", str(case.file)))
    return found


# --- one worker -----------------------------------------------------------------------------------------------------


class OutOfTimeError(BaseException):
    """No library's `except Exception` keeps it."""


class Watch:
    """Sees every write of this process; those outside `allowed` are kept, and every look into `secret`."""

    WRITES = frozenset(
        ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
         "shutil.rmtree", "os.chown", "os.utime", "os.mkfifo", "os.system", "subprocess.Popen", "os.exec")
    )  # fmt: skip

    def __init__(self, secret: Path, *allowed: Path) -> None:
        self.secret, self.allowed = f"{secret}/", tuple(f"{path}/" for path in allowed)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                real = os.path.realpath(os.fsdecode(path))
                if real.startswith(self.secret):
                    self.seen.append(f"read {real}")
                return
        elif event in self.WRITES:
            path = arguments[0]
            folder = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            if isinstance(folder, int) and folder >= 0 and isinstance(path, (str, bytes)):
                path = os.path.join(f"/proc/self/fd/{folder}", os.fsdecode(path))  # noqa: PTH118
        else:
            return
        real = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        if not f"{real}/".startswith(self.allowed) and real != os.devnull:
            self.seen.append(f"{event} {real}")


def snapshot(path: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for entry in path.rglob("*"):
        said = entry.lstat()
        found[str(entry.relative_to(path))] = (said.st_mode, said.st_size, said.st_ino, said.st_mtime_ns)
    return found


def limit(extra: int | None) -> None:
    """At most this much more address space than there is now; None: no limit."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else now + extra, hard))


def invoke(command: Command) -> tuple[int, str, str]:
    """Exit code, 0 to 2, and what was printed; raises what the command raises."""
    from click.testing import CliRunner

    from dgq.convert.cli.__main__ import main
    from dgq.convert.cli.terminal import console

    for stream in (console.out, console.err):  # what one command could not print, the next would print
        stream._buffer.clear()
    result = CliRunner().invoke(main, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def wrong_end(command: Command, code: int, stdout: str, stderr: str) -> str | None:
    """What is wrong with how a command ended, None if nothing."""
    if code == 2:
        lines = [line for line in stderr.split("\n") if line and not line.startswith("note: ")]
        if len(lines) != 1 or not lines[0].startswith("dgq: error: "):
            return f"not one line: {stderr[:400]!r}"
        if stdout:
            return f"an error, but also {stdout[:100]!r}"
        if "Errno" in lines[0] and "not readable" not in lines[0] and "unreadable" not in lines[0]:
            return f"the system's words, not ours: {lines[0]}"
    elif code not in ((0, 1) if command[0] == "verify" else (0,)):
        return f"exit code {code}"
    if any(c in stderr + ("" if "--json" in command else stdout) for c in "\x1b\x07\x08\x7f\0"):
        return f"control codes: {(stderr or stdout)[:400]!r}"
    if "--json" in command and code < 2:
        json.loads(stdout)
    return None


def tiles(file: Path) -> bool:
    """Whether a safetensors file's tensors lie one behind the other, to its end."""
    header, payload = split_header(file.read_bytes())
    end = 0
    for start, stop in sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"):
        if start != end:
            return False
        end = stop
    return end == len(payload)


def wrong_result(case: Input, codes: dict[str, int]) -> str | None:
    """What came out well must be well."""
    if codes.get("verify") == 0 and case.changed and not case.sealed:
        return "verify did not notice"
    if codes.get("verify") == 0 and codes.get("inspect") and case.file.name != PROVENANCE:
        return "verify finds it good, inspect does not"
    if codes.get("inspect") == 0 and case.path.is_dir():
        for file in case.path.glob("model*.safetensors"):
            if not tiles(file):
                return f"{file.name}: tensors overlap, or leave gaps"
    if codes.get("run") == 0 and case.seed in QUANTISED:
        from dgq.runtime.files.artifact import open_artifact

        for name, packed in open_artifact(case.path).weights.items():
            if packed.scheme.bits < 16 and not bool(packed.dequantize().isfinite().all()):
                return f"{name} is not finite, and was run"
    return None


def attempt(number: int, seed: int, seeds: Path, room: Path, watch: Watch) -> dict[str, Any]:
    """One case from its making to its removal."""
    rng = random.Random(f"{seed}:{number}")
    for folder in ("input", "out", "outside", "secret"):
        shutil.rmtree(room / folder, ignore_errors=True)
        (room / folder).mkdir()
    case = make_case(number, rng, seeds, room)
    planned = commands(case, rng, room / "out", seeds)
    said: dict[str, Any] = {"case": number, "seed": case.seed, "file": case.file.name, "parses": case.parses}
    before = {folder: snapshot(room / folder) for folder in ("input", "outside", "cwd")}
    codes: dict[str, int] = {}
    found: list[str] = []
    began = time.perf_counter()
    limit(MEMORY)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS * 3, exit=True)
    watch.on = True
    command: Command = ("",)
    try:
        for command in planned:
            code, stdout, stderr = invoke(command)
            codes.setdefault(command[0], code)
            if problem := wrong_end(command, code, stdout, stderr):
                found.append(f"unclean: {problem}")
            if code and command[0] == "convert" and any((room / "out").iterdir()):
                found.append("unclean: a failed conversion left something")
        command = ("oracle",)
        signal.alarm(0)
        if problem := wrong_result(case, codes):
            found.append(f"wrong: {problem}")
    except OutOfTimeError:
        found.append("timeout: " + "".join(traceback.format_exc().splitlines(True)[-8:]))
    except BaseException as error:
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        kind = "memory" if memory else "traceback"
        found.append(f"{kind}: " + "".join(traceback.format_exception(error)[-4:])[-1500:])
    finally:
        signal.alarm(0)
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
        limit(None)
    if watch.seen:
        found.append(f"outside: {watch.seen[:5]}")
        watch.seen.clear()
    for folder, was in before.items():
        if snapshot(room / folder) != was:
            found.append(f"outside: {folder} is not as it was")
    said |= {"codes": codes, "seconds": round(time.perf_counter() - began, 3)}
    return said | ({"found": found, "command": " ".join(command)} if found else {})


def work(
    first: int, step: int, cases: int, seed: int, scratch: Path, log: Path, keep: Path | None, only: bool, until: float
) -> None:
    """Cases first, first + step, …; a line for each in `log`, before and after."""
    import torch

    torch.set_num_threads(1)
    mock.patch("os.fsync", new=lambda _: None).start()  # most of a small conversion's time, and no matter here
    mock.patch.dict("dgq.convert.write.slices.SLICE", cpu=1 << 13).start()  # several slices a weight
    room = scratch / f"room{first % step if not only else 'x'}"
    shutil.rmtree(room, ignore_errors=True)  # of a worker that died
    for name in ("tmp", "cwd"):
        (room / name).mkdir(parents=True)
    os.environ |= {"TMPDIR": str(room / "tmp"), "HOME": str(room / "tmp")}
    tempfile.tempdir = None
    os.chdir(room / "cwd")

    def out_of_time(*_: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, out_of_time)
    for name in (*SOURCES, *QUANTISED, "gguf"):  # imports and first calls count for no case
        for command in (("inspect", str(scratch / "seeds" / name)), ("run", str(scratch / "seeds" / name), "hi", *RUN)):
            assert invoke(command)[0] == 0, command
    sharded, imatrix = str(scratch / "seeds" / "sharded"), str(scratch / "seeds" / "imatrix" / "im.gguf")
    code, _, stderr = invoke(("convert", sharded, "--to", "gguf", "--imatrix", imatrix, "-o", str(room / "warm")))
    assert code == 0, stderr
    for name in (*QUANTISED, "gguf"):
        code, stdout, stderr = invoke(("verify", str(scratch / "seeds" / name)))
        assert code == 0, stdout + stderr
    watch = Watch(room / "secret", room / "out", room / "tmp")
    with log.open("a") as lines:
        for number in range(first, first + 1 if only else cases, step):
            if time.time() > until:
                break
            print(json.dumps({"began": number}), file=lines, flush=True)
            said = attempt(number, seed, scratch / "seeds", room, watch)
            print(json.dumps(said), file=lines, flush=True)
            if keep and "found" in said:
                with suppress(OSError, shutil.Error):
                    shutil.copytree(room / "input", keep / str(number), symlinks=True)


# --- all of them ----------------------------------------------------------------------------------------------------


def build(seeds: Path) -> None:
    """The good inputs."""
    sys.path.insert(0, str(ROOT / "tests" / "tools"))
    from kinds import write_kinds
    from micro import micro_config, write_micro

    newer = micro_config()
    text = newer["text_config"]
    shape = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
    text["per_layer_config"] = {"1": shape}
    single = micro_config()
    write_micro(seeds / "newer", newer)
    write_micro(seeds / "single", single, shards=0)
    write_kinds(seeds / "sharded", ("normal",) * 2)
    for recipe, to in {**QUANTISED, "q4_k_m": "gguf"}.items():
        scale = ("--input-scale", "0.01") if recipe == "nvfp4" else ()
        out = seeds / ("gguf" if to == "gguf" else recipe)
        code, _, stderr = invoke(
            ("convert", str(seeds / "sharded"), "--to", to, "--recipe", recipe, "-o", str(out), *scale)
        )
        assert code == 0, stderr
    for folder in ("bare", "recipes", "imatrix"):
        (seeds / folder).mkdir()
    os.link(next((seeds / "gguf").glob("*.gguf")), seeds / "bare" / "model.gguf")
    for file in (ROOT / "recipes").glob("*.toml"):
        shutil.copyfile(file, seeds / "recipes" / file.name)
    write_imatrix(seeds)


def write_imatrix(seeds: Path) -> None:
    import gguf
    import numpy as np

    from dgq.quant.files.gguf_file import GGUFReader

    reader = GGUFReader(seeds / "bare" / "model.gguf")
    writer = gguf.GGUFWriter(seeds / "imatrix" / "im.gguf", "imatrix")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for name in reader:
        shape = reader.shape(name)
        if len(shape) > 1 and name.startswith("blk.") and "gate_inp" not in name:
            rows = shape[0] if len(shape) == 3 else 1
            writer.add_tensor(f"{name}.in_sum2", np.full((rows, shape[-1]), 5, np.float32))
            writer.add_tensor(f"{name}.counts", np.full((rows, 1), 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spawn(first: int, options: argparse.Namespace, scratch: Path, log: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable]
    if options.coverage:
        config = scratch / "coveragerc"
        where = ",".join(str(ROOT / f"{name}.py") for name in COVERED)
        config.write_text(f"[run]\nbranch = true\nparallel = true\ndata_file = {scratch}/cov\ninclude = {where}\n")
        arguments += ["-m", "coverage", "run", f"--rcfile={config}"]
    arguments += [
        __file__,
        "--cases",
        str(options.cases),
        "--seed",
        str(options.seed),
        "--workers",
        str(options.workers),
    ]
    arguments += ["--until", str(options.until)]
    arguments += ["--work", str(first), str(scratch), str(log)] + (
        ["--keep", str(options.keep)] if options.keep else []
    )
    arguments += ["--only", str(options.only)] if options.only is not None else []
    return subprocess.Popen(arguments)


def last_begun(log: Path) -> tuple[int | None, bool]:
    """The last case a worker began, and whether it ended."""
    lines = log.read_text().splitlines() if log.exists() else []
    began = [number for line in lines if (number := json.loads(line).get("began")) is not None]
    return (began[-1], "began" not in json.loads(lines[-1])) if began else (None, True)


def supervise(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """All cases; a worker that dies is a finding, and another goes on behind it."""
    results: list[dict[str, Any]] = []
    starts = [options.only] if options.only is not None else range(options.workers)
    workers = {first: spawn(first, options, scratch, scratch / f"log{first}") for first in starts}
    for first in itertools.cycle(starts):
        if not workers:
            break
        if first not in workers:
            continue
        with suppress(subprocess.TimeoutExpired):
            code = workers[first].wait(1)
            del workers[first]
            last, ended = last_begun(scratch / f"log{first}")
            if code == 0:
                continue
            if last is None or ended or any(result["case"] == last for result in results):
                raise SystemExit(f"worker {first} ended with {code}")
            kind = "timeout" if code == 1 else "crash"
            results.append(
                {"case": last, "found": [f"{kind}: the worker ended with {code}"], "codes": {}, "parses": True}
            )
            if options.only is None and last + options.workers < options.cases:
                workers[first] = spawn(last + options.workers, options, scratch, scratch / f"log{first}")
    for first in starts:
        found = (json.loads(line) for line in (scratch / f"log{first}").read_text().splitlines())
        results += [line for line in found if "began" not in line]
    return results


def coverage_of(scratch: Path) -> dict[str, float]:
    """Per cent of lines and branches, by file and in all."""
    run = [sys.executable, "-m", "coverage"]
    rc = f"--rcfile={scratch}/coveragerc"
    subprocess.run([*run, "combine", "-q", rc], check=True, cwd=scratch)
    subprocess.run([*run, "json", "-q", rc, "-o", str(scratch / "cov.json")], check=True, cwd=scratch)
    said = json.loads((scratch / "cov.json").read_text())
    for file, about in said["files"].items():
        print(Path(file).name, about["summary"]["percent_covered_display"], about["missing_lines"], file=sys.stderr)
        print("   branches", about["missing_branches"], file=sys.stderr)
    files = {
        str(Path(file).relative_to(ROOT)) if Path(file).is_absolute() else file: about["summary"]
        for file, about in said["files"].items()
    }
    total = said["totals"]
    return {
        **{file: round(about["percent_covered"], 1) for file, about in sorted(files.items())},
        "branches": round(100 * total["covered_branches"] / total["num_branches"], 1),
        "total": round(total["percent_covered"], 1),
    }


def summary(results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    ends: Counter[str] = Counter()
    for result in results:
        for problem in result.get("found", ()):
            ends[problem.partition(":")[0]] += 1
        if "found" not in result:
            ends["errors" if any(code for code in result["codes"].values()) else "correct"] += 1
    return {
        "cases": len(results),
        "parse": round(sum(result["parses"] for result in results) / max(1, len(results)), 3),
        "clean_errors": ends["errors"],
        "correct": ends["correct"],
        **{f"{kind}s": ends[kind] for kind in ("traceback", "timeout", "crash")},
        **{kind: ends[kind] for kind in ("memory", "outside", "unclean", "wrong")},
        "commands": dict(Counter(name for result in results for name in result["codes"])),
        "slowest_s": max((result.get("seconds", 0) for result in results), default=0),
        "seconds": round(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--coverage", action="store_true", help="branch coverage of the readers, with coverage.py")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, help="where inputs that broke something are left")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep:
        options.keep = options.keep.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if options.work:
        first, scratch, log = options.work
        only = options.only is not None
        work(
            int(first),
            options.workers,
            options.cases,
            options.seed,
            Path(scratch),
            Path(log),
            options.keep,
            only,
            options.until,
        )
        return 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dgq-fuzz-") as folder:
        scratch = Path(folder).resolve()
        (scratch / "seeds").mkdir()
        build(scratch / "seeds")
        options.until = time.time() + options.seconds
        results = supervise(options, scratch)
        said = summary(results, time.perf_counter() - began)
        for result in sorted(results, key=lambda result: int(result["case"])):
            if "found" in result or options.only is not None:
                print(json.dumps(result, indent=1).replace("\\n", "\n"), file=sys.stderr)
        if options.coverage:
            said["coverage"] = coverage_of(scratch)
    print(json.dumps(said))
    return int(
        any(said[kind] for kind in ("tracebacks", "timeouts", "crashs", "memory", "outside", "unclean", "wrong"))
    )


if __name__ == "__main__":
    sys.exit(main())
