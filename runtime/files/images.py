"""Puts images into prompts: Pillow opens them, transformers' image processor (the PIL one) cuts them into patches.

    cat.png ── RGB, upright ── resized, aspect kept ── patches ── tower.py ── soft tokens ─┐
    "what is this?" ── <bos> <|image|> what is this ? ── <bos> <|image> <|image|>·n <image|> what is this ?

An image stands where the prompt says <|image|>; if the prompt does not say it, images stand before the text. How many
soft tokens an image gets at most is the processor's setting (processor_config.json: max_soft_tokens, 280 unless given),
or the request's: small print needs more, and a picture that is looked at as a whole needs fewer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dgq.quant.errors import InputError
from dgq.runtime.files.tower import Patches, Tower
from dgq.runtime.shape.pictured import Pictured

if TYPE_CHECKING:
    import PIL.Image

    from dgq.runtime.files.tokenizer import Tokenizer

MARKER = "<|image|>"
PROMPT = "expected text, token ids or a chat's messages"
LARGEST = 1 << 27  # pixels: 400 MB, decoded
# What Pillow decodes by itself: for an EPS it would start Ghostscript on a stranger's program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
SETTINGS = ("processor_config.json", "preprocessor_config.json")
IMAGE_TOKENS = (70, 140, 280, 560, 1120)  # most soft tokens of an image: the sizes that the processor knows


@dataclass(frozen=True)
class Tokens:
    """The ids that stand for an image in a prompt: one that begins it, one for each soft token, one that ends it."""

    begin: int
    image: int
    end: int


class Vision:
    """An artifact's way to take images. config: config.json's vision_config; hidden: the text model's width; read:
    returns a canonical vision tensor; folder: holds the processor's settings, if there are any; source: the artifact's
    name in error messages; is_causal: image tokens see only what is before them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        hidden: int,
        read: Callable[[str], Tensor],
        tokens: Tokens,
        folder: Path | None,
        source: str,
        is_causal: bool = False,
    ) -> None:
        self.config, self.tokens, self._is_causal = config, tokens, is_causal
        self._hidden, self._read, self._folder, self._source = hidden, read, folder, source
        self._most: dict[str, int] = {}

    def with_tokens(self, most: int | None) -> Vision:
        """This, with images of at most so many soft tokens; None: as the processor's settings have it. InputError for a
        number that the processor does not know."""
        if most is None:
            return self
        other = copy(self)
        other._most = {"max_soft_tokens": checked_tokens(most)}
        return other

    def tower(self, device: torch.device | str, dtype: torch.dtype) -> Tower:
        """The tower, loaded. InputError for settings that transformers refuses."""
        return Tower(self.config, self._hidden, self._read, self._source, device, dtype)

    @cached_property
    def _processor(self) -> Any:
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        sizes = {key: self.config.get(key, size) for key, size in (("patch_size", 16), ("pooling_kernel_size", 3))}
        if self._folder is None or not any((self._folder / name).is_file() for name in SETTINGS):
            most = {"max_soft_tokens": self.config["max_soft_tokens"]} if "max_soft_tokens" in self.config else {}
            return self._checked(lambda: Gemma4ImageProcessorPil(**sizes, **most))
        folder = str(self._folder)
        processor = self._checked(lambda: Gemma4ImageProcessorPil.from_pretrained(folder, local_files_only=True))
        for key, size in sizes.items():
            if getattr(processor, key) != size:
                raise InputError(
                    f"{self._source}: the image processor's {key} is {getattr(processor, key)}, the tower's {size}"
                )
        return processor

    def _checked(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # whatever odd settings lead the library into
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{self._source}: the image processor's settings are not usable ({what})") from None

    def patches(self, image: Path | str | PIL.Image.Image) -> Patches:
        """An image file's, or an image's. InputError if it is none, is damaged or too large."""
        name, picture = open_image(image)
        try:
            cut = self._processor(picture, return_tensors="pt", **self._most)
        except ValueError as error:
            raise InputError(
                f"{name}: {picture.width} x {picture.height} pixels do not fit the model ({error})"
            ) from None
        positions = cut["image_position_ids"]
        places, most = self.config["position_embedding_size"], int(positions.max())
        if most >= places:
            raise InputError(
                f"{name}: is {most + 1} patches long and narrow, the tower has places for {places}; crop it, or ask"
                " for fewer image tokens"
            )
        return Patches(cut["pixel_values"].float(), positions, int(cut["num_soft_tokens_per_image"][0]))

    def prompt(
        self,
        ids: Sequence[int],
        images: Sequence[Path | str | PIL.Image.Image],
        tower: Callable[[Patches], Tensor],
        front: int | None = None,
    ) -> Pictured:
        """A prompt with its images, each run through the tower once. front: where they stand if `ids` has no <|image|>;
        None: nowhere. InputError if there are more or fewer images than places for them."""
        ids, image = list(ids), self.tokens.image
        if front is not None and image not in ids:
            ids[front:front] = [image] * len(images)
        if (places := ids.count(image)) != len(images):
            given = f"{len(images)} image{'' if len(images) == 1 else 's'}"
            raise InputError(f"the prompt has {places} {MARKER} for {given}: it needs one for each")
        cut = [self.patches(one) for one in images]
        counts, tokens = iter(cut), self.tokens
        whole: list[int] = []
        for token in ids:
            run = [tokens.begin, *[image] * next(counts).soft_tokens, tokens.end] if token == image else [token]
            whole += run
        return Pictured(whole, torch.cat([tower(one) for one in cut]), image, self._is_causal)


class Once:
    """A tower that computes each image once, in however many turns of a conversation it is shown."""

    def __init__(self, tower: Callable[[Patches], Tensor]) -> None:
        self._tower = tower
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, patches: Patches) -> Tensor:
        key = sha256(patches.values.numpy().tobytes() + patches.positions.numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._tower(patches)
        return self._known[key]


def checked_tokens(most: int) -> int:
    """The most soft tokens of an image, if that is a number that the processor knows; else InputError."""
    if most not in IMAGE_TOKENS:
        raise InputError(f"image tokens are {most}, expected one of {', '.join(map(str, IMAGE_TOKENS))}")
    return most


def open_image(image: Path | str | PIL.Image.Image) -> tuple[str, PIL.Image.Image]:
    """Its name for messages, and it as RGB, upright (EXIF). InputError if it is missing, damaged or too large."""
    import PIL.Image
    import PIL.ImageOps

    if isinstance(image, PIL.Image.Image):
        name, opened = "the image", image
    else:
        name = str(image)
        if not Path(image).is_file():
            raise InputError(f"{name}: {'is no file' if Path(image).exists() else 'no such file'}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the limit below is ours
            try:
                PIL.Image.init()
                opened = PIL.Image.open(image, formats=[kind for kind in FORMATS if kind in PIL.Image.OPEN])
            except PIL.Image.DecompressionBombError as error:
                raise _too_large(name, str(error)) from None
            except Exception as error:  # mostly UnidentifiedImageError; a broken header may be anything
                what = "" if isinstance(error, PIL.UnidentifiedImageError) else f" ({error})"
                raise InputError(f"{name}: is no image that dgq opens, such as PNG, JPEG or WebP{what}") from None
    if (pixels := opened.width * opened.height) > LARGEST:
        raise _too_large(name, f"{opened.width} x {opened.height} pixels, {pixels / 1e6:,.0f} million")
    if opened.mode in ("I", "F"):  # Pillow would cut them off at 255
        raise InputError(f"{name}: has 32-bit gray values, and does not say which is white; save it in 8 or 16 bits")
    try:
        upright = PIL.ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):  # the high byte, as Pillow reads 16 bits of colour
            upright = PIL.Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return name, upright.convert("RGB")
    except Exception as error:  # a damaged file may raise anything while it is decoded
        raise InputError(f"{name}: cannot be decoded ({error}); truncated or damaged") from None


def _too_large(name: str, size: str) -> InputError:
    return InputError(
        f"{name}: too large ({size}); dgq takes {LARGEST / 1e6:,.0f} million pixels at most: scale it down"
    )


def placed(
    tokenizer: Tokenizer, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], images: Sequence[Any] = ()
) -> tuple[list[int], list[Any], int | None]:
    """A prompt's ids before its images are put in, its images, and where they stand if no <|image|> says it.

    prompt: text, a chat's messages, or ids. A message's content may be parts, as chat templates have them: {"type":
    "image", "image": file or PIL image} and {"type": "text", "text": …}; parts without an "image" (or "path") take the
    next of `images`. Without parts and <|image|>, images stand before the last message's text. InputError for text that
    says <|image|>, and parts, without an image.
    """
    if isinstance(images, str | Path):  # whose letters are no files
        raise InputError(f"images is {str(images)!r}: give a list of images, and of several prompts one for each")
    given = list(images)
    if isinstance(prompt, str):
        return _imaged(tokenizer, tokenizer.encode(prompt), given), given, len(tokenizer.encode(""))
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise InputError(f"a prompt is a {type(prompt).__name__}, {PROMPT}")
    messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
    if messages and len(messages) < len(prompt):
        raise InputError(f"a prompt is a list of messages and something else, {PROMPT}")
    if not messages:
        try:
            return [index(token) for token in prompt], given, None  # type: ignore[arg-type]
        except TypeError:  # a text, a row of tokens, a broken number
            raise InputError(f"a prompt is a list of something else, {PROMPT}") from None
    parts = [part for message in messages for part in _image_parts(message)]
    if given and not parts and not any(MARKER in str(message.get("content")) for message in messages):
        text = messages[-1].get("content")
        written = [{"type": "text", "text": text}] if isinstance(text, str) else list(text or ())
        messages[-1]["content"] = [*({"type": "image"} for _ in given), *written]
    elif parts:
        rest = iter(given)
        named = [part.get("image", part.get("path")) for part in parts]
        paired = [next(rest, None) if one is None else one for one in named]
        given = [one for one in paired if one is not None] + list(rest)
    return _imaged(tokenizer, tokenizer.chat(messages), given), given, None


def parted(text: str, images: Sequence[Any]) -> str | list[dict[str, Any]]:
    """A message's content: its images before its text, or each where the text says <|image|>. InputError if that is
    more or less often than there are images."""
    if not images:
        return text
    first, *others = text.split(MARKER)
    if not others:
        return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    if len(others) != len(images):
        raise InputError(f"the text has {len(others)} {MARKER} for {len(images)} images: it needs one for each")
    parts = [{"type": "text", "text": first}] if first else []
    for image, other in zip(images, others, strict=True):
        parts += [{"type": "image", "image": image}, *([{"type": "text", "text": other}] if other else [])]
    return parts


def _imaged(tokenizer: Tokenizer, ids: list[int], images: Sequence[Any]) -> list[int]:
    """The ids, if they do not ask for images that nobody gave."""
    if not images and tokenizer.token_id(MARKER) in ids:
        raise InputError(f"the prompt says {MARKER}, and no image is given")
    return ids


def _image_parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else ()
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]
