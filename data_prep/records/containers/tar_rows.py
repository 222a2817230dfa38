"""Rows of WebDataset tars: KEY.json with the turns or a caption in KEY.txt, and the pictures of that key.

The shards of this project are such tars too.
"""

import json
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from data_prep.records.containers.tar_samples import TarMember, TarSample, tar_samples
from data_prep.records.media.kinds import Media, media_of_bytes, media_of_name
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.records.sets import RecordFile
from vico.special_tokens import IMAGE_MARK

_TURN_FIELDS = ("conversations", "messages", "texts", "query", "question")
_TEXT_ENDS = ("json", "jsonl", "txt", "text", "html", "xml", "md", "csv", "tsv", "cls", "id", "url")
_NUM_SHOWN, _NAME_CHARS, _LONGEST_NAME = 6, 80, 1024


class _Row(NamedTuple):
    """A sample as a line, its pictures by the names in the line, and `refused` of the RawRow."""

    content: bytes
    pictures: Mapping[str, bytes]
    refused: tuple[str, str] | None = None


def tar_rows(
    source: RecordFile,
    offset: int,
    first: int,
    count: int,
    duplicates: Collection[int],
    repaired: Mapping[int, bytes],
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with the sample at byte `offset`, which is row `first`.

    A row in `repaired` has the line given there instead of its own, and its own pictures.
    """
    for number, sample in enumerate(tar_samples(source.path, offset), start=first):
        if number == first + count:
            return
        is_duplicate = number in duplicates
        if number in repaired:
            content, pictures, refused = _repaired_row(sample, repaired[number])
            picture_bytes = partial(_picture_or_file, pictures, source)
        else:
            content, pictures, refused = _row(sample)
            picture_bytes = partial(_picture, pictures)
        yield RawRow(number, content, is_duplicate, picture_bytes, refused)


def _row(sample: TarSample) -> _Row:
    members = {member.extension: member for member in sample.members}
    content = members["json"].data if "json" in members else b""
    try:
        _refuse_unread_members(sample)
        row = json.loads(content) if content else {}
        if not isinstance(row, dict):
            return _Row(content, {})
        pictures = _pictures(sample)
        if "txt" in members and not any(row.get(field) for field in _TURN_FIELDS):
            row = {**row, "conversations": _caption_turns(sample, members["txt"], len(pictures))}
        elif not content:
            raise Rejected("broken_row", f"the sample {sample.key} has neither a .json nor a .txt member")
        row = _with_pictures(sample, row, pictures)
    except Rejected as rejected:
        return _Row(content, {}, (rejected.reason, rejected.message))
    except (ValueError, RecursionError):
        return _Row(content, {})  # the checks say what is wrong with the JSON
    return _Row(json.dumps(row).encode(), _data_by_name(pictures))


def _repaired_row(sample: TarSample, content: bytes) -> _Row:
    """Return the sample with another line.

    If that names pictures, the row has these and no others: members, or files beside the tar.
    """
    row, pictures = json.loads(content), _pictures(sample)
    try:
        if row.get("image") == []:
            return _Row(json.dumps(internvl_row(row)).encode(), {})
        normal, names = _with_names(row)
        if names:
            found = _members_by_names(names, pictures)
            row = {**normal, "image": [found.get(name, name) for name in names]}
        else:
            _refuse_unread_members(sample)
            row = _with_pictures(sample, row, pictures)
    except Rejected as rejected:
        return _Row(content, {}, (rejected.reason, rejected.message))
    return _Row(json.dumps(row).encode(), _data_by_name(pictures))


def _refuse_unread_members(sample: TarSample) -> None:
    """Raise Rejected when a member is audio or video, by its name or its bytes, or is there twice."""
    if sample.repeated:
        raise Rejected("broken_row", f"the sample {sample.key} has {sample.repeated[0]} twice")
    for member in sample.members:
        media = _media(member)
        if media == "video":
            raise Rejected("video", f"the sample {sample.key} has a video ({member.extension})")
        if media == "audio":
            raise Rejected("audio", f"the sample {sample.key} has audio ({member.extension})")


def _media(member: TarMember) -> Media | None:
    by_name = media_of_name(f".{member.extension}")
    is_text = member.extension.rpartition(".")[2] in _TEXT_ENDS
    return by_name if by_name or is_text else media_of_bytes(member.data)


def _pictures(sample: TarSample) -> list[TarMember]:
    """Return the pictures in the order of their numbers if all are KEY.NUMBER.EXTENSION, else of the tar."""
    pictures = [member for member in sample.members if _media(member) == "picture"]
    numbers = [member.extension.rpartition(".")[0] for member in pictures]
    if all(number.isdecimal() for number in numbers):
        pictures.sort(key=lambda member: int(member.extension.partition(".")[0]))
    return pictures


def _data_by_name(pictures: Sequence[TarMember]) -> dict[str, bytes]:
    return {_line_name(picture): picture.data for picture in pictures}


def _line_name(picture: TarMember) -> str:
    """Return the name of a picture in the line of its sample."""
    return posixpath.basename(picture.name)


def _with_pictures(sample: TarSample, row: dict[str, Any], pictures: Sequence[TarMember]) -> dict[str, Any]:
    """Return the row in InternVL's form with its pictures: those that it names, in that order, else all.

    Raises Rejected when a name is not a picture of the sample, or a picture is not named.
    """
    normal, names = _with_names(row)
    if not names:
        unnamed = {field: value for field, value in row.items() if field not in ("image", "images")}
        all_names = {"image": [_line_name(picture) for picture in pictures]} if pictures else {}
        return internvl_row({**unnamed, **all_names}) if not normal.get("image") else normal
    found = _members_by_names(names, pictures)
    for name in names:
        if name not in found and not _is_inline(name):
            shown = ", ".join(picture.extension for picture in pictures[:_NUM_SHOWN]) or "none"
            raise Rejected(
                "missing_image",
                f"{name[:_NAME_CHARS]} is not a picture of the sample {sample.key} (its pictures: {shown})",
            )
    for picture in pictures:
        if _line_name(picture) not in found.values():
            raise Rejected("unread_field", f"the row names pictures, but not its member {picture.name}")
    return {**normal, "image": [found.get(name, name) for name in names]}


def _with_names(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the row in InternVL's form, and the names of its pictures ([] if there are none)."""
    if row.get("image") is None:
        row = {field: value for field, value in row.items() if field != "image"}
    normal = internvl_row(row)
    names = normal.get("image")
    if isinstance(names, str) and names:
        return normal, [names]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return normal, names
    return normal, []


def _members_by_names(names: Sequence[str], pictures: Sequence[TarMember]) -> dict[str, str]:
    """Return the name in the line of the picture that each name means; names that mean none are left out.

    A name is a whole member name, one without its folder, or an extension; case does not matter.
    """
    spellings: dict[str, str] = {}
    for spelled in (
        [posixpath.normpath(picture.name) for picture in pictures],
        [_line_name(picture) for picture in pictures],
        [picture.extension for picture in pictures],
    ):
        for spelling, picture in zip(spelled, pictures, strict=True):
            spellings.setdefault(spelling.lower(), _line_name(picture))
    meant = {}
    for name in names:
        whole, last = posixpath.normpath(name).lower(), posixpath.basename(name).lower()
        if whole in spellings or last in spellings:
            meant[name] = spellings.get(whole) or spellings[last]
    return meant


def _is_inline(name: str) -> bool:
    """Return whether a name is a picture itself, as base64, which the checks read or reject."""
    return name.startswith("data:") or len(name) > _LONGEST_NAME


def _caption_turns(sample: TarSample, member: TarMember, num_pictures: int) -> list[dict[str, str]]:
    """Return a question of marks alone, answered by the caption."""
    if not num_pictures:
        raise Rejected("broken_row", f"the sample {sample.key} has a caption but no picture")
    question = "\n".join([IMAGE_MARK] * num_pictures)
    return [{"from": "human", "value": question}, {"from": "gpt", "value": _caption(sample, member)}]


def _caption(sample: TarSample, member: TarMember) -> str:
    try:
        return member.data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Rejected(
            "not_utf8", f"byte {error.start} of the caption of {sample.key} is not UTF-8"
        ) from None


def _picture(pictures: Mapping[str, bytes], name: str) -> bytes:
    if name not in pictures:
        raise Rejected("missing_image", f"{name} is not in the tar")
    return pictures[name]


def _picture_or_file(pictures: Mapping[str, bytes], source: RecordFile, name: str) -> bytes:
    return (
        pictures[name]
        if name in pictures
        else picture_in_root(source.root, name, follow_links=source.follow_links)
    )
