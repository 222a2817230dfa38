"""What a row holds and is not read: it would train as if it were not there, so the row is rejected."""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from data_prep.records.forms.embedded import Attachment, attachments
from data_prep.records.forms.values import has_content, json_value
from data_prep.records.media.inline import inline_media
from data_prep.records.media.kinds import Media, media_of_name
from data_prep.records.rejection import Rejected, shown

# names of fields here are those of `plain_name`
_MEDIA_FIELDS: dict[str, Media] = {
    **dict.fromkeys(("video", "videos"), "video"),
    **dict.fromkeys(("audio", "audios", "sound", "sounds", "speech"), "audio"),
}
# a name of a field that says what a row without pictures shows, whatever the value looks like
_NAMES_A_MEDIUM = re.compile(
    r"(?P<picture>image|img|picture|photo|pic)?(?P<video>video)?(?P<audio>audio|sound|speech)?"
    r"s?(?:path|file|filename|name|url|uri|id|key)?s?"
)
_TOOL_FIELDS = frozenset(
    [
        *("tools", "availabletools", "toolcalls", "toolcall", "toolchoice", "toollist", "toolschemas"),
        *("functions", "functioncall", "functioncalls", "functionlist"),
    ]
)
_PREFERENCE_FIELDS = frozenset(("ktotag", "ktolabel", "preferred", "dispreferred"))
_PREFERENCE_STARTS = ("chosen", "rejected")
_THOUGHT_FIELDS = ("reasoningcontent", "reasoning", "thinking", "refusal")
LEARNED_FIELDS = ("loss", "weight", "train", "loss_scale")
"""Fields of a turn that say whether it is learned."""
_READ_OF_TURN = frozenset(("from", "role", "speaker", "value", "content", "text", "image", "images"))
_READ_OF_PART = frozenset(("type", "text", "value", "content", "index"))
TOOL_SPEAKERS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")
# a weight or mask by any name; of a turn, `forms/turns.py` reads some
_WEIGHT = re.compile(
    r"(sample|row|turn|message|token|answer)?weights?|loss.*|(compute|has|with)loss|trainon.*|trainable"
    r"|supervised?|(label|labels|answer|token|turn|message|attention)?masks?|maskhistory"
)
# the same turned around: true is what keeps something out
_NO_WEIGHT = re.compile(
    r"(no|skip|ignore)loss|masked|untrainable|trainon(input|prompt|question|source|user)s?"
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
_LONGEST_NAME = 1024


def refuse_unread(row: dict[str, Any], read: Collection[str], pictures: Collection[str | Attachment]) -> None:
    """Raise Rejected when a field holds media, tools, a preference, a weight, or a picture that is not read.

    `read` are the fields that were read, `pictures` those in them, and other names of these.
    """
    read_pictures, read_names = _ReadPictures(pictures), _byplain_name(frozenset(read))
    for field, value in row.items():
        if field in read:
            continue
        name = plain_name(field)
        if name in read_names and has_content(value):
            raise Rejected("unread_field", f"{shown(field)} is not read; rename it to {read_names[name]}")
        _refuse_by_name(name, field, value)
        if field == "label" and value is False:
            raise Rejected("unread_field", "label=false marks an answer to avoid, which is not learned here")
        if not pictures:
            _refuse_name_of_medium(name, field, value)
        if not isinstance(value, str | list | dict | Attachment):
            continue
        is_text = field in _INFORMATION or field in _ASKED_OR_ANSWERED
        if not is_text or next(attachments(value), None) is not None:
            _refuse_media(field, value, read_pictures)


@lru_cache(maxsize=4096)
def plain_name(field: str) -> str:
    """Return a name without case and separators: `toolCalls` and `Tool-Calls` are `toolcalls`."""
    return "".join(filter(str.isalnum, field.lower()))


@lru_cache(maxsize=256)
def _byplain_name(read: frozenset[str]) -> Mapping[str, str]:
    return {plain_name(field): field for field in sorted(read, reverse=True)}


def _refuse_by_name(name: str, field: str, value: Any) -> None:
    """Raise Rejected for media, tools, thoughts, a preference or a weight of a row, by its field's name."""
    if name in _MEDIA_FIELDS and has_content(value):
        media = _MEDIA_FIELDS[name]
        raise Rejected(media, f"the row has {_WITH_ARTICLE[media]} in {shown(field)}")
    if name in _TOOL_FIELDS and has_content(value):
        raise Rejected("unread_field", f"{shown(field)} is not read; rows with tools are not supported")
    if name in _THOUGHT_FIELDS and has_content(value):
        message = f"{shown(field)} is not read; put it into the answer, or remove it"
        raise Rejected("unread_field", message)
    is_preference = name in _PREFERENCE_FIELDS or (
        name.startswith(_PREFERENCE_STARTS) and isinstance(value, str | list | dict)
    )
    if is_preference and has_content(value):
        raise Rejected(
            "unread_field", f"{shown(field)} is one side of a preference, which is not learned here"
        )
    if not _is_full_weight(name, value):
        message = f"{shown(field)}={shown(str(value))} of a row is not read; use repeat_time, or remove it"
        raise Rejected("unread_field", message)


def _is_full_weight(name: str, value: Any) -> bool:
    """Return False if a field is a weight or mask by its name and its value is another than all of it."""
    values = value if isinstance(value, list) else [value]
    if _NO_WEIGHT.fullmatch(name):
        return all(given in (None, 0, "") for given in values)
    return _WEIGHT.fullmatch(name) is None or all(given in (None, 1, "") for given in values)


def _refuse_name_of_medium(name: str, field: str, value: Any) -> None:
    """Raise Rejected when a row without pictures has a field that names one, such as `image_id`."""
    match = _NAMES_A_MEDIUM.fullmatch(name)
    if match is None or not any(match.groups()) or not has_content(value):
        return
    if match["picture"]:
        message = f"{shown(field)} names a picture that is not read; put it into image or images"
        raise Rejected("unread_field", message)
    media: Media = "video" if match["video"] else "audio"
    raise Rejected(media, f"the row has {_WITH_ARTICLE[media]} in {shown(field)}")


def refuse_unread_of_turn(turn: dict[str, Any], number: int) -> None:
    """Raise Rejected when a turn holds media, tool calls or thoughts, or is from a tool."""
    for field in ("from", "role", "speaker"):
        speaker = turn.get(field)
        if isinstance(speaker, str) and speaker.lower() in TOOL_SPEAKERS:
            raise Rejected("unread_field", f"turn {number} is from {speaker!r}; turns of tools are not read")
    for field, value in turn.items():
        if field in _READ_OF_TURN:
            continue
        name = plain_name(field)
        if name in _READ_OF_TURN and has_content(value):
            raise Rejected("unread_field", f"turn {number} has {shown(field)}; rename it to {name}")
        is_weight = _WEIGHT.fullmatch(name) or _NO_WEIGHT.fullmatch(name)
        if value is not None and field not in LEARNED_FIELDS and (is_weight or name in LEARNED_FIELDS):
            names = ", ".join(LEARNED_FIELDS)
            message = f"turn {number} has {shown(field)}, which is not read; use {names}"
            raise Rejected("unread_field", message)
        if name in _MEDIA_FIELDS and has_content(value):
            raise Rejected(_MEDIA_FIELDS[name], f"turn {number} has a {shown(field)}")
        if (name in _TOOL_FIELDS or name in _THOUGHT_FIELDS) and has_content(value):
            raise Rejected("unread_field", f"turn {number} has {shown(field)}, which is not read")
        _refuse_media(f"turn {number}: {shown(field)}", value, _ReadPictures(()))


def refuse_unread_of_part(part: dict[str, Any], where: str, is_text: bool) -> None:
    """Raise Rejected when a part of a turn holds a weight, tools or thoughts, or a text a picture besides."""
    for field, value in part.items():
        if field in _READ_OF_PART:
            continue
        name = plain_name(field)
        is_weight = name in LEARNED_FIELDS and value not in (None, 1, "")
        if is_weight or not _is_full_weight(name, value):
            message = (
                f"{where}: {shown(field)}={shown(str(value))} of a part is not read; learn whole answers"
            )
            raise Rejected("unread_field", message)
        if (name in _TOOL_FIELDS or name in _THOUGHT_FIELDS) and has_content(value):
            raise Rejected("unread_field", f"{where}: a part has {shown(field)}, which is not read")
        if is_text:
            _refuse_media(f"{where}: {shown(field)}", value, _ReadPictures(()))


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
    return inline_media(text) is not None


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
    media = inline_media(text)
    if media is not None or len(text) > _LONGEST_NAME:
        return media
    text = text.strip()
    if "\n" in text or (" " in text and not any(word in field.lower() for word in _NAMES_OF_PICTURES)):
        return None
    if _ADDRESS.match(text) and _PICTURE_WORD.search(field):
        return media_of_name(text) or "picture"
    return media_of_name(text)
