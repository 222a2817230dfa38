"""Pictures of all formats that are read, and some that are not."""

import io
import struct
import zlib
from functools import partial
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from data_prep.records.pictures import checked_picture
from data_prep.records.rejection import Rejected
from tests.fuzz.hostile import bytes_of
from tests.fuzz.targets import Target
from tests.record_files import picture
from vico.picture_files import open_picture
from vico.tiling import Tiling, tile_pixels

_MAX_PIXELS = 4_000_000


def targets(folder: Path) -> list[Target]:
    """Return the target of pictures."""
    seeds = [
        picture(1, (60, 40), format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM")
    ]
    seeds += [_saved("JPEG", "CMYK"), _saved("PNG", "P"), _saved("PNG", "I;16"), _saved("TIFF", "RGBA")]
    seeds += [_saved("GIF", "P", save_all=True, append_images=[Image.new("P", (9, 9))]), _saved("JPEG", "L")]
    seeds += [_saved("JPEG", "RGB", progressive=True), _saved("TIFF", "L", compression="tiff_lzw")]
    if "AVIF" in Image.SAVE or "AVIF" in Image.registered_extensions().values():
        seeds.append(_saved("AVIF", "RGB"))
    cases = st.one_of(bytes_of(seeds), bytes_of(seeds[:1]).map(_with_right_checksums), _large_pngs())
    return [Target("picture", cases, partial(_picture), (Rejected,))]


def _picture(folder: Path, data: bytes) -> None:
    for decode in (False, True):
        checked_picture(data, "a.png", max_pixels=_MAX_PIXELS, decode=decode)
    with open_picture(data) as image:
        tile_pixels(image, Tiling(56, 12))


def _saved(format: str, mode: str, **options: object) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (33, 17), 5).save(data, format, **options)
    return data.getvalue()


def _with_right_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of what they hold, so that decoders go on reading."""
    parts, at = [data[:8]], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)))
        at += 12 + length
    return b"".join(parts)


@st.composite
def _large_pngs(draw: st.DrawFn) -> bytes:
    """Draw a small PNG file that says it is a large picture, or has chunks that unpack to much."""
    side = st.sampled_from([1, 2000, 30_000, 2**31 - 1])
    depth, colour = draw(st.sampled_from([1, 8, 16])), draw(st.sampled_from([0, 2, 3, 6]))
    packed = zlib.compress(b"\0" * draw(st.sampled_from([10, 10**6, 50 * 10**6])))
    header = struct.pack(">IIBBBBB", draw(side), draw(side), depth, colour, 0, 0, draw(st.integers(0, 1)))
    chunks = [b"IHDR" + header]
    chunks += [b"zTXt" + b"a\0\0" + packed, b"iCCP" + b"a\0\0" + packed][: draw(st.integers(0, 2))]
    chunks += [b"IDAT" + packed, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
