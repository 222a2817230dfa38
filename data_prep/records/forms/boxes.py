"""Objects of a row (ms-swift's `objects`) in the places `<ref-object>` and `<bbox>`, in InternVL's form.

A name becomes `<ref>cup</ref>`, a box `<box>[[x1, y1, x2, y2]]</box>` with whole numbers from 0 to 1000:
coordinates in pixels times 1000 divided by the picture's width or height, rounded to the nearest (halves to
the even number).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from data_prep.records.forms.values import has_content, json_value
from data_prep.records.rejection import Rejected, shown

NAME_PLACE, BOX_PLACE = "<ref-object>", "<bbox>"
_PLACE = re.compile(f"{NAME_PLACE}|{BOX_PLACE}")
_SCALE = 1000
_FIELDS = ("ref", "bbox", "bbox_type", "image_id")
_TYPES = ("real", "norm1", "norm1000")


def has_places(conversations: list[dict[str, Any]]) -> bool:
    """Return whether a turn has a place for a name or a box."""
    return any(NAME_PLACE in turn["value"] or BOX_PLACE in turn["value"] for turn in conversations)


def with_objects(
    conversations: list[dict[str, Any]], objects: Any, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return turns with names and boxes in their places; `sizes` are (width, height) of the pictures.

    Raises Rejected when places and objects differ in number, or when a box is not inside its picture. Objects
    of turns without a place are only information: `has_places`.
    """
    places = {
        place: sum(turn["value"].count(place) for turn in conversations) for place in (NAME_PLACE, BOX_PLACE)
    }
    objects = json_value(objects)
    objects = objects if has_content(objects) else {}
    if not isinstance(objects, dict) or not objects.keys() <= set(_FIELDS):
        raise Rejected("unread_field", f"objects has other fields than {', '.join(_FIELDS)}")
    names, boxes = _list(objects, "ref"), _boxes(objects, sizes)
    for place, field, values in ((NAME_PLACE, "ref", names), (BOX_PLACE, "bbox", boxes)):
        if places[place] != len(values):
            message = f"{places[place]} places {place} for {len(values)} in objects.{field}"
            raise Rejected("unread_field", message)
    if not all(isinstance(name, str) for name in names):
        raise Rejected("broken_row", "objects.ref is not a list of texts")
    texts = {NAME_PLACE: iter(f"<ref>{name}</ref>" for name in names), BOX_PLACE: iter(boxes)}
    return [
        {**turn, "value": _PLACE.sub(lambda place: next(texts[place[0]]), turn["value"])}
        for turn in conversations
    ]


def _list(objects: dict[str, Any], field: str) -> list[Any]:
    value = objects.get(field) or []
    if not isinstance(value, list):
        raise Rejected("broken_row", f"objects.{field} is not a list")
    return value


def _boxes(objects: dict[str, Any], sizes: Sequence[tuple[int, int]]) -> list[str]:
    boxes, pictures = _list(objects, "bbox"), _list(objects, "image_id")
    kind = objects.get("bbox_type") or "real"
    if kind not in _TYPES:
        raise Rejected(
            "unread_field", f"objects.bbox_type={shown(str(kind))} is not one of {', '.join(_TYPES)}"
        )
    if pictures and len(pictures) != len(boxes):
        raise Rejected("broken_row", f"objects has {len(boxes)} in bbox and {len(pictures)} in image_id")
    texts = []
    for n, box in enumerate(boxes):
        picture = pictures[n] if pictures else 0
        if type(picture) is not int or not 0 <= picture < len(sizes):
            raise Rejected("broken_row", f"objects.bbox {n} is in picture {picture} of {len(sizes)}")
        extent = {"real": sizes[picture], "norm1": (1, 1), "norm1000": (_SCALE, _SCALE)}[kind]
        texts.append(_box(box, extent, n))
    return texts


def _box(box: Any, extent: tuple[int, int], number: int) -> str:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise Rejected("unread_field", f"objects.bbox {number} is not [x1, y1, x2, y2]; only boxes are read")
    x1, y1, x2, y2 = box
    if not (0 <= x1 <= x2 <= extent[0] and 0 <= y1 <= y2 <= extent[1]):
        raise Rejected(
            "broken_row", f"objects.bbox {number} is {shown(str(box))}, not inside {extent[0]} x {extent[1]}"
        )
    scaled = [round(value / extent[n % 2] * _SCALE) for n, value in enumerate(box)]
    return f"<box>[{scaled}]</box>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
