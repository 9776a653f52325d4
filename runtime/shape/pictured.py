"""Prompts with images: the tokens of an image have embeddings of their own, and all of them see each other.

    ids      <bos> <|image> <|image|> <|image|> <|image|> <image|> what is this        one soft token a <|image|>
    ahead      0       0        2         1         0        0       0   0   0         tokens of its image behind it,
    behind     0       0        0         1         2        0       0   0   0         and before it

A text token sees every token up to itself, on sliding layers those in the window. An image's token also sees all of
its image, which may reach beyond both: it sees from max(window - 1, behind) tokens before it to `ahead` tokens after
it. A prompt is encoded in pieces that split no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby

import torch
from torch import Tensor


class Pictured(Sequence[int]):
    """A prompt's token ids, which can be used as any other prompt's. embeddings (image tokens, hidden) take the place
    of the embeddings of those ids that are `image_token`, in their order. is_causal: image tokens see what is before
    them alone, as text does."""

    def __init__(self, ids: Sequence[int], embeddings: Tensor, image_token: int, is_causal: bool = False) -> None:
        self._ids, self.embeddings, self._image, self.is_causal = tuple(ids), embeddings, image_token, is_causal
        self.is_image = [token == image_token for token in self._ids]
        assert sum(self.is_image) == len(embeddings)
        runs = [(image, len(list(run))) for image, run in groupby(self.is_image)]
        self.behind = [i if image else 0 for image, n in runs for i in range(n)]
        self.ahead = [n - 1 - i if image else 0 for image, n in runs for i in range(n)]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> int, slice -> tuple
        return self._ids[index]

    def part(self, first: int, last: int) -> Pictured:
        """The tokens from `first` to `last`, which split no image."""
        before, own = sum(self.is_image[:first]), sum(self.is_image[first:last])
        return Pictured(self._ids[first:last], self.embeddings[before : before + own], self._image, self.is_causal)


@dataclass(frozen=True)
class Pictures:
    """The images in a piece of a batch of prompts. at: bool (rows, tokens), which tokens belong to images; embeddings:
    (those tokens, hidden); behind, ahead: int32 (rows, tokens), see the module."""

    at: Tensor
    embeddings: Tensor
    behind: Tensor
    ahead: Tensor

    def put_into(self, x: Tensor) -> None:
        """Overwrite the image tokens' rows of x (rows, tokens, hidden), or of x (tokens, hidden) of a single row."""
        x[self.at if x.dim() == 3 else self.at[0]] = self.embeddings.to(x.dtype)


def part(prompt: Sequence[int], first: int, last: int) -> Sequence[int]:
    """The tokens from `first` to `last` of any prompt, which split no image."""
    return prompt.part(first, last) if isinstance(prompt, Pictured) else prompt[first:last]


def marks_of(prompt: Sequence[int]) -> list[int]:
    """Numbers that are equal where two prompts are: the ids, and for an image's tokens a number below 0 that is a hash
    of its embeddings."""
    marks = list(prompt)
    if isinstance(prompt, Pictured):
        rows = iter(prompt.embeddings.cpu())
        starts = (at for at, image in enumerate(prompt.is_image) if image and not prompt.behind[at])
        for start in starts:
            stop = start + prompt.ahead[start] + 1
            values = torch.stack([next(rows) for _ in range(start, stop)]).view(torch.uint8).numpy().tobytes()
            marks[start:stop] = [-1 - int.from_bytes(sha256(values).digest()[:8])] * (stop - start)
    return marks


def pieces(prompts: Sequence[Sequence[int]], step: int) -> Iterator[slice]:
    """Cut prompts whose ends are aligned into pieces of at most `step` tokens; only an image makes a piece longer."""
    longest = max(map(len, prompts))
    starts = [(longest - len(prompt), prompt.behind) for prompt in prompts if isinstance(prompt, Pictured)]

    def splits_none(at: int) -> bool:
        return all(at <= start or at >= longest or behind[at - start] == 0 for start, behind in starts)

    first = 0
    while first < longest:
        last = min(first + step, longest)
        back = next((at for at in range(last, first, -1) if splits_none(at)), None)
        last = next(at for at in range(last, longest + 1) if splits_none(at)) if back is None else back
        yield slice(first, last)
        first = last


def pictures(prompts: Sequence[Sequence[int]], piece: slice, device: torch.device) -> Pictures | None:
    """The images in one of those pieces; None if there are none."""
    longest, length = max(map(len, prompts)), piece.stop - piece.start
    at = torch.zeros(len(prompts), length, dtype=torch.bool)
    spans = torch.zeros(2, len(prompts), length, dtype=torch.int32)
    embeddings = []
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, Pictured):
            continue
        before = longest - len(prompt)
        mine = slice(max(0, piece.start - before), max(0, piece.stop - before))  # counted in this prompt's tokens
        if not any(prompt.is_image[mine]):
            continue
        to = slice(mine.start + before - piece.start, None)
        at[row, to] = torch.tensor(prompt.is_image[mine])
        if not prompt.is_causal:
            spans[:, row, to] = torch.tensor([prompt.behind[mine], prompt.ahead[mine]], dtype=torch.int32)
        first = sum(prompt.is_image[: mine.start])
        embeddings.append(prompt.embeddings[first : first + sum(prompt.is_image[mine])].to(device))
    if not embeddings:
        return None
    spans = spans.to(device)
    return Pictures(at.to(device), torch.cat(embeddings), spans[0], spans[1])
