"""Rows of WebDataset tars as input: KEY.json with the turns, KEY.jpg or KEY.0.jpg and so on.

Shards of this project are such tars too.
"""

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import internvl_row
from data_prep.remote_files import Place, opened
from vico.errors import UserError

_PICTURE_ENDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEO_ENDS = ("mp4", "avi", "mov", "mkv", "webm")
_KEPT_MEMBERS = 1000


@dataclass
class TarSample:
    """Members with one key, by extension; `offset` is the byte where the header of the first one starts."""

    key: str
    offset: int
    members: dict[str, bytes] = field(default_factory=dict)


def tar_digests(path: Place) -> Iterator[tuple[int, bytes]]:
    """(byte offset, digest of all members) of every sample of a tar."""
    with opened(path) as file:
        for sample in tar_samples(file, path, 0):
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for extension, data in sample.members.items():
                digest.update(f"{extension} {len(data)} ".encode())
                digest.update(data)
            yield sample.offset, digest.digest()


def tar_rows(path: Place, offset: int, first: int, count: int, duplicates: set[int]) -> Iterator[RawRow]:
    """`count` rows from the sample at byte `offset` on, the first of them being row `first`."""
    with opened(path) as file:
        for number, sample in enumerate(tar_samples(file, path, offset), start=first):
            if number == first + count:
                return
            content, pictures, refused = _as_internvl(sample)
            picture_bytes = partial(_picture, pictures)
            yield RawRow(number, content, number in duplicates, picture_bytes, refused)


def tar_samples(file: BinaryIO, path: Place, offset: int) -> Iterator[TarSample]:
    """The samples from a byte offset on, one at a time; UserError where the tar is cut or damaged."""
    file.seek(offset)
    sample: TarSample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if len(tar.members) > _KEPT_MEMBERS:
                    tar.members = []  # tarfile keeps every header it saw
                if not member.isfile():
                    continue
                folder, name = posixpath.split(member.name)
                stem, _, extension = name.partition(".")
                key = posixpath.join(folder, stem)
                if sample is None or sample.key != key or extension in sample.members:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key, member.offset)
                sample.members[extension] = tar.extractfile(member).read()
            _check_end(file, tar.offset, path)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is no whole tar ({error}); compressed tars are not read; fetch or write it again"
        ) from None
    if sample is not None:
        yield sample


def _check_end(file: BinaryIO, offset: int, path: Place) -> None:
    """tarfile takes a damaged header for the end of the tar; the end is a block of zeros."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is cut off or damaged at byte {offset}; fetch or write it again")


def _as_internvl(sample: TarSample) -> tuple[bytes, dict[str, bytes], tuple[str, str] | None]:
    """(the row as a line, its pictures by the names in the line, why there is none)."""
    if "json" not in sample.members:
        return b"", {}, ("broken_row", f"the sample {sample.key} has no .json member")
    content = sample.members["json"]
    videos = [end for end in sample.members if _ends_in(end, _VIDEO_ENDS)]
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
    named = {f"{stem}.{end}": data for end, data in sample.members.items() if _ends_in(end, _PICTURE_ENDS)}
    row["image"] = _chosen(row.get("image"), named)
    return json.dumps(row).encode(), named, None


def _chosen(names: Any, members: dict[str, bytes]) -> list[str]:
    """The members that the row names, else all pictures of the sample by their number."""
    listed = [names] if isinstance(names, str) else names
    if isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed):
        found = [posixpath.basename(name) for name in listed]
        if all(name in members for name in found):
            return found
    return sorted(members, key=_order)


def _order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if len(parts) > 2 and parts[1].isdecimal() else -1), name


def _ends_in(extension: str, ends: tuple[str, ...]) -> bool:
    return extension.rpartition(".")[2].lower() in ends


def _picture(pictures: dict[str, bytes], name: str) -> bytes:
    if name not in pictures:
        raise Rejected("missing_image", f"{name} is not in the tar")
    return pictures[name]
