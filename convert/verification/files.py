"""An artifact's files, checked against its dgq.json: every byte of every file, and that nothing is missing or too much.

dgq.json        its last key is the SHA-256 of the rest of its text
its "files"     size and SHA-256 of every other file; there is no other file
the artifact    opens, and holds the schemes and the share of parameters that dgq.json names
manifest.json   in what `dgq publish` made: size and SHA-256 of the card and of all else that came with the artifact
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgq.convert.source.hashes import describe, sha256
from dgq.convert.write import provenance
from dgq.quant.errors import InputError, printable
from dgq.quant.files.hf_dir import read_json
from dgq.quant.schemes.registry import stored_bits
from dgq.runtime.files.artifact import open_artifact
from dgq.runtime.shape.names import ROPE_FREQS

Progress = Callable[[int, str], None]  # bytes that are done, the name of their file
MANIFEST = "manifest.json"
HUBS = (".gitattributes", ".cache")  # what the Hub, and its downloads into a directory, add


@dataclass(frozen=True)
class FileCheck:
    """problems: a line for each thing that is wrong; files, bytes: that were checked."""

    problems: tuple[str, ...]
    files: int
    bytes: int

    @property
    def ok(self) -> bool:
        return not self.problems


def check_files(path: Path, threads: int, progress: Progress, links: bool = False) -> FileCheck:
    """Check an artifact directory against its dgq.json, `threads` files at once. progress is called with the bytes and
    the name of each file that is done; links: files may be links, as in the Hub's cache. InputError without a dgq.json
    that lists files."""
    file, document = path / provenance.FILE, _document(path, links)
    listed = document["files"]
    problems = list(_seal(file, document))
    names = {entry.name for entry in path.iterdir()} - {provenance.FILE}
    if MANIFEST in names - listed.keys():
        names -= {MANIFEST, *HUBS}
        wrong, more = _manifest(path / MANIFEST, file, listed)
        problems += wrong
        listed = listed | more
    problems += [f"{path / name}: is missing" for name in sorted(listed.keys() - names)]
    problems += [f"{path / name}: is not part of the artifact" for name in sorted(names - listed.keys())]
    there = sorted(names & listed.keys())
    with ThreadPoolExecutor(threads) as pool:
        differing = pool.map(lambda name: _differs(path / name, listed[name], links), there)
        for name, wrong in zip(there, differing, strict=True):
            problems += wrong
            progress(listed[name]["bytes"], name)
    if not problems:
        problems += _contents(path, document)
    size = sum(listed[name]["bytes"] for name in there) + file.stat().st_size
    return FileCheck(tuple(map(printable, problems)), len(there) + 1, size)


def _document(path: Path, links: bool) -> dict[str, Any]:
    """The artifact's dgq.json. InputError if it is none that lists files."""
    file = path / provenance.FILE
    if not path.is_dir():
        raise InputError(f"{path}: is no artifact directory")
    if (file.is_symlink() and not links) or (file.exists() and not file.is_file()):
        raise InputError(f"{file}: is no plain file")
    document = read_json(file)
    listed = document.get("files")
    if not isinstance(listed, dict) or not all(_describes(entry) for entry in listed.values()):
        raise InputError(f"{file}: its files are no object of bytes and sha256; damaged")
    return document


def total_bytes(path: Path) -> int:
    """The bytes of a directory's files, which a progress bar counts to; 0 if they cannot be known."""
    total = 0
    for entry in path.iterdir() if path.is_dir() else ():
        with suppress(OSError):  # a link that leads to itself
            total += entry.stat().st_size if entry.is_file() else 0
    return total


def _describes(entry: Any) -> bool:
    """Whether it has the size and the SHA-256 of a file."""
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


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
    """The problems of a manifest.json itself, and the files that it adds to dgq.json's."""
    manifest = read_json(file)
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(_describes(one) for one in entries.values()):
        raise InputError(f"{file}: its files are no object of bytes and sha256; damaged")
    problems = list(_seal(file, manifest))
    mine = listed | {provenance.FILE: describe(document)}
    both = sorted(mine.keys() & entries.keys())
    problems += [f"{file}: says other bytes of {name} than dgq.json" for name in both if mine[name] != entries[name]]
    problems += [f"{file}: does not list {name}" for name in sorted(mine.keys() - entries.keys())]
    return problems, {name: entries[name] for name in entries.keys() - mine.keys() if "/" not in name}


def _differs(file: Path, entry: dict[str, Any], links: bool) -> list[str]:
    if (file.is_symlink() and not links) or not file.is_file():
        return [f"{file}: is no plain file"]
    size = file.stat().st_size
    if size != entry["bytes"]:
        return [f"{file}: has {size} bytes, dgq.json says {entry['bytes']}"]
    if sha256(file) != entry["sha256"]:
        return [f"{file}: its SHA-256 is not dgq.json's; it was changed or damaged"]
    return []


def _contents(path: Path, document: dict[str, Any]) -> Iterator[str]:
    """Hold what the files contain against what dgq.json says of it."""
    try:
        weights = open_artifact(path).weights
    except InputError as error:
        yield str(error)
        return
    stored = {weights.own_name(name): weight for name, weight in weights.everything().items()}
    schemes = {name: weight.scheme for name, weight in stored.items()}
    tensors = document.get("tensors")
    if not isinstance(tensors, dict) or {name: tensors[name] for name in tensors if name != ROPE_FREQS} != schemes:
        yield f"{path / provenance.FILE}: its tensors are not those of the files"
    below = sum(weight.numel for weight in stored.values() if stored_bits(weight.scheme) < 16)
    params = sum(weight.numel for weight in stored.values())
    named = document.get("quantized_params"), document.get("params")
    if (below, params) != named:
        yield f"{path}: {below} of {params} parameters are quantised, dgq.json says {named[0]} of {named[1]}"
