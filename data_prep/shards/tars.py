"""Writing of shards as plain WebDataset tars; `data_prep/shards/reader.py` reads them by byte offset.

Headers are made here from one that `tarfile` writes: webdataset's TarWriter would take a quarter of the time
to shard a sample (`benchmarks/sharding.py`, `sharding_vs_shardwriter`). The tests compare the bytes with
those of TarWriter.
"""

import hashlib
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

_BLOCK_BYTES, _RECORD_BYTES = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_NAME_BYTES, _SIZE_AT, _SUM_AT = 100, 124, 148
UNSYNCED_BYTES = 64 << 20  # limit of bytes that are written but not synced; a slow disk delays the writer
_SYNC_BYTES = 4 << 20  # synced in the background, so that little is left to sync at the end
_MOST_BYTES = 8**11  # of a member: a plain header has eleven octal digits for the size


def _header_template() -> bytes:
    """Return the header of an empty member without a name, with blanks as its checksum.

    Owner, mode and time are fixed: the same members always give the same bytes.
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
    """Return the 512 bytes before a member's data; `name` is ASCII of at most 100 characters."""
    encoded, size = name.encode("ascii"), b"%011o" % num_bytes
    assert len(encoded) <= _NAME_BYTES and num_bytes < _MOST_BYTES, name
    checksum = b"%06o" % (_TEMPLATE_SUM + sum(encoded) + sum(size))
    return b"".join(
        (encoded.ljust(_NAME_BYTES, b"\0"), _BEFORE_SIZE, size, _BEFORE_SUM, checksum, _AFTER_SUM)
    )


class Member(NamedTuple):
    """Position and size of a member's data in its tar, in bytes."""

    offset: int
    num_bytes: int


class ShardTar:
    """A tar written sample by sample, as a context manager; its bytes depend on names and data alone.

    After the `with` block `num_bytes` and `sha256` are those of the finished file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self.num_bytes = self._synced = self._sent = 0
        self._pool = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            end = 2 * _BLOCK_BYTES
            self._append(bytes(end + -(self.num_bytes + end) % _RECORD_BYTES))
            self._wait()
        finally:
            self._pool.shutdown()
            self._file.close()

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[Member]:
        """Append `key.extension` for every (extension, data) of a sample; return where their data is."""
        pieces: list[bytes] = []
        written, offset = [], self.num_bytes
        for extension, data in members:
            pieces += (member_header(f"{key}.{extension}", len(data)), data, bytes(_padding(len(data))))
            written.append(Member(offset + _BLOCK_BYTES, len(data)))
            offset += _BLOCK_BYTES + len(data) + len(pieces[-1])
        self._append(b"".join(pieces))
        if self.num_bytes - self._sent >= min(_SYNC_BYTES, UNSYNCED_BYTES // 2):
            self._start_sync()
        return written

    def _start_sync(self) -> None:
        """Start to sync what was written; wait for the sync before only when too much is unsynced."""
        under_way = self._sync is not None and not self._sync.done()
        if under_way and self.num_bytes - self._synced < UNSYNCED_BYTES:
            return
        self._wait()
        self._file.flush()
        self._sent = self.num_bytes
        self._sync = self._pool.submit(os.fdatasync, self._file.fileno())

    def _wait(self) -> None:
        """Wait for the sync under way and raise its error."""
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
    """The stand-in for a tar when rows are only checked; it counts the bytes of the members."""

    sha256 = ""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[Member]:
        self.num_bytes += sum(_BLOCK_BYTES + len(data) + _padding(len(data)) for _, data in members)
        return [Member(0, len(data)) for _, data in members]


def _padding(num_bytes: int) -> int:
    """Return the number of bytes from a member's end to the next block."""
    return -num_bytes % _BLOCK_BYTES
