"""Opening of encoded pictures with Pillow, the same for sharding, reading and serving."""

import io
import re
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
MAX_JPEG_SCANS = 100
"""Progressive JPEGs of real encoders have about 10 scans. Each costs a pass over all coefficients, whatever
its size in the file, so a small file of many scans would take hours."""
MAX_JPEG_SEGMENTS = 5_000
MAX_PNG_CHUNKS = 100_000
"""Pillow keeps an object of each segment and chunk, many times the size of a short one."""
_JPEG_SIGNATURE = b"\xff\xd8"
_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_NEXT_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""A marker that ends a scan: not a stuffed byte, a restart marker, or a fill byte. Python searches for its
first byte as a constant, which takes a twelfth of the time of `\\xff+`."""
_LENGTH = Struct(">H")


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


def check_structure(data: bytes) -> None:
    """Raise ValueError for a JPEG of too many scans or segments, and for a PNG of too many chunks.

    A picture from an unknown sender can ask for far more time and memory than its pixels need. Nothing is
    decoded; damaged files pass, since the decoder reports them.
    """
    if data.startswith(_PNG_SIGNATURE):
        num_chunks, position = 0, len(_PNG_SIGNATURE)
        while position + _CHUNK.size <= len(data):
            position += _CHUNK.size + _CHUNK.unpack_from(data, position)[0] + _CRC_BYTES
            num_chunks += 1
            if num_chunks > MAX_PNG_CHUNKS:
                raise ValueError(f"a PNG of more than {MAX_PNG_CHUNKS:,} chunks")
    elif data.startswith(_JPEG_SIGNATURE):
        _check_jpeg(data)


def _check_jpeg(data: bytes) -> None:
    num_scans = num_segments = 0
    position = len(_JPEG_SIGNATURE)
    while (marker := _NEXT_MARKER.search(data, position)) is not None and marker[1][0] != _END_OF_IMAGE:
        num_segments += 1
        num_scans += marker[1][0] == _SCAN
        if num_scans > MAX_JPEG_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_JPEG_SCANS} scans")
        if num_segments > MAX_JPEG_SEGMENTS:
            raise ValueError(f"a JPEG of more than {MAX_JPEG_SEGMENTS:,} segments")
        position = marker.end()
        if position + _LENGTH.size <= len(data):
            position += max(_LENGTH.size, _LENGTH.unpack_from(data, position)[0])
