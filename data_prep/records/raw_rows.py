"""A row before any check, the same for every format, and the parsing of its JSON line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.records.forms.embedded import Attachment, Embedded
from data_prep.records.forms.values import as_text, decoded_json, finite_or_null
from data_prep.records.media.inline import inline_picture
from data_prep.records.rejection import Rejected
from vico.bounded_text import BeyondLimits, refuse_depth

DIGEST_BYTES = 16


@dataclass(frozen=True)
class RawRow:
    """One row as its reader found it: `content` is a line of JSON in any form, or the fields themselves.

    `picture_bytes` reads a picture by its name in the row; `embedded` is what the file has beside the fields;
    `refused` is (reason, message) when the reader could not read the row.
    """

    line: int
    content: bytes | dict[str, Any]
    is_duplicate: bool
    picture_bytes: Callable[[str], bytes]
    embedded: Embedded | None = None
    refused: tuple[str, str] | None = None


def parsed_row(content: bytes | dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row. Raises Rejected when a line is not a JSON object in UTF-8."""
    if isinstance(content, dict):
        try:
            refuse_depth(content)
        except BeyondLimits as error:
            raise Rejected("broken_row", str(error)) from error
        return {name: finite_or_null(value) for name, value in content.items()}
    try:
        text = content.decode("utf-8-sig")  # files from Windows may start with a byte order mark
    except UnicodeDecodeError as error:
        raise Rejected("not_utf8", f"byte {error.start} of the line is not UTF-8") from error
    if not text.strip():
        raise Rejected("not_json", "the line is empty")
    try:
        row = decoded_json(text)
    except ValueError as error:
        raise Rejected("not_json", str(error)) from error
    if not isinstance(row, dict):
        raise Rejected("not_an_object", f"the line is a JSON {type(row).__name__}")
    return row


def record_id(row: dict[str, Any]) -> str | None:
    """Return the record's own id as text, None if it has none. Ids may repeat."""
    value = row.get("id")
    return str(value) if isinstance(value, str | int) else as_text(value) or None


def picture_names(row: dict[str, Any]) -> list[str | Attachment]:
    """Return the pictures in `image`. Raises Rejected when it is neither a path nor a list of paths."""
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str | Attachment) for name in names):
        raise Rejected("broken_row", "image is neither a path nor a list of paths")
    return names


def picture_data(raw: RawRow, name: str | Attachment) -> bytes:
    """Return the bytes of a picture: those that the row holds, also as base64, or those of the file it names.

    Raises what the row's own `picture_bytes` raises.
    """
    if isinstance(name, Attachment):
        return name.data
    data = inline_picture(name)
    return raw.picture_bytes(name) if data is None else data
