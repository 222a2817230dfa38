"""Shards as plain WebDataset tars: how they are written; `data_prep/reader.py` reads them by byte offset."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import webdataset

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Member:
    """Where a member's data lies in its tar, in bytes."""

    offset: int
    num_bytes: int


class ShardTar:
    """Writes members one after another; the bytes depend on names and data alone. A context manager.

    After the `with` block `num_bytes` and `sha256` are those of the finished file.
    """

    def __init__(self, path: Path):
        self._file = _DigestingFile(path)
        # a fixed owner, mode and time: the same members always give the same bytes
        self._writer = webdataset.TarWriter(
            self._file, user="vico", group="vico", mode=0o444, mtime=0, encoder=False, compress=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        try:
            self._writer.close()
        finally:
            self._file.close()

    def write(self, key: str, extension: str, data: bytes) -> Member:
        """Append `key.extension`. One member a call: a sample's members stand in the order of the calls."""
        self._writer.write({"__key__": key, extension: data})
        padded = -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
        return Member(self._writer.tarstream.offset - padded, len(data))

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    @property
    def sha256(self) -> str:
        return self._file.digest.hexdigest()


class NoTar:
    """Stands for a tar where rows are only checked; counts the bytes of the members."""

    sha256 = ""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        pass

    def write(self, key: str, extension: str, data: bytes) -> Member:
        self.num_bytes += _BLOCK_BYTES + -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
        return Member(0, len(data))


class _DigestingFile:
    """A file that is only written, with the size and sha256 of what went in."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by ShardTar
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
