"""The pictures of a request: read from data URLs, checked by their headers, decoded later."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from pipeline.serving.limits import Limits, RequestError
from pipeline.serving.request_body import ImageUrl
from vico.errors import one_line
from vico.picture_files import check_structure, open_picture

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_SIDE = 65_535
"""The most that a JPEG can have. Pillow's resizing takes 32 bytes for each pixel of the longer side."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture, with its size by the header and the client's own limit of tiles.

    `param` names the picture in errors.
    """

    content: bytes
    width: int
    height: int
    max_tiles: int | None
    param: str
    digest: bytes
    """SHA-256 of the content."""

    def decoded(self) -> Image.Image:
        """Return the picture as RGB; raise RequestError if only its header is valid."""
        with (
            _picture_errors(self.param),
            open_picture(self.content, PICTURE_FORMATS) as image,
        ):
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")


def picture_of_url(image_url: ImageUrl, param: str, limits: Limits) -> Picture:
    """Return the picture in a data URL, with its size by the header; nothing is decoded."""
    content = _content(image_url.url, param)
    with _picture_errors(param):
        check_structure(content)
        with open_picture(content, PICTURE_FORMATS) as image:
            width, height = image.size
    if max(width, height) > _MAX_SIDE:
        message = (
            f"a picture of {width} x {height} has a side above this server's limit of {_MAX_SIDE} pixels"
        )
        raise RequestError(message, param, code="image_too_large")
    if width * height > limits.picture_pixels:
        message = (
            f"a picture of {width} x {height} is above this server's limit of {limits.picture_pixels} pixels"
        )
        raise RequestError(message, param, code="image_too_large")
    return Picture(
        content, width, height, image_url.max_dynamic_patch, param, hashlib.sha256(content).digest()
    )


def check_pixels(pictures: Sequence[Picture], param: str, limits: Limits) -> None:
    """Raise RequestError if the pictures of a request have too many pixels together."""
    pixels = sum(picture.width * picture.height for picture in pictures)
    if pixels > limits.request_pixels:
        message = (
            f"the pictures have {pixels} pixels together, above this server's limit of "
            f"{limits.request_pixels} pixels per request; send fewer or smaller ones"
        )
        raise RequestError(message, param, code="image_too_large")


def _content(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if head[:5].lower() != "data:":
        message = "only data URLs (data:image/png;base64,...) are accepted; this server fetches nothing"
        raise RequestError(message, param)
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("the data URL must be base64: data:image/png;base64,...", param)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error is one; characters beyond ASCII give a plain one
        raise RequestError(f"the data URL is not valid base64 ({error})", param) from error


@contextmanager
def _picture_errors(param: str) -> Iterator[None]:
    """Turn what Pillow raises on a picture into the 400 that the client gets."""
    try:
        yield
    except Image.DecompressionBombError as error:
        message = f"a picture has too many pixels ({error})"
        raise RequestError(message, param, code="image_too_large") from error
    except Exception as error:  # decoders raise any error on broken bytes
        message = f"a picture does not decode as one of {', '.join(PICTURE_FORMATS)} ({one_line(error)})"
        raise RequestError(message, param, code="invalid_image") from error
