"""Rows of WebDataset tars: KEY.json with the fields or a caption in KEY.txt, and the media of that key.

The shards of this project are such tars too. `data_prep/records/row_forms.py` decides what the fields mean,
as for rows of text files.
"""

import posixpath
from collections.abc import Collection, Iterator, Mapping
from functools import partial

from data_prep.records.containers.tar_samples import TarMember, TarSample, tar_samples
from data_prep.records.forms.embedded import Attachment, Embedded, spelling
from data_prep.records.media.kinds import media_of_bytes, media_of_name
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.sets import RecordFile

_MAX_DIGITS = 18
_TEXT_ENDS = ("json", "jsonl", "txt", "text", "html", "xml", "md", "csv", "tsv", "cls", "id", "url")


def tar_rows(
    source: RecordFile,
    offset: int,
    first: int,
    count: int,
    duplicates: Collection[int],
    repaired: Mapping[int, bytes],
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with the sample at byte `offset`, which is row `first`.

    A row in `repaired` has the line given there instead of its own; if that names none, its own pictures.
    """
    picture_bytes = partial(picture_in_root, source.root)  # only a repaired row names files
    for number, sample in enumerate(tar_samples(source.path, offset), start=first):
        if number == first + count:
            return
        content: bytes | dict[str, object] = b""
        embedded, refused = None, None
        try:
            content = repaired[number] if number in repaired else _fields(sample)
            embedded = _embedded(sample, is_repaired=number in repaired)
        except Rejected as rejected:
            refused = (rejected.reason, rejected.message)
        yield RawRow(number, content, number in duplicates, picture_bytes, embedded, refused)


def _fields(sample: TarSample) -> bytes | dict[str, object]:
    """Return the line of KEY.json, or no fields when there is only a caption."""
    extensions = {member.extension: member for member in sample.members}
    if "json" in extensions:
        return extensions["json"].data
    if "txt" in extensions:
        return {}
    raise Rejected("broken_row", f"the sample {sample.key} has neither a .json nor a .txt member")


def _embedded(sample: TarSample, *, is_repaired: bool) -> Embedded:
    """Return the media of a sample, and its caption if it has one and the row is its own.

    Raises Rejected when a member is there twice.
    """
    if sample.repeated:
        raise Rejected("broken_row", f"the sample {sample.key} has {sample.repeated[0]} twice")
    members = [attachment for attachment in map(_attachment, sample.members) if attachment.media]
    pictures = _in_order([member for member in members if member.media == "picture"])
    media = [*pictures, *(member for member in members if member.media != "picture")]
    spellings: dict[str, str | Attachment] = {}
    for medium in media:
        last = spelling(posixpath.basename(medium.name))
        spellings |= {spelling(posixpath.normpath(medium.name)): medium, last: medium, f"*/{last}": medium}
    for medium in media:
        spellings.setdefault(spelling(medium.name.removeprefix(f"{sample.key}.")), medium)
    caption = next((member for member in sample.members if member.extension == "txt"), None)
    return Embedded(
        tuple(media),
        spellings,
        f"the sample {sample.key}",
        None if caption is None or is_repaired else caption.data,
        is_repaired,
    )


def _attachment(member: TarMember) -> Attachment:
    media = media_of_name(f".{member.extension}")
    if media is None and member.extension.rpartition(".")[2] not in _TEXT_ENDS:
        media = media_of_bytes(member.data)
    return Attachment(member.name, member.data, media)


def _in_order(pictures: list[Attachment]) -> list[Attachment]:
    """Return pictures in the order of their numbers if all are KEY.NUMBER.EXTENSION, else of the tar."""
    numbers = [posixpath.basename(picture.name).rpartition(".")[0].partition(".")[2] for picture in pictures]
    if not all(number.isdecimal() and len(number) <= _MAX_DIGITS for number in numbers):
        return pictures
    return [pictures[n] for n in sorted(range(len(pictures)), key=lambda n: int(numbers[n]))]
