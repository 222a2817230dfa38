"""A row as it was found, before any check: what every format's reader gives."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.records.rejection import Rejected

DIGEST_BYTES = 16


@dataclass(frozen=True)
class RawRow:
    """One row in InternVL's form, as the bytes of its line; `picture_bytes` reads a picture that it names.

    `refused` is (reason, message) where no line could be made of what was found.
    """

    line: int
    content: bytes
    is_duplicate: bool
    picture_bytes: Callable[[str], bytes]
    refused: tuple[str, str] | None = None


def parsed_row(content: bytes) -> dict:
    """The JSON object of a line; Rejected when it is none."""
    try:
        text = content.decode("utf-8-sig")  # the first line of a file from Windows starts with a mark
    except UnicodeDecodeError as error:
        raise Rejected("not_utf8", f"byte {error.start} of the line is not UTF-8") from error
    if not text.strip():
        raise Rejected("not_json", "the line is empty")
    try:
        row = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("not_json", str(error)) from error
    if not isinstance(row, dict):
        raise Rejected("not_an_object", f"the line is a JSON {type(row).__name__}")
    if "\\u" not in text:  # bytes of UTF-8 hold no half of a pair; only an escape may spell one
        return row
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("not_utf8", "the text holds half of a surrogate pair") from error
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for every row


def record_id(row: dict) -> str | None:
    """The record's own id as text, None where it has none; ids may repeat."""
    value = row.get("id")
    return str(value) if isinstance(value, str | int) else None
