"""The content of a turn as a list of parts: texts and pictures, in the forms of several libraries."""

from typing import Any

from data_prep.records.forms.embedded import Attachment
from data_prep.records.forms.named_pictures import picture_name
from data_prep.records.forms.unread import media_of_part, refuse_unread_of_part
from data_prep.records.forms.values import has_content, json_value
from data_prep.records.rejection import Rejected, shown
from vico.special_tokens import IMAGE_MARK

_TEXT_TYPES, _PICTURE_TYPES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_PART_TYPES = frozenset(
    [*_TEXT_TYPES, *_PICTURE_TYPES, "audio", "audio_url", "input_audio", "video", "video_url", "input_video"]
)
_TEXT_FIELDS, _NAME_FIELDS = ("text", "value", "content"), ("value", "content")


def content_of_turn(value: Any) -> Any:
    """Return the parts that a text spells as JSON; any other content unchanged.

    A list of objects with more in them, such as the layout of a page, is a text.
    """
    parts = json_value(value) if isinstance(value, str) and '"type"' in value else value
    is_parts = isinstance(parts, list) and len(parts) > 0 and all(map(_is_part, parts))
    return parts if is_parts else value


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    is_text = part["type"] in _TEXT_TYPES
    return part["type"] in _PART_TYPES and (not is_text or part.keys() <= {"type", *_TEXT_FIELDS})


def joined_parts(
    parts: list[Any], where: str, is_answer: bool = False
) -> tuple[str, list[Attachment | str | int | None]]:
    """Return the text of a turn's parts with a mark for each picture, and what each mark names.

    A picture's part names it, or has its place in the row's list as `index`, or neither (None). Raises
    Rejected for a part that is neither text nor a picture, for a picture in an answer, and for what is not
    read of a part.
    """
    texts: list[str] = []
    marks: list[Attachment | str | int | None] = []
    for part in parts:
        part_type = _type(part, where)
        if isinstance(part, dict):
            refuse_unread_of_part(part, where, is_text=part_type == "text")
        if part_type == "text":
            text = part if isinstance(part, str) else _first(part, _TEXT_FIELDS)
            if not isinstance(text, str):
                raise Rejected("broken_row", f"{where}: a part of type text has no text")
            texts.append(text)
            marks += [None] * text.count(IMAGE_MARK)
        elif is_answer:
            raise Rejected("unread_field", f"{where} is an answer with a picture; answers are text")
        else:
            texts.append(f"{IMAGE_MARK}\n")
            marks.append(_named(part, where))
    return "".join(texts), marks


def _type(part: Any, where: str) -> str:
    """Return `text` or `image`; without a `type`, as in Qwen's rows, the part's only field says it."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        raise Rejected("broken_row", f"{where}: a part of the content is a {type(part).__name__}")
    media = media_of_part(part)
    if media is not None:
        raise Rejected(media, f"{where}: a part of the content is {media}")
    part_type = part.get("type")
    if part_type in _TEXT_TYPES or (part_type is None and has_content(part.get("text"))):
        return "text"
    if part_type in _PICTURE_TYPES or (part_type is None and (has_content(part.get("image")))):
        return "image"
    raise Rejected("unread_field", f"{where}: a part of type {shown(str(part_type))} is not read")


def _named(part: dict[str, Any], where: str) -> Attachment | str | int | None:
    value = _first(part, _NAME_FIELDS)
    if isinstance(value, Attachment) or (isinstance(value, str) and value):
        return value
    fields = {name: value for name, value in part.items() if name not in ("type", "text", "index")}
    if any(map(has_content, fields.values())):
        return picture_name(value if isinstance(value, dict) else part, f"{where}: a part of the content")
    index = part.get("index")
    return index if isinstance(index, int) and not isinstance(index, bool) else None


def _first(part: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((part[name] for name in names if has_content(part.get(name)) or part.get(name) == ""), None)
