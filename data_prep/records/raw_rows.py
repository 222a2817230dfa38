"""A row before any check, the same for every format, and the parsing of its JSON line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from data_prep.records.forms.values import as_text
from data_prep.records.media.inline import inline_picture
from data_prep.records.rejection import Rejected

DIGEST_BYTES = 16


@dataclass(frozen=True)
class RawRow:
    """One row as the bytes of a JSON line of any form; `picture_bytes` reads a picture by the name in the row.

    `refused` is (reason, message) when the reader could not make a line of the row.
    """

    line: int
    content: bytes
    is_duplicate: bool
    picture_bytes: Callable[[str], bytes]
    refused: tuple[str, str] | None = None


def parsed_row(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. Raises Rejected when the line is not a JSON object in UTF-8."""
    try:
        text = content.decode("utf-8-sig")  # files from Windows may start with a byte order mark
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
    if "\\u" not in text:  # valid UTF-8 has no half of a surrogate pair; only an escape can spell one
        return row
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("not_utf8", "the text contains half of a surrogate pair") from error
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would create one for every row


def record_id(row: dict[str, Any]) -> str | None:
    """Return the record's own id as text, None if it has none. Ids may repeat."""
    value = row.get("id")
    return str(value) if isinstance(value, str | int) else as_text(value) or None


def picture_names(row: dict[str, Any]) -> list[str]:
    """Return the paths in `image`. Raises Rejected when it is neither a path nor a list of paths."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Rejected("broken_row", "image is neither a path nor a list of paths")
    return names


def picture_data(raw: RawRow, name: str) -> bytes:
    """Return the bytes of a picture: those in the name itself (base64, data URI), or those of the file it names.

    Raises what the row's own `picture_bytes` raises.
    """
    data = inline_picture(name)
    return raw.picture_bytes(name) if data is None else data
