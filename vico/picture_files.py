"""Opening of encoded pictures with Pillow, the same for sharding, reading and serving."""

import io
from struct import Struct

from PIL import Image, features

PICTURE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    *(("AVIF",) if "avif" in features.get_supported_modules() else ()),
)
"""Formats that are read. No other decoder of Pillow ever gets a record's bytes."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = Struct(">I4s")
_CRC_BYTES = 4
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))


def open_picture(data: bytes, formats: tuple[str, ...] = PICTURE_FORMATS) -> Image.Image:
    """Return the picture with its header read; of an animation the first frame, of a TIFF the first page.

    Texts and colour profiles of a PNG are not read, since Pillow refuses a PNG with more than 1 MiB of either
    and no pixel depends on them. Raises what Pillow raises.
    """
    return Image.open(io.BytesIO(without_png_metadata(data)), formats=formats)


def without_png_metadata(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile; anything else, damaged PNGs included, unchanged."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept, start, position = [], 0, len(_PNG_SIGNATURE)
    while position + _CHUNK.size <= len(data):
        length, name = _CHUNK.unpack_from(data, position)
        end = position + _CHUNK.size + length + _CRC_BYTES
        if end > len(data):
            break  # cut off, which the decoder reports
        if name in _PNG_METADATA:
            kept.append(data[start:position])
            start = end
        position = end
    return b"".join((*kept, data[start:])) if kept else data
