"""The two passes of calibration samples through the model, layer by layer, and the way back.

    first    prompts, canvases                             -> what every canvas is conditioned on
    second   prompts, canvases, canvases conditioned       -> a ForwardHook sees every product

    back     gradients, from the head to the first layer   -> a BackwardHook sees every product

Between two layers the hidden states lie in files. With two files layer i reads file i % 2 and writes the other, so that
work which broke off in a layer begins again with that layer. The way back needs the states before every layer: a file a
layer, and one more. Beside a GPU the next chunk's states are read, and the last one's written, while it computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import torch

from dgq.convert.layerwise.chunk import Chunk, States
from dgq.convert.layerwise.hooks import BackwardHook, ForwardHook
from dgq.convert.layerwise.samples import LONGEST, Document, conditioned, doubled
from dgq.convert.layerwise.stream import Stream
from dgq.convert.source.checkpoint import Source
from dgq.quant.errors import InputError
from dgq.quant.types import Packed

DRAFTED = 8  # documents continued together
DRAFTS = 2  # steps in which a model writes what follows an open document


class Rows(Mapping[str, Packed]):
    """A source's weights, read from the disk and not mapped; some of them replaced by `others`."""

    def __init__(self, source: Source, others: Mapping[str, Packed] | None = None) -> None:
        self._source, self._others = source, others or {}

    def __getitem__(self, name: str) -> Packed:
        if name in self._others:
            return self._others[name]
        weight = self._source[name]
        shape = weight.shape
        return Packed(weight.scheme, shape, {"": self._source.rows(name, 0, shape[0])})

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


class SamplePasses:
    """Both passes over `chunks`, and the way back. This process does the chunks whose numbers are in `mine`."""

    def __init__(
        self, stream: Stream, chunks: Sequence[Chunk], mine: Sequence[int], soft: BinaryIO, files: Sequence[BinaryIO]
    ) -> None:
        """files: for the hidden states, at least two; soft: for what canvases are conditioned on. They are empty, or of
        the same work that broke off."""
        self.stream, self._chunks, self.mine = stream, chunks, mine
        self.doubled = [doubled(chunk) for chunk in chunks]  # as the second pass takes them
        self.layers = len(stream.config.layers)
        self.meanwhile = stream.device.type == "cuda"
        kind = stream.config.hidden, stream.dtype, self.meanwhile
        tokens = [chunk.tokens for chunk in self.doubled]
        self._states = [States(file, tokens, *kind) for file in files]
        self._plain = [States(file, [chunk.tokens for chunk in chunks], *kind) for file in files[:2]]
        self._soft = States(soft, [chunk.canvases.numel() for chunk in chunks], *kind)

    def first(self, progress: Callable[[], None]) -> None:
        """The first pass, after which the second can begin. progress: called after each layer."""
        for number in self.mine:
            self._plain[0].write(number, self.stream.enter(self._chunks[number], None))
        for index in range(self.layers):
            self._plainly(index)
            progress()
        for number in self.mine:
            x = self._plain[self.layers % 2].read(number).to(self.stream.device)
            soft = torch.cat([self.stream.soften(logits) for _, logits in self.stream.leave(self._chunks[number], x)])
            for canvas, given in self._chunks[number].given.items():
                soft[canvas] = given
            self._soft.write(number, soft.flatten(0, 1))
        os.fsync(self._soft.file.fileno())

    def _plainly(self, index: int) -> None:
        layer, before, after = self.stream.layer(index), self._plain[index % 2], self._plain[(index + 1) % 2]
        self._each(before.read, lambda number, x: layer(self._chunks[number], x), after.write)

    def _each(
        self, read: Callable[[int], Any], work: Callable[[int, Any], torch.Tensor],
        write: Callable[[int, torch.Tensor], None],
    ) -> None:  # fmt: skip
        """For every chunk, write what `work` makes of what `read` gives."""
        if not self.meanwhile:
            for number in self.mine:
                write(number, work(number, read(number)))
            return
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            last: Future[Any] = writer.submit(int)
            ahead = [reader.submit(read, number) for number in self.mine[:1]]
            for place, number in enumerate(self.mine, 1):
                given = ahead.pop().result()
                ahead = [reader.submit(read, following) for following in self.mine[place : place + 1]]
                made = work(number, given)
                last.result()
                last = writer.submit(write, number, made)
            last.result()

    def enter(self, hook: ForwardHook | None) -> None:
        """The second pass before the first layer: embeddings and self-conditioning."""
        for number in self.mine:
            self._states[0].write(number, self.stream.enter(self.doubled[number], self.soft(number), hook))
        os.fsync(self._states[0].file.fileno())

    def layer(self, index: int, hook: ForwardHook | None) -> None:
        """Layer `index` of the second pass, after the one before it."""
        layer = self.stream.layer(index, hook)
        before, after = (self._states[i % len(self._states)] for i in (index, index + 1))
        self._each(before.read, lambda number, x: layer(self.doubled[number], x), after.write)
        os.fsync(after.file.fileno())

    def leave(self, hook: ForwardHook | None) -> None:
        """The second pass after the last layer: the head."""
        for number in self.mine:
            x = self._states[self.layers % len(self._states)].read(number).to(self.stream.device)
            for _ in self.stream.leave(self.doubled[number], x, hook):
                pass

    def back(self, stage: int | str, hook: BackwardHook, again: bool = False) -> None:
        """One stage of the way back: "leave", then each layer from the last to the first, then "enter".

        Gradients take the place of the states they belong to, unless the same stage comes `again`, for a hook that
        cannot hold everything at once. InputError if the model's hidden states are not finite.
        """
        if isinstance(stage, int):
            layer, here, above = self.stream.layer(stage, backward=hook), self._states[stage], self._states[stage + 1]
            self._each(
                lambda number: (here.read(number), above.read(number)),
                lambda number, read: layer.pull(self.doubled[number], *read),
                (lambda number, gradient: None) if again else here.write,
            )
            self.stream.forget()
            return
        for number in self.mine:
            chunk = self.doubled[number]
            if stage == "leave":
                last = self._states[self.layers]
                x = last.read(number)
                if not bool(x.isfinite().all()):
                    raise InputError(
                        "the model's hidden states are not numbers; the checkpoint is damaged,"
                        " and a conversion without --stats names the weight"
                    )
                gradient = self.stream.pull_leave(chunk, x, number, hook)
                if not again:
                    last.write(number, gradient)
            else:
                self.stream.pull_enter(chunk, self.soft(number), self._states[0].read(number), hook)
        self.stream.forget()

    def before(self, index: int, number: int) -> torch.Tensor:
        """A chunk's states (tokens, hidden) before layer `index` of the second pass, if a file a layer was given."""
        return self._states[index].read(number)

    def soft(self, number: int) -> torch.Tensor:
        """What the canvases of a doubled chunk are conditioned on in the second pass, (2n, canvas, hidden)."""
        chunk = self._chunks[number]
        return conditioned(chunk, self._soft.read(number).view(*chunk.canvases.shape, -1))


def drafted(stream: Stream, read: list[Document], seed: int, progress: Callable[[], None]) -> list[Document]:
    """The documents, the open ones continued by the model itself: by the likeliest tokens after DRAFTS steps, behind
    the last LONGEST tokens of each. progress: called after each layer."""
    size = DRAFTED
    wanted = [document for document in read if document.open]
    canvas = stream.config.canvas
    generator = torch.Generator().manual_seed(seed)
    groups = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    made = [torch.randint(0, stream.config.vocab, (len(group), canvas), generator=generator) for group in groups]
    soft: list[torch.Tensor | None] = [None] * len(groups)
    for _ in range(DRAFTS if wanted else 0):
        chunks = [
            Chunk(
                tuple(d.ids[-LONGEST:] for d in group),
                ids,
                tuple(range(len(group))),
                torch.ones(len(group), dtype=torch.int64),
            )
            for group, ids in zip(groups, made, strict=True)
        ]
        states = [stream.enter(chunk, given) for chunk, given in zip(chunks, soft, strict=True)]
        for index in range(len(stream.config.layers)):
            layer = stream.layer(index)
            for i, chunk in enumerate(chunks):
                states[i] = layer(chunk, states[i])
            del layer  # before the next is read
            progress()
        for i, (chunk, x) in enumerate(zip(chunks, states, strict=True)):
            pieces = [(logits.argmax(-1).cpu(), stream.soften(logits)) for _, logits in stream.leave(chunk, x)]
            made[i] = torch.cat([ids for ids, _ in pieces])
            soft[i] = torch.cat([values for _, values in pieces])
    answers = iter([ids for group in made for ids in group.tolist()])
    return [Document((*d.ids, *next(answers)), d.first, d.chat) if d.open else d for d in read]
