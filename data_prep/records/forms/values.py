"""Values of rows as people write them: JSON in a text, structs of nulls, numbers where a text is expected."""

import json
import math
from typing import Any

from data_prep.records.rejection import Rejected
from vico.bounded_text import bounded_int, depth_checked, unique_names


def has_content(value: Any) -> bool:
    """Return whether a value is more than nulls and empty texts, lists and objects, also if it is JSON text.

    Some writers write a struct of nulls for a missing value.
    """
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    if isinstance(value, list):
        return any(map(has_content, value))
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    return value is not None and value is not False


def is_given(value: Any) -> bool:
    """Return whether a question or an answer is there: any text that is not blank, also "None" and "[]"."""
    if isinstance(value, dict | list):
        return has_content(value)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def fields_given(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return those of the fields that hold a question or an answer, in the order of `names`."""
    return [name for name in names if is_given(row.get(name))]


def decoded_json(text: str) -> Any:
    """Return the value of a JSON text; numbers that are not finite are null.

    Raises ValueError when it is none, repeats a name or is beyond the limits, and Rejected when an escape in
    it spells half of a surrogate pair.
    """
    value = depth_checked(text, lambda: _DECODER.decode(text))
    if "\\u" in text:  # valid UTF-8 has no half of a pair; only an escape can spell one
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise Rejected("not_utf8", "the text contains half of a surrogate pair") from error
    return value


def finite_or_null(value: Any) -> Any:
    """Return the value with null for each number in it that is not finite.

    Pandas and Python write NaN for a missing value, also as JSON. As an answer it would be the text "nan".
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite_or_null(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite_or_null(part) for part in value]
    return value


def _null(name: str) -> None:
    return None


def _finite_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


# json.loads would create one for every row
_DECODER = json.JSONDecoder(
    parse_constant=_null,
    parse_int=bounded_int,
    parse_float=_finite_float,
    object_pairs_hook=unique_names,
)


def json_value(value: Any) -> Any:
    """Return the list or object that a text spells as JSON; anything else unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return decoded_json(value)
    except ValueError:
        return value


def as_text(value: Any) -> str:
    """Return a value as text: a list as its elements with commas, an object as JSON, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(element, str | int | float) for element in value):
        return ", ".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def filled(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return those of the fields that have content, in the order of `names`."""
    return [name for name in names if has_content(row.get(name))]
