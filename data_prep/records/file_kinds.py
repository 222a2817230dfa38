"""Files that are not what they should be, such as a Git LFS pointer: told by their first bytes, in words."""

import json
from typing import BinaryIO

from data_prep.records.json_lists import END_FINDER
from data_prep.remote_files import Location, open_file
from vico.errors import UserError, one_line

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
    (0, b"\x04\x22\x4d\x18", "compressed with lz4; decompress it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive; unpack it"),
    (0, b"/annex/objects/", "a git-annex pointer, not the file itself; run git annex get"),
    (0, b"SQLite format 3\0", "an SQLite database; convert it to parquet or to JSON lines"),
    (0, b"\x89HDF\r\n", "an HDF5 file; convert it to parquet or to JSON lines"),
    (0, b"Obj\x01", "an Avro file; convert it to parquet"),
    *(
        (0, bytes((0x80, n)), "a Python pickle, which is not read; convert it to parquet")
        for n in range(2, 6)
    ),
    (0, b"PAR1", "a parquet file; use format: parquet"),
    (0, b"ARROW1", "an Arrow file; convert it to parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream; convert it to parquet"),
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


def damaged_file(path: Location, own_kind: str, error: Exception) -> UserError:
    """Return the error for a file that does not open as `own_kind` (`a tar`): another kind, or damage."""
    with open_file(path) as file:
        kind = foreign_kind(file.read(_PEEKED_BYTES))
    if kind is not None and not kind.startswith((own_kind, "compressed")):
        return UserError(f"{path} is {kind}")
    own = own_kind.removeprefix("a ")
    return UserError(f"{path} is not a complete {own} ({one_line(error)}); download or write it again")


def check_rows_file(file: BinaryIO, name: str, *, may_be_list: bool) -> None:
    """Raise UserError when a file cannot hold rows of JSON, one per line or (`may_be_list`) in a list.

    The position in the file is kept.
    """
    start = file.tell()
    head = file.read(_PEEKED_BYTES)
    file.seek(start)
    kind = foreign_kind(head)
    if kind is None and name.lower().endswith((".csv", ".tsv")):
        kind = "a table as text; convert it to parquet or to JSON lines"
    if kind is None and head.startswith(b"\0"):
        kind = "zero bytes, often of a failed download or copy; get it again"
    if kind is not None:
        raise UserError(f"{name} is {kind}")
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lstrip()
    if text.startswith("<"):
        raise UserError(f"{name} is XML, often the answer of a server in the place of the file; get it again")
    if "}\r{" in text and "\n" not in text:
        raise UserError(f"{name} has lines that end in \\r alone; end them in \\n (tr '\\r' '\\n')")
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
        _, end = END_FINDER.raw_decode(text)
    except json.JSONDecodeError as error:
        is_unfinished = error.msg.startswith("Unterminated") or error.pos + _CUT_CHARACTERS >= len(text)
        return is_cut and is_unfinished and "\n" in text
    except RecursionError:
        return False
    return "\n" in text[:end]
