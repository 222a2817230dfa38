"""What a row holds and is not read: it would train as if it were not there, so the row is rejected."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from data_prep.records.forms.embedded import Attachment, attachments
from data_prep.records.forms.values import has_content, json_value
from data_prep.records.media.inline import is_base64, is_data_uri
from data_prep.records.media.kinds import Media, media_of_name
from data_prep.records.rejection import Rejected, shown

_MEDIA_FIELDS: dict[str, Media] = {
    **dict.fromkeys(("video", "videos"), "video"),
    **dict.fromkeys(("audio", "audios", "sound", "speech"), "audio"),
}
_TOOL_FIELDS = ("tools", "functions", "tool_calls", "function_call")
_PREFERENCE_FIELDS = (
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "rejected_images",
    "chosen_response",
    "kto_tag",
    "kto_label",
)
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "refusal")
LEARNED_FIELDS = ("loss", "weight", "train", "loss_scale")
"""Fields of a turn that say whether it is learned."""
_TOOL_SPEAKERS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")
# a weight or mask by any name; of a turn, `forms/turns.py` reads some
_WEIGHT = re.compile(
    r"(sample_)?weight|loss.*|train_on.*|mask|mask_history|(label|labels|answer|token|attention)_mask"
)
# fields whose texts are no names of pictures that are left out, whatever they look like
_INFORMATION = frozenset(("id", "source", "origin", "license", "kind", "category", "group", "objects"))
_ASKED_OR_ANSWERED = frozenset(("question", "answer", "query", "response"))
_NAMES_OF_PICTURES = ("image", "img", "picture", "photo", "path", "file")
# fields for the name of a picture that the row holds as bytes or base64
_FIELDS_OF_NAMES = frozenset(
    [
        *("name", "file", "file_name", "filename", "path", "file_path", "key", "url", "__key__", "__url__"),
        *("image_id", "image_name", "image_file", "image_path", "image_url", "img_path"),
    ]
)
_NUMBERED = re.compile(r"(image|img|picture|photo)s?[_-]?\d", re.IGNORECASE)
_PICTURE_WORD = re.compile(r"image|img|picture|photo", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_MEDIA_OF_URI: dict[str, Media] = {"image": "picture", "audio": "audio", "video": "video"}
_LONGEST_NAME = 1024


def refuse_unread(row: dict[str, Any], read: Collection[str], pictures: Collection[str | Attachment]) -> None:
    """Raise Rejected when a field holds media, tools, a preference, a weight, or a picture that is not read.

    `read` are the fields that were read, `pictures` those in them, and other names of these.
    """
    read_pictures = _ReadPictures(pictures)
    for field, value in row.items():
        name = field.lower()
        if name != field and name in read and has_content(value):
            raise Rejected("unread_field", f"{shown(field)} is not read; rename it to {name}")
        if name in _MEDIA_FIELDS and has_content(value):
            media = _MEDIA_FIELDS[name]
            raise Rejected(media, f"the row has {_WITH_ARTICLE[media]} in {field}")
        if name in _TOOL_FIELDS and has_content(value):
            raise Rejected("unread_field", f"{field} is not read; rows with tools are not supported")
        if name in _PREFERENCE_FIELDS and has_content(value):
            raise Rejected("unread_field", f"{field} is one side of a preference, which is not learned here")
        if _WEIGHT.fullmatch(name) and value not in (None, 1, "", []):
            message = f"{field}={shown(str(value))} of a row is not read; use repeat_time, or remove it"
            raise Rejected("unread_field", message)
        if field == "label" and value is False:
            raise Rejected("unread_field", "label=false marks an answer to avoid, which is not learned here")
        if field in read or not isinstance(value, str | list | dict | Attachment):
            continue
        is_text = field in _INFORMATION or field in _ASKED_OR_ANSWERED
        if not is_text or next(attachments(value), None) is not None:
            _refuse_media(field, value, read_pictures)


def refuse_unread_of_turn(turn: dict[str, Any], number: int) -> None:
    """Raise Rejected when a turn holds media, tool calls or thoughts, or is from a tool."""
    speaker = turn.get("from", turn.get("role"))
    if isinstance(speaker, str) and speaker.lower() in _TOOL_SPEAKERS:
        raise Rejected("unread_field", f"turn {number} is from {speaker!r}; turns of tools are not read")
    for field, value in turn.items():
        if field in ("from", "role", "speaker", "value", "content", "text", "image", "images"):
            continue
        if value is not None and field not in LEARNED_FIELDS and _WEIGHT.fullmatch(field.lower()):
            names = ", ".join(LEARNED_FIELDS)
            message = f"turn {number} has {shown(field)}, which is not read; use {names}"
            raise Rejected("unread_field", message)
        if field in _MEDIA_FIELDS and has_content(value):
            raise Rejected(_MEDIA_FIELDS[field], f"turn {number} has a {field}")
        if field in (*_TOOL_FIELDS, *_THOUGHT_FIELDS) and has_content(value):
            raise Rejected("unread_field", f"turn {number} has {field}, which is not read")
        _refuse_media(f"turn {number}: {field}", value, _ReadPictures(()))


_WITH_ARTICLE: dict[Media, str] = {"video": "a video", "audio": "audio", "picture": "a picture"}


def media_of_part(part: dict[str, Any]) -> str | None:
    """Return `video` or `audio` when a part of a turn's content is one, else None."""
    for field, value in part.items():
        for media in ("video", "audio"):
            if media in field and has_content(value):
                return media
            if field == "type" and isinstance(value, str) and media in value:
                return media
    return None


class _ReadPictures:
    """The pictures of a row that are read, and which names in other fields may be theirs.

    A path or address elsewhere is only information if it may be the name of a read picture: it is the name of
    one, or an address beside pictures, or the field is one for names and a picture has no name of its own.
    """

    def __init__(self, pictures: Collection[str | Attachment]) -> None:
        self.pictures = pictures
        self.names = {
            str(name).rpartition("/")[2]
            for name in pictures
            if isinstance(name, Attachment) or not _is_content(name)
        }
        self.num_nameless = sum(isinstance(name, Attachment) or _is_content(name) for name in pictures)

    def may_have_name(self, field: str, text: str) -> bool:
        if _is_content(text) or _NUMBERED.search(field):
            return text in self.pictures
        name = text.rpartition("/")[2]
        if name not in self.names and self.num_nameless and field.lower() in _FIELDS_OF_NAMES:
            self.num_nameless -= 1
            self.names.add(name)
        return name in self.names or (len(self.pictures) > 0 and text.startswith(("http://", "https://")))


def _is_content(text: str) -> bool:
    """Return whether a text is a picture itself and not the name of one."""
    return is_data_uri(text) or is_base64(text)


def _refuse_media(field: str, value: Any, pictures: _ReadPictures) -> None:
    """Raise Rejected when a value that is not read holds a picture, audio or video."""
    for text in _texts(json_value(value)):
        if isinstance(text, Attachment):
            media, is_read = text.media, text in pictures.pictures
            what = f"{text.name or field} holds"
        else:
            media = _media_of_text(field, text)
            is_read = media == "picture" and pictures.may_have_name(field, text)
            what = f"{field} ({shown(text)}) looks like"
        if media == "picture" and not is_read:
            raise Rejected("unread_field", f"{what} a picture that is not read; put it into image or images")
        if media in ("audio", "video"):
            raise Rejected(media, f"{what} {_WITH_ARTICLE[media]}")


def _texts(value: Any) -> Iterator[str | Attachment]:
    """Yield all texts and attachments in a value."""
    if isinstance(value, str | Attachment):
        yield value
    elif isinstance(value, dict):
        if has_content(value.get("array")) and "sampling_rate" in value:
            yield Attachment("", b"", "audio")
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            if not isinstance(inner, int | float):
                yield from _texts(inner)


def _media_of_text(field: str, text: str) -> Media | None:
    if is_data_uri(text):
        return _MEDIA_OF_URI.get(text[5:10].lower())
    if len(text) > _LONGEST_NAME:
        return "picture" if is_base64(text) else None
    if "\n" in text or (" " in text and not any(word in field.lower() for word in _NAMES_OF_PICTURES)):
        return None
    if _ADDRESS.match(text) and _PICTURE_WORD.search(field):
        return media_of_name(text) or "picture"
    return media_of_name(text) or ("picture" if is_base64(text) else None)
