"""What a row holds and is not read: it would train as if it were not there, so the row is rejected."""

from collections.abc import Collection, Iterator
from typing import Any

from data_prep.records.forms.values import has_content, json_value
from data_prep.records.media.inline import is_base64
from data_prep.records.media.kinds import Media, media_of_bytes, media_of_name
from data_prep.records.rejection import Rejected, shown

ATTACHED = "attached:"
"""Names of bytes that a parquet row or a tar sample holds start with this (`attached_values`)."""
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
_TOOL_SPEAKERS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython")
_WEIGHT_FIELDS = ("loss", "loss_scale", "loss_weight", "sample_weight", "weight")
# fields that name a row or its origin, whatever they look like
_INFORMATION = frozenset(("id", "source", "origin", "license", "kind", "category", "group", "objects"))
_NAMES_OF_PICTURES = ("image", "img", "picture", "photo", "path", "file")
_LONGEST_NAME = 1024


def refuse_unread(row: dict[str, Any], read: Collection[str], names: Collection[str]) -> None:
    """Raise Rejected when a field holds media, tools, a preference or a weight, or a picture that is not read.

    `read` are the fields that were read, `names` the pictures that were found in them.
    """
    pictures = _ReadPictures(names)
    for field, value in row.items():
        if field in _MEDIA_FIELDS and has_content(value):
            media = _MEDIA_FIELDS[field]
            raise Rejected(media, f"the row has {_WITH_ARTICLE[media]} in {field}")
        if field in _TOOL_FIELDS and has_content(value):
            raise Rejected("unread_field", f"{field} is not read; rows with tools are not supported")
        if field in _PREFERENCE_FIELDS and has_content(value):
            raise Rejected("unread_field", f"{field} is one side of a preference, which is not learned here")
        if field in _WEIGHT_FIELDS and value not in (None, 1, "", []):
            message = f"{field}={shown(str(value))} of a row is not read; use repeat_time, or remove it"
            raise Rejected("unread_field", message)
        if field == "label" and value is False:
            raise Rejected("unread_field", "label=false marks an answer to avoid, which is not learned here")
        if field not in read and field not in _INFORMATION and isinstance(value, str | list | dict):
            _refuse_media(field, value, pictures)


def refuse_unread_of_turn(turn: dict[str, Any], number: int) -> None:
    """Raise Rejected when a turn holds media, tool calls or thoughts, or is from a tool."""
    speaker = turn.get("from", turn.get("role"))
    if isinstance(speaker, str) and speaker.lower() in _TOOL_SPEAKERS:
        raise Rejected("unread_field", f"turn {number} is from {speaker!r}; turns of tools are not read")
    for field, value in turn.items():
        if field in ("from", "role", "speaker", "value", "content", "text", "image", "images"):
            continue
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
    one, or an address beside pictures, or one of the pictures has no name of its own.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.num_pictures = len(names)
        named = [name for name in names if not _is_content(name)]
        self.names = {name.rpartition("/")[2] for name in named}
        self.num_nameless = len(names) - len(named)

    def may_have_name(self, text: str) -> bool:
        if _is_content(text):
            return False
        name = text.rpartition("/")[2]
        if name not in self.names and self.num_nameless:
            self.num_nameless -= 1
            self.names.add(name)
        return name in self.names or (self.num_pictures > 0 and text.startswith(("http://", "https://")))


def _is_content(text: str) -> bool:
    """Return whether a text is a picture itself and not the name of one."""
    return text.startswith((ATTACHED, "data:")) or is_base64(text)


def _refuse_media(field: str, value: Any, pictures: _ReadPictures) -> None:
    """Raise Rejected when a value that is not read holds a picture, audio or video."""
    for text in _texts(json_value(value)):
        media = _media_of_text(field, text)
        if media == "picture" and not pictures.may_have_name(text):
            message = f"{field} looks like a picture ({shown(text)}) and is not read; name it in images"
            raise Rejected("unread_field", message)
        if media in ("audio", "video"):
            raise Rejected(media, f"{field} looks like {_WITH_ARTICLE[media]} ({shown(text)})")


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value; a struct of samples with their rate, as for sounds, gives a name of a sound."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if has_content(value.get("array")) and "sampling_rate" in value:
            yield f"{ATTACHED}array.audio"
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            if not isinstance(inner, int | float):
                yield from _texts(inner)


def _media_of_text(field: str, text: str) -> Media | None:
    if text.startswith(ATTACHED):
        kind = text.rpartition(".")[2]
        return kind if kind in ("picture", "audio", "video") else None  # type: ignore[return-value]
    if text.startswith("data:"):
        kind = text[5:10]
        return "picture" if kind == "image" else kind if kind in ("audio", "video") else None  # type: ignore
    if len(text) > _LONGEST_NAME:
        return "picture" if is_base64(text) else None
    if "\n" in text or (" " in text and not any(word in field.lower() for word in _NAMES_OF_PICTURES)):
        return None
    return media_of_name(text) or ("picture" if is_base64(text) else None)


def attached_values(value: Any, attached: dict[str, bytes]) -> Any:
    """Return a value with a name in the place of all bytes, which are added to `attached` under that name.

    The name ends in what the bytes look like: `attached:0.picture`, or `attached:1.bytes` for unknown ones.
    """
    if isinstance(value, bytes):
        name = f"{ATTACHED}{len(attached)}.{media_of_bytes(value) or 'bytes'}"
        attached[name] = value
        return name
    if isinstance(value, dict):
        return {field: attached_values(inner, attached) for field, inner in value.items()}
    if isinstance(value, list):
        return [attached_values(inner, attached) for inner in value]
    return value
