"""Rows of WebDataset tars: KEY.json with the turns, then KEY.jpg, or KEY.0.jpg, KEY.1.jpg and so on.

The shards of this project are such tars too.
"""

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.remote_files import Location, open_file
from vico.errors import UserError

_PICTURE_ENDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEO_ENDS = ("mp4", "avi", "mov", "mkv", "webm")
_KEPT_HEADERS = 1000


@dataclass
class TarSample:
    """The members with one key, by extension; the header of the first one starts at byte `offset`."""

    key: str
    offset: int
    members: dict[str, bytes] = field(default_factory=dict)


def tar_digests(path: Location) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, digest of all members) of every sample of a tar."""
    with open_file(path) as file:
        for sample in tar_samples(file, path, 0):
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for extension, data in sample.members.items():
                digest.update(f"{extension} {len(data)} ".encode())
                digest.update(data)
            yield sample.offset, digest.digest()


def tar_rows(
    path: Location, offset: int, first: int, count: int, duplicates: Collection[int]
) -> Iterator[RawRow]:
    """Yield at most `count` rows, starting with the sample at byte `offset`, which is row `first`."""
    with open_file(path) as file:
        for number, sample in enumerate(tar_samples(file, path, offset), start=first):
            if number == first + count:
                return
            content, pictures, refused = _as_internvl(sample)
            yield RawRow(number, content, number in duplicates, partial(_picture, pictures), refused)


def tar_samples(file: BinaryIO, path: Location, offset: int) -> Iterator[TarSample]:
    """Yield the samples from byte `offset` on. Raises UserError when the tar is cut off or damaged."""
    file.seek(offset)
    sample: TarSample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            headers: list[tarfile.TarInfo] = tar.members  # type: ignore[attr-defined]  # not in typeshed
            while (member := tar.next()) is not None:
                if len(headers) > _KEPT_HEADERS:
                    headers.clear()  # tarfile keeps every header that it has read
                if not member.isfile():
                    continue
                folder, name = posixpath.split(member.name)
                stem, _, extension = name.partition(".")
                key = posixpath.join(folder, stem)
                if sample is None or sample.key != key or extension in sample.members:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key, member.offset)
                data = tar.extractfile(member)
                assert data is not None, "extractfile gives None only for members that are not files"
                sample.members[extension] = data.read()
            _check_end(file, tar.offset, path)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is not a complete tar ({error}); compressed tars are not supported; "
            "download or write it again"
        ) from None
    if sample is not None:
        yield sample


def _check_end(file: BinaryIO, offset: int, path: Location) -> None:
    """Raise UserError unless the tar ends with a block of zeros: tarfile also stops at a damaged header."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is cut off or damaged at byte {offset}; download or write it again")


def _as_internvl(sample: TarSample) -> tuple[bytes, dict[str, bytes], tuple[str, str] | None]:
    """Return (the row as a line, its pictures by the names in the line, `refused` of the RawRow)."""
    if "json" not in sample.members:
        return b"", {}, ("broken_row", f"the sample {sample.key} has no .json member")
    content = sample.members["json"]
    videos = [extension for extension in sample.members if _ends_in(extension, _VIDEO_ENDS)]
    if videos:
        return content, {}, ("video", f"the sample {sample.key} has a video ({videos[0]})")
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return content, {}, None
    if not isinstance(row, dict):
        return content, {}, None
    row = internvl_row(row)
    stem = posixpath.basename(sample.key)
    pictures = {
        f"{stem}.{extension}": data
        for extension, data in sample.members.items()
        if _ends_in(extension, _PICTURE_ENDS)
    }
    row["image"] = _picture_names(row.get("image"), pictures)
    return json.dumps(row).encode(), pictures, None


def _picture_names(names: Any, pictures: dict[str, bytes]) -> list[str]:
    """Return the members that the row names if all are there, else all pictures of the sample by number."""
    listed = [names] if isinstance(names, str) else names
    if isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed):
        members = [posixpath.basename(name) for name in listed]
        if all(name in pictures for name in members):
            return members
    return sorted(pictures, key=_picture_order)


def _picture_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if len(parts) > 2 and parts[1].isdecimal() else -1), name


def _ends_in(extension: str, ends: tuple[str, ...]) -> bool:
    return extension.rpartition(".")[2].lower() in ends


def _picture(pictures: dict[str, bytes], name: str) -> bytes:
    if name not in pictures:
        raise Rejected("missing_image", f"{name} is not in the tar")
    return pictures[name]
