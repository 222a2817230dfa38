"""On JPEGs with damage of every kind the quick checks agree with Pillow's full decode and open."""

import io
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from data_prep.records.media.jpeg_headers import jpeg_header
from data_prep.records.pictures import checked_picture
from data_prep.records.rejection import Rejected

MOST_PIXELS = 178_956_970  # Pillow's own limit, so that only the coded data decides
FORMS = {
    "baseline": {"quality": 90},
    "baseline 4:4:4": {"quality": 80, "subsampling": 0},
    "optimised": {"quality": 75, "optimize": True},
    "restarts": {"quality": 75, "restart_marker_rows": 1},
    "progressive": {"quality": 85, "progressive": True},
    "gray": {"quality": 85},
    "gray progressive": {"quality": 85, "progressive": True},
    "cmyk": {"quality": 85},
    "comment and profile": {"quality": 85, "comment": b"c" * 50, "icc_profile": bytes(300)},
    "exif": {"quality": 85, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"},
    "photoshop and xmp": {"quality": 85, "xmp": b"<x/>"},
}


def encoded(form: str, size: tuple[int, int]) -> bytes:
    """Return a JPEG with so much detail that all of its bytes matter."""
    rng = np.random.default_rng(len(form))
    pixels = (rng.integers(0, 256, (*size[::-1], 3)) // 3 + np.arange(size[0])[None, :, None]).clip(0, 255)
    mode = "L" if form.startswith("gray") else "CMYK" if form == "cmyk" else "RGB"
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(data, "JPEG", **FORMS[form])
    return data.getvalue()


def damaged_copies(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Yield copies cut, with flipped, dropped, doubled, zeroed or marker bytes, mostly in the coded part."""
    for _ in range(count):
        at, length = rng.randrange(2, len(data)), rng.randrange(1, 40)
        yield data[:at]
        yield data[: len(data) - rng.randrange(1, 30)]
        yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        yield data[:at] + rng.randbytes(length) + data[at + length :]
        yield data[:at] + data[at + length :]
        yield data[:at] + data[at : at + length] + data[at:]
        yield data[:at] + bytes(length) + data[at + length :]
        yield data[:at] + b"\xff" + bytes([rng.randrange(256)]) + data[at + 2 :]
        head = rng.randrange(2, min(len(data), 700))
        yield data[:head] + rng.randbytes(1) + data[head + 1 :]


def is_refused(check: Callable[[bytes], None], data: bytes) -> bool:
    try:
        check(data)
    except Exception:
        return True
    return False


def decode_whole(data: bytes) -> None:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        image.convert("RGB").load()


def check_picture(data: bytes) -> None:
    checked_picture(data, "a.jpg", max_pixels=MOST_PIXELS, decode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(131, 97), (9, 7)])
def test_the_decode_check_refuses_exactly_what_a_full_decode_refuses(form, size):
    data = encoded(form, size)
    assert not is_refused(check_picture, data)
    differing, num_refused = [], 0
    for copy in damaged_copies(data, random.Random(f"{form} {size}"), 30):
        pillow_refuses = is_refused(decode_whole, copy)
        num_refused += pillow_refuses
        if is_refused(check_picture, copy) != pillow_refuses:
            differing.append(len(copy))
    assert not differing and num_refused > 30


@pytest.mark.parametrize("form", FORMS)
def test_pillow_opens_every_header_that_is_read_here_with_the_same_size(form):
    data = encoded(form, (64, 48))
    for copy in [data, *damaged_copies(data, random.Random(form), 60)]:
        header = jpeg_header(copy)
        if header is not None:
            with Image.open(io.BytesIO(copy), formats=("JPEG", "PNG", "WEBP")) as image:
                assert (image.format, image.size) == ("JPEG", (header.width, header.height))


def test_ordinary_headers_are_read_here_and_others_left_to_pillow():
    headers = {form: jpeg_header(encoded(form, (64, 48))) for form in FORMS}
    assert [form for form, header in headers.items() if header is None] == ["exif"]
    assert all((h.width, h.height, h.even) == (64, 48, True) for h in headers.values() if h is not None)
    assert jpeg_header(b"\x89PNG") is None and jpeg_header(b"") is None


def test_a_picture_whose_sampling_does_not_divide_is_decoded_in_full():
    """libjpeg refuses it in colour; in gray it would skip the other components."""
    data = bytearray(encoded("baseline 4:4:4", (64, 48)))
    frame = data.index(b"\xff\xc0") + 10
    data[frame + 1], data[frame + 4] = 0x31, 0x21
    header = jpeg_header(bytes(data))
    assert header is not None and not header.even
    with pytest.raises(Rejected, match=r"a\.jpg"):
        check_picture(bytes(data))
