"""Pictures that ask for far more time or memory than their pixels need."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(format: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format, **options)
    return file.getvalue()


def with_scans(num_more: int) -> bytes:
    """Return a progressive JPEG whose last scan comes again and again."""
    data = encoded("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * num_more + data[-2:]


def with_segments(num_more: int) -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"\xff\xe5\x00\x04\xff\xda" * num_more + data[2:]  # what looks like a scan is none


def with_chunks(num_more: int) -> bytes:
    data = encoded("PNG")
    chunk = struct.pack(">I", 0) + b"prIv" + struct.pack(">I", zlib.crc32(b"prIv"))
    return data[:33] + chunk * num_more + data[33:]
