"""Images of a request: data URLs, and files of one directory where the server was started with it. No network."""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from io import BytesIO
from typing import TYPE_CHECKING
from urllib.parse import unquote

from dgq.runtime.files.images import FORMATS, IMAGE_TOKENS
from dgq.runtime.serve.errors import ApiError
from dgq.runtime.serve.settings import ServeSettings

if TYPE_CHECKING:
    import PIL.Image

MOST_IMAGES = 16
DETAILS: dict[object, int | None] = {None: None, "auto": None, "low": IMAGE_TOKENS[0], "high": IMAGE_TOKENS[-1]}
_DATA = re.compile(r"data:image/[\w.+-]{1,32};base64,")


class Pictures:
    """Opens the images of one request, and counts their bytes and pixels against the limits of all together. tokens:
    the most that each becomes; None: the model's setting."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.tokens: list[int | None] = []
        self._count, self._bytes, self._pixels = 0, settings.image_bytes, settings.pixels

    def open(self, url: str, param: str, detail: object = None) -> PIL.Image.Image:
        """An image whose header was read; nothing is decoded yet. detail: OpenAI's low, high or auto. ApiError for
        anything else."""
        if detail is not None and (not isinstance(detail, str) or detail not in DETAILS):
            raise ApiError(400, f"{param}.detail: may be low, high or auto", "invalid_value", f"{param}.detail")
        self.tokens.append(DETAILS[detail])
        self._count += 1
        if self._count > MOST_IMAGES:
            raise _refused(f"more than {MOST_IMAGES} images in one request", param)
        if match := _DATA.match(url):
            data = self._decoded(url, match.end(), param)
        elif url.startswith("data:"):
            raise _refused("a data URL must be data:image/…;base64,…", param)
        elif re.match(r"[A-Za-z][\w+.-]*:", url) and not url.startswith("file:"):
            raise _refused("the server fetches nothing from the network; send the image as a data URL", param)
        else:
            data = self._file(url, param)
        self._bytes -= len(data)
        return self._opened(data, param)

    def _decoded(self, url: str, start: int, param: str) -> bytes:
        if (len(url) - start) * 3 // 4 > self._bytes + 3:
            raise self._too_many_bytes(param)
        try:
            return base64.b64decode(url[start:], validate=True)
        except (binascii.Error, ValueError):
            raise _refused("the image is not valid base64", param) from None

    def _file(self, url: str, param: str) -> bytes:
        folder = self._settings.image_dir
        if folder is None:
            raise _refused("files are not read (dgq serve --image-dir allows one directory); send a data URL", param)
        name = unquote(url.removeprefix("file://"))
        try:
            path = (folder / name).resolve(strict=True)
            if not path.is_relative_to(folder.resolve()) or not path.is_file():
                raise OSError
            if path.stat().st_size > self._bytes:
                raise self._too_many_bytes(param)
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # one answer, so that nobody learns what is elsewhere
            raise _refused("there is no such file in the directory of images", param) from None

    def _opened(self, data: bytes, param: str) -> PIL.Image.Image:
        import PIL.Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            try:
                PIL.Image.init()
                kinds = [kind for kind in FORMATS if kind in PIL.Image.OPEN]
                image = PIL.Image.open(BytesIO(data), formats=kinds)
            except PIL.Image.DecompressionBombError:
                raise self._too_many_pixels(param) from None
            except Exception:  # a broken header may raise anything
                raise _refused("is no image that dgq opens, such as PNG, JPEG or WebP", param) from None
        self._pixels -= image.width * image.height
        if self._pixels < 0:
            raise self._too_many_pixels(param)
        return image

    def _too_many_bytes(self, param: str) -> ApiError:
        return _refused(f"the images have more than {self._settings.image_bytes:,} bytes", param)

    def _too_many_pixels(self, param: str) -> ApiError:
        most = self._settings.pixels / 1e6
        return _refused(f"the images have more than {most:,.0f} million pixels; scale them down", param)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", "invalid_image", param)
