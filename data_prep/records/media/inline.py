"""Pictures that a row holds as text: a data URI, or plain base64."""

import base64
import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

from data_prep.records.media.kinds import Media, media_of_bytes
from data_prep.records.rejection import Rejected, shown

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]++={0,2}\s*+")  # possessive: quadratic otherwise
_DATA_URI = re.compile(r"\s*data:", re.IGNORECASE)
_MEDIA_OF_URI: dict[str, Media] = {"image": "picture", "audio": "audio", "video": "video"}
_FEWEST_CHARACTERS = 64  # shorter texts are names
_LONGEST_PATH = 4096
_FEWEST_KINDS = 8  # 64 characters of base64 have more different ones, unless the data hardly change
_HEAD_CHARACTERS = 64
_URL_SAFE = str.maketrans("-_", "+/")


def inline_picture(name: str) -> bytes | None:
    """Return the bytes of a data URI or of base64, or None if `name` is the name of a file.

    Raises Rejected when the text is cut or has other characters.
    """
    if len(name) < _FEWEST_CHARACTERS and ":" not in name:
        return None
    if is_data_uri(name):
        head, comma, text = name.partition(",")
        if not comma:
            raise Rejected("undecodable_image", f"{shown(name)} is a data URI without data")
        is_encoded = head.lower().rstrip().endswith(";base64")
        return _decoded(unquote(text), name) if is_encoded else unquote_to_bytes(text)
    return _decoded(name, name) if is_base64(name) else None


def is_data_uri(text: str) -> bool:
    """Return whether a text starts as a data URI; its scheme has no case."""
    return _DATA_URI.match(text) is not None


def inline_media(text: str) -> Media | None:
    """Return the kind of what a text holds as a data URI or base64, None if it is neither.

    Of base64 that is too long for a path and starts as no kind that is known, that is `picture`.
    """
    if is_data_uri(text):
        head, _, data = text[:_LONGEST_PATH].partition(",")
        media = _MEDIA_OF_URI.get(head.lstrip()[5:10].lower())
        if media is None and head.lower().rstrip().endswith(";base64"):
            return media_of_bytes(_start_of_base64(unquote(data)))
        return media or media_of_bytes(unquote_to_bytes(data))
    if len(text) < _FEWEST_CHARACTERS or "." in text[:_LONGEST_PATH]:
        return None
    media = media_of_bytes(_start_of_base64(text))
    head = text[: 2 * _HEAD_CHARACTERS]
    is_too_long = len(text) > _LONGEST_PATH and len(set(head)) > _FEWEST_KINDS
    return "picture" if media is None and is_too_long and _BASE64.fullmatch(text) is not None else media


def is_base64(text: str) -> bool:
    """Return whether a text is base64 of a picture or other media, or base64 too long for a path."""
    return not is_data_uri(text) and inline_media(text) is not None


def _start_of_base64(text: str) -> bytes:
    """Return the first bytes that base64 stands for, none if it starts with other characters."""
    head = "".join(text[: 2 * _HEAD_CHARACTERS].split())[:_HEAD_CHARACTERS].translate(_URL_SAFE)
    try:
        return base64.b64decode(head[: len(head) // 4 * 4], validate=True)
    except (binascii.Error, ValueError):
        return b""


def _decoded(text: str, name: str) -> bytes:
    plain = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("undecodable_image", f"{shown(name)} is not valid base64") from error
