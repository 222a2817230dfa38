"""Names of pictures in the values of a row: paths, addresses, base64, `{bytes, path}`, `{url}`."""

from typing import Any

from data_prep.records.forms.values import has_content, json_value
from data_prep.records.rejection import Rejected

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


def picture_list(value: Any, field: str) -> list[str]:
    """Return the names of the pictures in a value: one picture, a list of them, or nothing.

    Raises Rejected when an element is not a picture, or a struct with neither bytes nor a name.
    """
    value = json_value(value)
    if isinstance(value, list):
        return [name for element in value for name in _one_picture(element, field)]
    return _one_picture(value, field) if value is not None and value != "" and value != {} else []


def _one_picture(value: Any, field: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if value is None:
        raise Rejected("missing_image", f"{field} has a null in the place of a picture")
    if not isinstance(value, dict):
        raise Rejected("broken_row", f"{field} is neither a path nor a list of paths")
    return [picture_name(value, field)]


def picture_name(struct: dict[str, Any], field: str) -> str:
    """Return the name or base64 text in a struct such as `{bytes, path}`, `{url}` or `{source: {data}}`."""
    for name in _NAME_FIELDS:
        value = struct.get(name)
        if isinstance(value, dict) and has_content(value):
            return picture_name(value, field)
        if isinstance(value, str) and value:
            return value
    if isinstance(struct.get("source"), dict):
        return picture_name(struct["source"], field)
    raise Rejected("missing_image", f"{field} has neither bytes nor a path")
