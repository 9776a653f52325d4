"""What calibration runs on: documents cut into prompt | canvas, the canvas at many noise levels. All by a seed.

    text     t t t t t t|c c c c c c|…          cut anywhere
    chat     user's turn |the answer, block by block
    open     user's turn |the model's own draft            a chat without an answer

    canvas   c r c c r c      a share of its tokens replaced by random ones: the share is spread evenly over 0 … 1

Every canvas is run twice, plain and conditioned on its own logits, so nothing else has to be stored. A round takes
every document once; more rounds cut and noise anew. Sequences come in chunks of up to CHUNK tokens, which are what is
handed out to processes: whatever their number, the sums are over the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hub import TINY
from dgq.quant.errors import InputError
from dgq.quant.files.hf_dir import read_whole
from dgq.runtime.files.tokenizer import Tokenizer

CHUNK = 1 << 13  # tokens of a chunk at most, if more than one sequence; canvases counted twice
PER_PROMPT = 2  # canvases behind a prompt: other prompts teach more than more noise
BINS = 4  # of noise, in the counts
KINDS = 1 + 2 * BINS  # the prompt; canvases by noise; conditioned canvases by noise
LONGEST = 1024  # tokens of a prompt
SHORTEST = 8
TOKENS = 1 << 18  # of all chunks at most: converting keeps their states on disk, 47 GB for the 26B in bfloat16
MAX_FILE = 1 << 28


@dataclass(frozen=True)
class Document:
    """ids, and where canvases begin: anywhere from `first` on (text), or there and every canvas later (a chat).
    open: nothing follows; the model has to write it."""

    ids: tuple[int, ...]
    first: int
    chat: bool

    @property
    def open(self) -> bool:
        return self.first == len(self.ids)


def documents(source: Source, file: Path | None) -> tuple[list[Document], dict[str, Any]]:
    """The documents of a .jsonl of {"messages"} or {"text"}, or of a .txt with empty lines between them; without a
    file those that ship with dgq. And their name and SHA-256. InputError names the line that is wrong."""
    tokenizer = Tokenizer.from_dir(source.path)
    if file is None:
        name, raw = shipped(source)
    else:
        try:
            name, raw = file.name, read_whole(file, MAX_FILE)
        except OSError as error:
            raise InputError(f"{file}: not readable ({error})") from None
    where, kind = str(file or name), Path(name).suffix.lower()
    if kind not in (".jsonl", ".txt"):
        raise InputError(f"{where}: its name ends in neither .jsonl nor .txt")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8 text") from None
    items = _lines(text, where) if kind == ".jsonl" else _paragraphs(text, where)
    found = [document for at, item in items if (document := _document(item, at, tokenizer, source))]
    if not found:
        raise InputError(f"{where}: holds no document of at least {SHORTEST + 1} tokens")
    return found, {"name": name, "sha256": hashlib.sha256(raw).hexdigest(), "documents": len(found)}


def shipped(source: Source) -> tuple[str, bytes]:
    """Name and content of the prompts that come with dgq: those of `tiny`, or general ones."""
    name = "calibration.jsonl" if source.where.asked == TINY else "general.jsonl"
    return name, files("dgq.recipes").joinpath("prompts", name).read_bytes()


def _lines(text: str, where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # JSON's strings may hold what splitlines() takes for ends
        if not line.strip():
            continue
        at = f"{where}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{at}: no JSON ({error})") from None
        messages = item.get("messages") if isinstance(item, dict) else None
        good = isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )  # fmt: skip
        if not good and not (isinstance(item, dict) and isinstance(item.get("text"), str)):
            raise InputError(f'{at}: expected {{"text": "…"}} or {{"messages": [{{"role", "content"}}, …]}}')
        yield at, item


def _paragraphs(text: str, where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    parts = (part for part in re.split(r"\r?\n\s*\n", text) if part.strip())
    return ((f"{where}, paragraph {number}", {"text": part}) for number, part in enumerate(parts, 1))


def _document(item: dict[str, Any], at: str, tokenizer: Tokenizer, source: Source) -> Document | None:
    vocab = source.config.vocab
    try:
        ids, first, chat = _encoded(item, tokenizer)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    if ids and max(ids) >= vocab:
        raise InputError(f"{at}: its tokenizer gives token {max(ids)}, the vocabulary of {source.path} has {vocab}")
    return Document(tuple(ids), first, chat) if len(ids) > first or (chat and ids) else None


def _encoded(item: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], int, bool]:
    """ids, first and chat of a Document."""
    if isinstance(item.get("text"), str):
        return tokenizer.encode(item["text"]), SHORTEST, False
    messages = item["messages"]
    prompt = tokenizer.chat(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    if messages[-1]["role"] != "assistant":
        return prompt, len(prompt), True
    ids = tokenizer.chat(messages, add_generation_prompt=False)
    return ids, min(len(prompt), len(ids) - 1), True


def chunks(found: list[Document], seed: int, turn: int, source: Source) -> list[Chunk]:
    """Round `turn` over the documents, none of them open."""
    config = source.config
    rng = random.Random(f"{seed} {turn}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    room = max(1, min(LONGEST, config.context - config.canvas))
    sequences = []
    for document in found:
        ids = document.ids
        if document.chat:
            start = document.first + config.canvas * rng.randrange(-(-(len(ids) - document.first) // config.canvas))
        else:
            start = rng.randint(document.first, max(document.first, len(ids) - config.canvas))
        canvas = (ids[start : start + config.canvas] + (config.pad_id,) * config.canvas)[: config.canvas]
        sequences.append((ids[max(0, start - room) : start], canvas))
    rng.shuffle(sequences)
    made: list[Chunk] = []
    waiting: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    size = 0
    for prompt, canvas in sequences:
        own = len(prompt) + 2 * PER_PROMPT * config.canvas
        if waiting and size + own > CHUNK:
            made.append(_chunk(waiting, rng, generator, config.vocab))
            waiting, size = [], 0
        waiting.append((prompt, canvas))
        size += own
    return [*made, _chunk(waiting, rng, generator, config.vocab)] if waiting else made


def _chunk(
    sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], rng: random.Random, generator: torch.Generator, vocab: int
) -> Chunk:
    canvases, owner, kind = [], [], []
    for number, (_, canvas) in enumerate(sequences):
        for i in range(PER_PROMPT):
            level = (i + rng.random()) / PER_PROMPT
            noise = torch.randint(0, vocab, (len(canvas),), generator=generator)
            replaced = torch.rand(len(canvas), generator=generator) < level
            canvases.append(torch.where(replaced, noise, torch.tensor(canvas)))
            owner.append(number)
            kind.append(1 + min(BINS - 1, int(level * BINS)))
    return Chunk(tuple(prompt for prompt, _ in sequences), torch.stack(canvases), tuple(owner), torch.tensor(kind))


def used(made: list[Chunk]) -> list[Chunk]:
    """The first of the chunks, TOKENS of them or one chunk. They were shuffled."""
    tokens = list(accumulate(chunk.run_tokens for chunk in made))
    return made[: max(1, sum(total <= TOKENS for total in tokens))]


def doubled(chunk: Chunk) -> Chunk:
    """Every canvas a second time, conditioned."""
    index, second = _twice(chunk)
    owner = tuple(chunk.owner[i] for i in index.tolist())
    return Chunk(chunk.prompts, chunk.canvases[index], owner, chunk.kind[index] + BINS * second)


def conditioned(chunk: Chunk, soft: torch.Tensor) -> torch.Tensor:
    """soft (n, canvas, hidden) of a chunk -> (2n, canvas, hidden) of it doubled: zeros for the plain canvases."""
    index, second = _twice(chunk)
    return soft[index] * second[:, None, None]


def _twice(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Which canvas each of the doubled ones is, and whether for the second time; (2n,)."""
    n = len(chunk.owner)
    order = sorted(range(2 * n), key=lambda i: (chunk.owner[i % n], i))
    return torch.tensor([i % n for i in order]), torch.tensor([i >= n for i in order])
