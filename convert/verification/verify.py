"""Is an artifact what dgq.json says it is? Every byte of every file, and that nothing is missing or too much.

dgq.json        its last key is the SHA-256 of the rest of its text
its "files"     size and SHA-256 of every other file; no file besides
the artifact    opens, and holds the schemes and the share of parameters that dgq.json names
manifest.json   in what `dgq publish` made: size and SHA-256 of the card and all else that came with the artifact
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgq.convert.source.hashes import describe, sha256
from dgq.convert.write import provenance
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import ROPE_FREQS

Progress = Callable[[int, str], None]
MANIFEST = "manifest.json"
HUBS = (".gitattributes", ".cache")  # what the Hub, and its downloads into a directory, add


def verify(path: Path, threads: int, progress: Progress, links: bool = False) -> dict[str, Any]:
    """Check an artifact directory: {"ok", "problems", "files", "bytes"}. InputError without a dgq.json to go by.
    links: files may be links, as in the Hub's cache."""
    file = path / provenance.FILE
    if not path.is_dir():
        raise InputError(f"{path}: is no artifact directory")
    if (file.is_symlink() and not links) or (file.exists() and not file.is_file()):
        raise InputError(f"{file}: is no plain file")
    document = read_json(file)
    listed = document.get("files")
    if not isinstance(listed, dict) or not all(_describes(said) for said in listed.values()):
        raise InputError(f"{file}: its files are no object of bytes and sha256; damaged")
    problems = list(_seal(file, document))
    found = {entry.name for entry in path.iterdir()} - {provenance.FILE}
    if MANIFEST in found - listed.keys():
        found -= {MANIFEST, *HUBS}
        told, more = _manifest(path / MANIFEST, file, listed)
        problems += told
        listed = listed | more
    problems += [f"{path / name}: is missing" for name in sorted(listed.keys() - found)]
    problems += [f"{path / name}: is not part of the artifact" for name in sorted(found - listed.keys())]
    there = sorted(found & listed.keys())
    with ThreadPoolExecutor(threads) as pool:
        for name, wrong in zip(
            there, pool.map(lambda name: _differs(path / name, listed[name], links), there), strict=True
        ):
            problems += wrong
            progress(listed[name]["bytes"], name)
    if not problems:
        problems += _contents(path, document)
    return {
        "ok": not problems,
        "problems": [printable(problem) for problem in problems],
        "files": len(there) + 1,
        "bytes": sum(listed[name]["bytes"] for name in there) + file.stat().st_size,
    }


def total_bytes(path: Path) -> int:
    """What a progress bar counts to; 0 if it cannot be known."""
    total = 0
    for entry in path.iterdir() if path.is_dir() else ():
        with suppress(OSError):  # a link that leads to itself
            total += entry.stat().st_size if entry.is_file() else 0
    return total


def _describes(said: Any) -> bool:
    return isinstance(said, dict) and type(said.get("bytes")) is int and isinstance(said.get("sha256"), str)


def _seal(file: Path, document: dict[str, Any]) -> Iterator[str]:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    try:
        sealed = provenance.sealed(rest)
    except RecursionError:  # it is nested too deeply
        sealed = {}
    if document != sealed:
        yield f"{file}: its SHA-256 of itself is wrong; it was changed or damaged"
    elif file.read_bytes() != provenance.text(sealed).encode():
        yield f"{file}: is not written as dgq writes it; it was changed or damaged"


def _manifest(file: Path, document: Path, listed: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a manifest.json itself, and the files that it adds to dgq.json's."""
    manifest = read_json(file)
    said = manifest.get("files")
    if not isinstance(said, dict) or not all(_describes(one) for one in said.values()):
        raise InputError(f"{file}: its files are no object of bytes and sha256; damaged")
    problems = list(_seal(file, manifest))
    mine = listed | {provenance.FILE: describe(document)}
    both = sorted(mine.keys() & said.keys())
    problems += [f"{file}: says other bytes of {name} than dgq.json" for name in both if mine[name] != said[name]]
    problems += [f"{file}: does not list {name}" for name in sorted(mine.keys() - said.keys())]
    return problems, {name: said[name] for name in said.keys() - mine.keys() if "/" not in name}


def _differs(file: Path, said: dict[str, Any], links: bool = False) -> list[str]:
    if (file.is_symlink() and not links) or not file.is_file():
        return [f"{file}: is no plain file"]
    size = file.stat().st_size
    if size != said["bytes"]:
        return [f"{file}: has {size} bytes, dgq.json says {said['bytes']}"]
    if sha256(file) != said["sha256"]:
        return [f"{file}: its SHA-256 is not dgq.json's; it was changed or damaged"]
    return []


def _contents(path: Path, document: dict[str, Any]) -> Iterator[str]:
    """What the files hold, against what dgq.json says of it."""
    try:
        weights = open_artifact(path).weights
    except InputError as error:
        yield str(error)
        return
    found = {weights.own_name(name): stored for name, stored in weights.everything().items()}
    schemes = {name: stored.scheme for name, stored in found.items()}
    said = document.get("tensors")
    if not isinstance(said, dict) or {name: said[name] for name in said if name != ROPE_FREQS} != schemes:
        yield f"{path / provenance.FILE}: its tensors are not those of the files"
    below = sum(stored.numel for stored in found.values() if stored_bits(stored.scheme) < 16)
    params = sum(stored.numel for stored in found.values())
    told = document.get("quantized_params"), document.get("params")
    if (below, params) != told:
        yield f"{path}: {below} of {params} parameters are quantised, dgq.json says {told[0]} of {told[1]}"
