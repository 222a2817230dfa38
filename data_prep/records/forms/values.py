"""Values of rows as people write them: JSON in a text, structs of nulls, numbers where a text is expected."""

import json
from typing import Any, NoReturn

from data_prep.records.rejection import Rejected
from vico.bounded_text import bounded_int, depth_checked, finite_float, unique_names


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


def decoded_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError when it is none (NaN included), repeats a name or is beyond the limits, and Rejected
    when an escape in it spells half of a surrogate pair.
    """
    value = depth_checked(text, lambda: _DECODER.decode(text))
    if "\\u" in text:  # valid UTF-8 has no half of a pair; only an escape can spell one
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise Rejected("not_utf8", "the text contains half of a surrogate pair") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# json.loads would create one for every row
_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=bounded_int,
    parse_float=finite_float,
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
