"""The samples of calibration: documents cut into prompt | canvas, the canvas at many noise levels, all by a seed.

    text     t t t t t t|c c c c c c|…          cut anywhere
    chat     user's turn |the answer, block by block
    open     user's turn |the draft of the model            a chat without an answer

    canvas   c r c c r c      a share of its tokens replaced by random ones: the share is spread evenly over 0 … 1

Every canvas is run twice, plain and conditioned on the logits of the first run, so that nothing else has to be stored.
A round takes every document once; further rounds cut and noise anew. Sequences come in chunks of up to CHUNK tokens.
Chunks are what is dealt out to processes: however many there are, the sums are over the same numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from dgq.convert.layerwise.chunk import Chunk
from dgq.convert.source.checkpoint import Source
from dgq.convert.source.hub import TINY
from dgq.convert.source.prompts import PromptFile, is_chat, read_prompts, shipped_prompts
from dgq.quant.errors import InputError
from dgq.runtime.files.tokenizer import Tokenizer

CHUNK = 1 << 13  # tokens of a chunk at most, if more than one sequence; canvases counted twice
PER_PROMPT = 2  # canvases behind a prompt: other prompts teach more than more noise
BINS = 4  # of noise, in the counts
KINDS = 1 + 2 * BINS  # the prompt; canvases by noise; conditioned canvases by noise
LONGEST = 1024  # tokens of a prompt
SHORTEST = 8
TOKENS = 1 << 18  # of all chunks at most: converting keeps their states on disk, 47 GB for the 26B in bfloat16


@dataclass(frozen=True)
class Document:
    """The ids of a text or chat, and where canvases begin: anywhere from `first` on in a text; in a chat at `first`,
    and a whole number of canvases later."""

    ids: tuple[int, ...]
    first: int
    chat: bool

    @property
    def open(self) -> bool:
        """Whether nothing follows: the model has to write the answer."""
        return self.first == len(self.ids)


def documents(source: Source, file: Path | None) -> tuple[list[Document], dict[str, Any]]:
    """The documents of a prompt file, by default of the one that ships with dgq, and its name, SHA-256 and count.

    A .jsonl holds {"messages"} or {"text"}, a .txt texts with empty lines between them. InputError names the line that
    is wrong; it is also raised if the source has no usable tokenizer, or no document is long enough.
    """
    tokenizer = Tokenizer.from_dir(source.path)
    prompts = default_prompts(source) if file is None else read_prompts(file)
    name = prompts.where if file is None else file.name
    kind = Path(name).suffix.lower()
    if kind not in (".jsonl", ".txt"):
        raise InputError(f"{prompts.where}: its name ends in neither .jsonl nor .txt")
    entries: Iterator[tuple[str, dict[str, Any]]]
    entries = _entries(prompts) if kind == ".jsonl" else ((at, {"text": text}) for at, text in prompts.paragraphs())
    if file is None and not tokenizer.chats:  # dgq's own: the texts alone
        entries = ((at, entry) for at, entry in entries if "text" in entry)
    read = [document for at, entry in entries if (document := _document(entry, at, tokenizer, source))]
    if not read:
        raise InputError(f"{prompts.where}: holds no document of at least {SHORTEST + 1} tokens")
    return read, {"name": name, "sha256": hashlib.sha256(prompts.raw).hexdigest(), "documents": len(read)}


def default_prompts(source: Source) -> PromptFile:
    """The prompts for calibration that ship with dgq: those of `tiny`, or general ones."""
    return shipped_prompts("calibration.jsonl" if source.where.asked == TINY else "general.jsonl")


def _entries(prompts: PromptFile) -> Iterator[tuple[str, dict[str, Any]]]:
    for at, entry in prompts.json_lines():
        good = isinstance(entry, dict) and (isinstance(entry.get("text"), str) or is_chat(entry.get("messages")))
        if not good:
            raise InputError(f'{at}: expected {{"text": "…"}} or {{"messages": [{{"role", "content"}}, …]}}')
        yield at, entry


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


def chunks(cut: list[Document], seed: int, turn: int, source: Source) -> list[Chunk]:
    """The chunks of round `turn` over the documents, none of which is open."""
    config = source.config
    rng = random.Random(f"{seed} {turn}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    room = max(1, min(LONGEST, config.context - config.canvas))
    sequences = []
    for document in cut:
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
        tokens = len(prompt) + 2 * PER_PROMPT * config.canvas
        if waiting and size + tokens > CHUNK:
            made.append(_chunk(waiting, rng, generator, config.vocab))
            waiting, size = [], 0
        waiting.append((prompt, canvas))
        size += tokens
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
    """The first of the chunks, up to TOKENS tokens or one chunk. Their documents were shuffled before they were cut."""
    tokens = list(accumulate(chunk.run_tokens for chunk in made))
    return made[: max(1, sum(total <= TOKENS for total in tokens))]


def doubled(chunk: Chunk) -> Chunk:
    """The chunk with every canvas twice: plain, and behind it to be conditioned (its kind is BINS higher)."""
    index, second = _twice(chunk)
    owner = tuple(chunk.owner[i] for i in index.tolist())
    return Chunk(chunk.prompts, chunk.canvases[index], owner, chunk.kind[index] + BINS * second)


def conditioned(chunk: Chunk, soft: torch.Tensor) -> torch.Tensor:
    """What the canvases of doubled(chunk) are conditioned on, (2n, canvas, hidden): zeros for the plain ones, `soft`
    (n, canvas, hidden) for the others."""
    index, second = _twice(chunk)
    return soft[index] * second[:, None, None]


def _twice(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Which canvas each of the doubled ones is, and whether it is there for the second time; both (2n,)."""
    n = len(chunk.owner)
    order = sorted(range(2 * n), key=lambda i: (chunk.owner[i % n], i))
    return torch.tensor([i % n for i in order]), torch.tensor([i >= n for i in order])
