"""Shards as plain WebDataset tars: how they are written; `data_prep/shards/reader.py` reads them by byte offset.

Headers are made here from one that `tarfile` writes: webdataset's TarWriter, which the tests hold the bytes
against, takes a quarter of the time to shard a sample.
"""

import hashlib
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_BLOCK_BYTES, _RECORD_BYTES = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_NAME_BYTES, _SIZE_AT, _SUM_AT = 100, 124, 148
UNSYNCED_BYTES = 64 << 20  # what may be on its way to the disk; a slow one holds the writer back
_SYNC_BYTES = 4 << 20  # sent on its way beside the work, so that little is left to wait for at the end
_MOST_BYTES = 8**11  # of a member, by the eleven octal digits of a plain header


def _header_template() -> bytes:
    """The header of an empty member without a name, its checksum taken as blanks.

    A fixed owner, mode and time: the same members always give the same bytes.
    """
    member = tarfile.TarInfo("")
    member.uname = member.gname = "vico"
    member.mode, member.mtime = 0o444, 0
    header = member.tobuf(tarfile.USTAR_FORMAT)
    return header[:_SUM_AT] + b" " * 8 + header[_SUM_AT + 8 :]


_TEMPLATE = _header_template()
_BEFORE_SIZE = _TEMPLATE[_NAME_BYTES:_SIZE_AT]
_BEFORE_SUM = _TEMPLATE[_SIZE_AT + 11 : _SUM_AT]
_AFTER_SUM = b"\0 " + _TEMPLATE[_SUM_AT + 8 :]
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(b"0" * 11)  # a size replaces eleven zeros


def member_header(name: str, num_bytes: int) -> bytes:
    """The 512 bytes before a member's data; `name` is ASCII of at most 100 letters."""
    encoded, size = name.encode("ascii"), b"%011o" % num_bytes
    assert len(encoded) <= _NAME_BYTES and num_bytes < _MOST_BYTES, name
    checksum = b"%06o" % (_TEMPLATE_SUM + sum(encoded) + sum(size))
    return b"".join(
        (encoded.ljust(_NAME_BYTES, b"\0"), _BEFORE_SIZE, size, _BEFORE_SUM, checksum, _AFTER_SUM)
    )


@dataclass(frozen=True)
class Member:
    """Where a member's data lies in its tar, in bytes."""

    offset: int
    num_bytes: int


class ShardTar:
    """Writes samples one after another; the bytes depend on names and data alone. A context manager.

    After the `with` block `num_bytes` and `sha256` are those of the finished file.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self.num_bytes = self._synced = self._sent = 0
        self._pool = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        try:
            end = 2 * _BLOCK_BYTES
            self._append(bytes(end + -(self.num_bytes + end) % _RECORD_BYTES))
            self._wait()
        finally:
            self._pool.shutdown()
            self._file.close()

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[Member]:
        """Append `key.extension` with its data for every (extension, data) of a sample, in that order."""
        pieces, found, offset = [], [], self.num_bytes
        for extension, data in members:
            pieces += (member_header(f"{key}.{extension}", len(data)), data, bytes(_padding(len(data))))
            found.append(Member(offset + _BLOCK_BYTES, len(data)))
            offset += _BLOCK_BYTES + len(data) + len(pieces[-1])
        self._append(b"".join(pieces))
        if self.num_bytes - self._sent >= min(_SYNC_BYTES, UNSYNCED_BYTES // 2):
            self._send()
        return found

    def _send(self) -> None:
        """Start to sync what was written; wait for an earlier sync only when too much is on its way."""
        under_way = self._sync is not None and not self._sync.done()
        if under_way and self.num_bytes - self._synced < UNSYNCED_BYTES:
            return
        self._wait()
        self._file.flush()
        self._sent = self.num_bytes
        self._sync = self._pool.submit(os.fdatasync, self._file.fileno())

    def _wait(self) -> None:
        """Wait for the sync under way; raises what the disk has to say."""
        if self._sync is not None:
            self._sync.result()
            self._synced, self._sync = self._sent, None

    def _append(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.num_bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class NoTar:
    """Stands for a tar where rows are only checked; counts the bytes of the members."""

    sha256 = ""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        pass

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[Member]:
        self.num_bytes += sum(_BLOCK_BYTES + len(data) + _padding(len(data)) for _, data in members)
        return [Member(0, len(data)) for _, data in members]


def _padding(num_bytes: int) -> int:
    """Bytes from a member's end to the next block."""
    return -num_bytes % _BLOCK_BYTES
