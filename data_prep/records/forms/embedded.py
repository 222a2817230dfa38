"""What a tar or parquet file holds with a row: bytes in its fields, pictures beside its fields, a caption."""

import math
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.records.forms.values import has_content
from data_prep.records.media.inline import is_base64, is_data_uri
from data_prep.records.media.kinds import Media, media_of_bytes
from data_prep.records.rejection import Rejected, shown

_PICTURE_FIELDS = ("image", "images", "bytes")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NUM_SHOWN = 6


@dataclass(frozen=True, eq=False)
class Attachment:
    """Bytes that a row holds: `name` says where they are, for messages, and `media` what they look like."""

    name: str
    data: bytes = field(repr=False)
    media: Media | None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Embedded:
    """What is beside the fields of a row: members of a tar sample, or the media of a row before its repair.

    `media` are pictures, sounds and videos in their order, a str for the name of a file; `spellings` has the
    names that a row may use for them, as `spelling` writes them; `*/` before one stands for any folder.
    `holder` is for messages. A repaired row may leave some out and name files.
    """

    media: tuple[str | Attachment, ...]
    spellings: Mapping[str, str | Attachment]
    holder: str
    caption: bytes | None = None
    is_repaired: bool = False

    @property
    def pictures(self) -> list[str | Attachment]:
        """The pictures, in their order."""
        return [medium for medium in self.media if isinstance(medium, str) or medium.media == "picture"]

    def all_pictures(self) -> list[str | Attachment]:
        """Return the pictures, for a row that names none. Raises Rejected if there is a sound or a video."""
        for medium in self.media:
            if isinstance(medium, Attachment) and medium.media in ("audio", "video"):
                what = "audio" if medium.media == "audio" else "a video"
                raise Rejected(medium.media, f"{self.holder} has {what} ({medium})")
        return self.pictures

    def named_pictures(self, names: Sequence[str | Attachment]) -> list[str | Attachment]:
        """Return the picture of each name. Raises Rejected when one is unknown, or a picture is not named."""
        meant = [self._meant(name) for name in names]
        if not self.is_repaired:
            named = set(map(id, meant))
            for picture in self.all_pictures():
                if id(picture) not in named:
                    raise Rejected("unread_field", f"the row names pictures, but not {picture}")
        return meant

    def caption_text(self) -> str:
        """Return the caption of pictures. Raises Rejected if it is not UTF-8 or has no picture."""
        assert self.caption is not None, "the caller looks whether there is a caption"
        if not self.pictures:
            raise Rejected("broken_row", f"{self.holder} has a caption but no picture")
        try:
            return self.caption.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            message = f"byte {error.start} of the caption of {self.holder} is not UTF-8"
            raise Rejected("not_utf8", message) from error

    def _meant(self, name: str | Attachment) -> str | Attachment:
        if isinstance(name, Attachment):
            return name
        whole = spelling(posixpath.normpath(name))
        medium = self.spellings.get(whole, self.spellings.get(f"*/{posixpath.basename(whole)}"))
        if medium is not None:
            return medium
        if self.is_repaired or _is_inline(name):
            return name
        those = ", ".join(map(str, self.pictures[:_NUM_SHOWN])) or "none"
        message = f"{shown(name)} is not a picture of {self.holder} (its pictures: {those})"
        raise Rejected("missing_image", message)


def spelling(name: str) -> str:
    """Return a name as a key of `Embedded.spellings`: tar on macOS writes letters and accents apart."""
    return unicodedata.normalize("NFC", name).lower()


def with_attachments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as values of JSON, with an Attachment in the place of bytes that are not text.

    Equal bytes give one Attachment. Dates, decimals and the like become text; numbers that are not finite
    become null, which JSON has in their place.
    """
    attached: dict[bytes, Attachment] = {}
    return {name: _plain_value(value, name, name, attached) for name, value in fields.items()}


def type_name(value: Any) -> str:
    """Return the type of a value for a message, with its article."""
    return "bytes" if isinstance(value, Attachment) else f"a {type(value).__name__}"


def attachments(value: Any) -> Iterator[Attachment]:
    """Yield the attachments in a value of `with_attachments`, in their order; equal bytes repeat."""
    if isinstance(value, Attachment):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from attachments(inner)


def _plain_value(value: Any, name: str, where: str, attached: dict[bytes, Attachment]) -> Any:
    """Return a value of the field `name`; `where` is its whole place in the row."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _text_or_attachment(value, name, where, attached)
    if isinstance(value, dict):
        if has_content(value.get("array")) and "sampling_rate" in value:
            return Attachment(where, b"", "audio")
        return {key: _plain_value(inner, key, f"{where}.{key}", attached) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(inner, name, f"{where}[{n}]", attached) for n, inner in enumerate(value)]
    return str(value)


def _text_or_attachment(data: bytes, name: str, where: str, attached: dict[bytes, Attachment]) -> Any:
    """Return bytes as text where a writer stored text as binary."""
    media = media_of_bytes(data)
    if media is None:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if not _CONTROL.search(text) and (name not in _PICTURE_FIELDS or _is_inline(text)):
            return text
    return attached.setdefault(data, Attachment(where, data, media))


def _is_inline(text: str) -> bool:
    return is_data_uri(text) or is_base64(text)
