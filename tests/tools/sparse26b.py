"""The real checkpoint without its bytes: shards of the real sizes, holes where the payload is, headers from
golden/real26b/tensors.json. They take no disk space worth mentioning and read as zeros."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

REAL = Path(__file__).parent.parent / "golden" / "real26b"


def write_sparse_26b(path: Path) -> Path:
    """Write config, index and 11 sparse shards into `path`."""
    listing = json.loads((REAL / "tensors.json").read_text())
    shards: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, entry in listing["tensors"].items():
        shards[entry["shard"]][name] = entry
    path.mkdir()
    weight_map = {}
    for number, entries in shards.items():
        file = listing["shards"][number - 1]["file"]
        write_sparse(path / file, {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()})
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(REAL / name, path / name)
    return path


def write_sparse(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file whose payload is a hole."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + prod(shape) * {"BF16": 2, "F16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + offset)
