"""Pictures in the values of a row: bytes, paths, addresses, base64, `{bytes, path}`, `{url}`."""

from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.records.forms.embedded import Attachment
from data_prep.records.forms.values import has_content, json_value
from data_prep.records.rejection import Rejected

PICTURE_FIELDS = ("image", "images")
# where a picture's struct has its bytes or its name, the first one counts
_NAME_FIELDS = (
    "bytes",
    "data",
    "base64",
    "path",
    "url",
    "image",
    "image_url",
    "image_path",
    "file",
    "file_name",
)


def listed_pictures(row: Mapping[str, Any]) -> list[str | Attachment]:
    """Return the pictures in `image` or `images`; both may be given if they agree."""
    lists = {name: picture_list(row[name], name) for name in PICTURE_FIELDS if row.get(name) is not None}
    lists = {name: names for name, names in lists.items() if names}
    if len(lists) == 2 and lists["image"] != lists["images"]:
        raise Rejected("broken_row", "image and images name different pictures; keep one of them")
    return next(iter(lists.values()), [])


def paths_beside_bytes(value: Any) -> Iterator[tuple[str, Attachment]]:
    """Yield (path, bytes) of each `{bytes, path}` in a value."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, Attachment) and isinstance(path, str):
            yield path, data
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from paths_beside_bytes(inner)


def picture_list(value: Any, field: str) -> list[str | Attachment]:
    """Return the pictures in a value, most of them by name: one picture, a list of them, or nothing.

    Raises Rejected when an element is not a picture, or a struct with neither bytes nor a name.
    """
    value = json_value(value)
    if isinstance(value, list):
        return [name for element in value for name in _one_picture(element, field)]
    return _one_picture(value, field) if value is not None and value != "" and value != {} else []


def _one_picture(value: Any, field: str) -> list[str | Attachment]:
    if isinstance(value, str | Attachment):
        return [value]
    if value is None:
        raise Rejected("missing_image", f"{field} has a null in the place of a picture")
    if not isinstance(value, dict):
        raise Rejected("broken_row", f"{field} is neither a path nor a list of paths")
    return [picture_name(value, field)]


def picture_name(struct: dict[str, Any], field: str) -> str | Attachment:
    """Return the bytes, name or base64 text in a struct such as `{bytes, path}` or `{source: {data}}`."""
    for name in _NAME_FIELDS:
        value = struct.get(name)
        if isinstance(value, dict) and has_content(value):
            return picture_name(value, field)
        if isinstance(value, Attachment) or (isinstance(value, str) and value):
            return value
    if isinstance(struct.get("source"), dict):
        return picture_name(struct["source"], field)
    raise Rejected("missing_image", f"{field} has neither bytes nor a path")
