"""Samples of WebDataset tars, plain or compressed, read by the webdataset package.

Its iterator reads the members, its rule says which members belong to a sample, and its patterns name shards.
Where samples start is found here: each task reads its block from there. webdataset has no such positions
(`benchmarks/loading.py` measures what reading by position gains), and takes a cut tar for a shorter one.
"""

import bz2
import gzip
import hashlib
import logging
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from data_prep.records.file_kinds import damaged_file
from data_prep.records.raw_rows import DIGEST_BYTES
from data_prep.remote_files import Location, open_file
from vico.errors import UserError, one_line

_KEPT_HEADERS = 1000
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, such as __meta__/info.json
_MAGIC_BYTES = 6
_READ_BYTES = 1 << 20
_DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_OTHER_MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarMember:
    """A member of a sample: its whole name, its extension in lower case, its content."""

    name: str
    extension: str
    data: bytes


@dataclass(frozen=True)
class TarSample:
    """The members with one key in the order of the tar; `repeated` are members whose extension came before.

    `offset` is the byte of the uncompressed tar where the sample starts, -1 if that was not asked for.
    """

    key: str
    members: tuple[TarMember, ...]
    repeated: tuple[str, ...] = ()
    offset: int = -1


def shard_paths(pattern: str) -> list[str]:
    """Return the paths that webdataset makes of a pattern with braces, such as `{000..012}.tar`.

    Raises UserError when the braces are wrong, or when the pattern names a variable that is not set.
    """
    try:
        return expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"records path={pattern} is not a pattern of webdataset ({one_line(error)}); correct the braces"
        ) from None


def tar_samples(path: Location, offset: int) -> Iterator[TarSample]:
    """Yield the samples from byte `offset` of the uncompressed tar on."""
    with _opened_tar(path) as file:
        file.seek(offset)
        members = tar_file_iterator(file, skip_meta=None, select_files=_belongs_to_a_sample)
        yield from _grouped(
            {"fname": member["fname"], "data": (-1, member["fname"], member["data"])} for member in members
        )


def sample_digests(path: Location) -> Iterator[tuple[int, bytes]]:
    """Yield (byte in the uncompressed tar, digest of all members) of every sample.

    Raises UserError when the tar is cut off, damaged, or has links in the place of members. Members that
    belong to no sample are logged.
    """
    with _opened_tar(path) as file:
        for sample in _grouped(_members_with_offsets(file, path)):
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for member in sample.members:
                named = f"{member.extension} {len(member.data)} "
                digest.update(named.encode("utf-8", "surrogateescape"))  # tarfile reads other bytes so
                digest.update(member.data)
            yield sample.offset, digest.digest()


def _grouped(members: Iterable[dict[str, Any]]) -> Iterator[TarSample]:
    """Yield the samples that webdataset makes of the members; their data is (offset, name, content)."""
    repeated: list[str] = []

    def note_repeated(error: Exception) -> bool:
        name, is_repeated, _ = str(error.args[0]).partition(": duplicate file name")
        if not is_repeated:
            raise error
        repeated.append(name)
        return True

    url = {"__url__": ""}  # group_by_keys copies it into each sample
    for sample in group_by_keys(({**member, **url} for member in members), handler=note_repeated):
        values = {extension: value for extension, value in sample.items() if isinstance(value, tuple)}
        yield TarSample(
            sample["__key__"],
            tuple(TarMember(name, extension, data) for extension, (_, name, data) in values.items()),
            tuple(repeated),
            min((offset for offset, _, _ in values.values()), default=-1),
        )
        repeated.clear()


def _members_with_offsets(file: BinaryIO, path: Location) -> Iterator[dict[str, Any]]:
    """Yield the members that `tar_file_iterator` yields, each with the byte where its header starts."""
    skipped: list[str] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        headers: list[tarfile.TarInfo] = tar.members  # type: ignore[attr-defined]  # not in typeshed
        while (header := tar.next()) is not None:
            if len(headers) > _KEPT_HEADERS:
                headers.clear()  # tarfile keeps every header that it has read
            if header.isdir():
                continue
            if not _belongs_to_a_sample(header.name):
                skipped.append(header.name)
                continue
            if not header.isreg():
                raise UserError(
                    f"{path}: the member {header.name} is a link or a device; write the tar again with the "
                    "files themselves (tar --dereference --hard-dereference)"
                )
            data = cast(BinaryIO, tar.extractfile(header)).read()
            yield {"fname": header.name, "data": (header.offset, header.name, data)}
        _check_end(file, tar.offset, path)
    if skipped:
        logger.warning(
            "%s: %d members belong to no sample by webdataset's rule and are not read, the first is %s",
            path,
            len(skipped),
            skipped[0],
        )


def _belongs_to_a_sample(name: str) -> bool:
    """Return whether webdataset gives the member a key.

    Hidden members never have one. webdataset gives one to those in folders: `x/._1.jpg`, which macOS adds for
    each file, would be a member of the sample `x/` and cut the sample `x/1` in two.
    """
    is_hidden = posixpath.basename(name).startswith(".")
    return not is_hidden and not _META.match(name) and base_plus_ext(name)[0] is not None


def _check_end(file: BinaryIO, offset: int, path: Location) -> None:
    """Raise UserError unless the file ends with blocks of zeros.

    tarfile also stops at a damaged header, and before a tar that was appended (cat a.tar b.tar).
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is cut off or damaged at byte {offset}; download or write it again")
    while rest := file.read(_READ_BYTES):
        if rest.strip(b"\0"):
            raise UserError(
                f"{path} goes on after the end of its tar at byte {offset}, perhaps with another tar; split "
                "the file, or unpack it and write one tar"
            )


@contextmanager
def _opened_tar(path: Location) -> Iterator[BinaryIO]:
    """Open the uncompressed bytes of a tar. Raises UserError when they are damaged, also while being read."""
    try:
        with open_file(path) as file:
            magic = file.read(_MAGIC_BYTES)
            file.seek(0)
            for other, name in _OTHER_MAGIC.items():
                if magic.startswith(other):
                    raise UserError(
                        f"{path} is compressed with {name}, which is not read; unpack it or use gzip"
                    )
            decompress = next((d for start, d in _DECOMPRESSORS.items() if magic.startswith(start)), None)
            if decompress is None:
                yield file
                return
            with decompress(file) as uncompressed:
                yield uncompressed
    except _DAMAGED as error:
        raise damaged_file(path, "a tar", error) from None
    except OSError as error:
        if error.errno is not None:  # from the file system; errors of gzip and bz2 have none
            raise
        raise damaged_file(path, "a tar", error) from None
