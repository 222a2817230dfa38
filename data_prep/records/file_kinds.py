"""Files that are not what they should be, such as a Git LFS pointer: told by their first bytes, in words."""

import json
from typing import BinaryIO

from vico.errors import UserError

_MAGIC = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (0, b"\xff\xfe\0\0", "UTF-32 text; convert it to UTF-8"),
    (0, b"\0\0\xfe\xff", "UTF-32 text; convert it to UTF-8"),
    (0, b"\xff\xfe", "UTF-16 text; convert it to UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text; convert it to UTF-8"),
    (0, b"\x1f\x8b", "compressed with gzip; decompress it"),
    (0, b"BZh", "compressed with bzip2; decompress it"),
    (0, b"\xfd7zXZ\0", "compressed with xz; decompress it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"PAR1", "a parquet file; use format: parquet"),
    (257, b"ustar", "a tar; use format: webdataset"),
)
_PEEKED_BYTES = 1 << 20
_CUT_CHARACTERS = 16  # a decoder that fails so near to the end of what was read may only lack the rest


def foreign_kind(head: bytes) -> str | None:
    """Return what a file is, with a remedy, if its first bytes are not those of text or of a picture."""
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    start = head[:200].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, often that of a failed download; download it again"
    if head[:2] in (b"{\0", b"[\0", b"\0{", b"\0["):
        return "UTF-16 text; convert it to UTF-8"
    return None


def check_rows_file(file: BinaryIO, name: str, *, may_be_list: bool) -> None:
    """Raise UserError when a file cannot hold rows of JSON, one per line or (`may_be_list`) in a list.

    The position in the file is kept.
    """
    start = file.tell()
    head = file.read(_PEEKED_BYTES)
    file.seek(start)
    kind = foreign_kind(head)
    if kind is not None:
        raise UserError(f"{name} is {kind}")
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lstrip()
    if text.startswith("[") and not may_be_list and _holds_objects(text):
        raise UserError(f"{name} is a JSON list; write one row per line, or use format: llava")
    if text.startswith("{") and _spans_lines(text, is_cut=len(head) == _PEEKED_BYTES):
        raise UserError(
            f"{name} is a JSON object over several lines; write one row per line (jq -c . FILE), "
            "or a list of rows"
        )


def _holds_objects(text: str) -> bool:
    return text[1:].lstrip().startswith("{")


def _spans_lines(text: str, is_cut: bool) -> bool:
    """Return whether the first JSON object of a text goes on after its first line."""
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
    except json.JSONDecodeError as error:
        is_unfinished = error.msg.startswith("Unterminated") or error.pos + _CUT_CHARACTERS >= len(text)
        return is_cut and is_unfinished and "\n" in text
    except RecursionError:
        return False
    return "\n" in text[:end]
