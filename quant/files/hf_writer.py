"""Writing a directory of safetensors files: sizes first, bytes in any order, a tensor at a time or a piece at a time.

    shards(...)      which tensor goes into which file: a weight's tensors stay together, no file above MAX_SHARD
    HFWriter         writes every header at once, then each appended piece to its place

Inside a file tensors are sorted by the size of their elements, so that each is aligned whatever came before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from dgq.quant.files.hf_dir import DTYPES, INDEX, SINGLE
from dgq.quant.files.places import Places
from dgq.quant.types import Entry

MAX_SHARD = 5 * 10**9


def entry_bytes(entry: Entry) -> int:
    dtype, shape = entry
    itemsize: int = DTYPES[dtype].itemsize
    return math.prod(shape) * itemsize


def shards(weights: Iterable[Mapping[str, Entry]], limit: int = MAX_SHARD) -> list[dict[str, Entry]]:
    """Files, each a dict name -> entry, filled in order; each of `weights` goes into one file whole."""
    files: list[dict[str, Entry]] = [{}]
    filled = 0
    for entries in weights:
        size = sum(map(entry_bytes, entries.values()))
        if filled and filled + size > limit:
            files.append({})
            filled = 0
        files[-1] |= entries
        filled += size
    return files


class HFWriter:
    """Writes model.safetensors, or shards with an index, into a directory."""

    def __init__(self, path: Path, files: list[dict[str, Entry]]) -> None:
        """files: as shards() gives them. Headers are written and files get their sizes now; of files that are there
        already the tensors' bytes stay."""
        count = len(files)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.places = Places()
        self._path = path
        self._weight_map = {name: file for file, entries in zip(names, files, strict=True) for name in entries}
        self._size = sum(self._start(path / file, entries) for file, entries in zip(names, files, strict=True))

    def _start(self, path: Path, entries: dict[str, Entry]) -> int:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(entries, key=lambda name: -DTYPES[entries[name][0]].itemsize):
            dtype, shape = entries[name]
            start, end = end, end + entry_bytes(entries[name])
            spans[name] = (start, end)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        file = self.places.open(path, len(text).to_bytes(8, "little") + text, base + end)
        for name, (start, stop) in spans.items():
            self.places.add(name, file, base + start, base + stop)
        return end

    def close(self) -> None:
        """Check that every tensor is complete, and write the index. RuntimeError if one is not."""
        self.places.close()
        if len(set(self._weight_map.values())) > 1:
            index = {"metadata": {"total_size": self._size}, "weight_map": dict(sorted(self._weight_map.items()))}
            (self._path / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
